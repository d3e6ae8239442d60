"""Phase B: draw pairs of a micro-batch and roll them out until enough of them contribute (DAPO, arXiv 2503.14476).

The order of the pairs is drawn before any is rolled out. A draw keeps **the first K contributing pairs in that order**
and reports figures of all pairs up to the K-th of them. So neither depends on the lengths of answers, on how many pairs
roll out at once, or on the number of processes: only the waste does. A pair behind K contributing ones cannot be kept,
and its rollouts stop at once; a pair before the K-th is waited for.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saga_fast.encoder import VisualFeatures
from saga_fast.runtime import distributed
from saga_fast.runtime.oom import OomBackoff
from saga_fast.supervisor.agreement import AttributeValues, ClassReadings, value_entropy
from saga_fast.supervisor.rollout import PairRollouts
from saga_fast.supervisor.supervisor import Supervisor
from saga_kernels import group_advantage


class JudgedPair(NamedTuple):
    """A pair that was rolled out. rewards (fp32), well_formed (bool), advantages (fp32): (G,).

    attribute_values: of both images, from each rollout; credit: the attributes' advantages (2, M, G); both None without
    attribute credit. contributes: whether any advantage is not zero. broken: its rollouts have logits that are not
    finite, so it does not contribute and its rewards are 0. log_probs: see `PairRollouts`.
    """

    completions: list[list[int]]
    rewards: Tensor
    well_formed: Tensor
    advantages: Tensor
    attribute_values: list[AttributeValues] | None
    credit: Tensor | None
    contributes: bool
    broken: bool
    log_probs: dict[tuple[int, int], float]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.completions))


@dataclass
class Draw:
    """The judged pairs of a draw, in order: up to the K-th that contributes, or all where fewer do.

    classes: of both images of each. wasted: tokens of pairs that were started and not needed.
    """

    pairs: list[JudgedPair] = field(default_factory=list)
    classes: list[tuple[int, int]] = field(default_factory=list)
    wasted: int = 0

    @property
    def same(self) -> list[bool]:
        return [a == b for a, b in self.classes]

    @property
    def contributing(self) -> int:
        return sum(pair.contributes for pair in self.pairs)

    def extend(self, other: Draw) -> None:
        """Appends the draw from another micro-batch."""
        self.pairs += other.pairs
        self.classes += other.classes
        self.wasted += other.wasted

    def summary(self) -> dict[str, float]:
        """For a step's line in the log."""
        log: dict[str, float] = {"pairs_drawn": len(self.pairs), "pairs_contributing": self.contributing}
        if not self.pairs:
            return log
        if rollout := [pair.attribute_values for pair in self.pairs if pair.attribute_values is not None]:
            names = list(dict.fromkeys(name for group in rollout for items in group for item in items for name in item))
            log["value_entropy"] = value_entropy(rollout, names)
            # Pairs that contribute by attribute credit alone.
            log["pairs_by_attribute"] = sum(pair.contributes and not pair.advantages.any() for pair in self.pairs)
        log["pairs_broken"] = sum(pair.broken for pair in self.pairs)
        rewards, same = torch.stack([pair.rewards for pair in self.pairs]), torch.tensor(self.same)
        for name, chosen in (("reward", rewards), ("reward_same", rewards[same]), ("reward_different", rewards[~same])):
            if len(chosen):
                log[name] = chosen.mean().item()
        tokens = sum(pair.tokens for pair in self.pairs)
        return log | {
            "well_formed": torch.stack([pair.well_formed for pair in self.pairs]).float().mean().item(),
            "completion_tokens": tokens / rewards.numel(),
            "rollout_waste": self.wasted / max(1, tokens + self.wasted),
        }


def draw_pairs(labels: Tensor, count: int, seed: int, first_id: int) -> Tensor:
    """(≤ count, 2) indices of distinct pairs in a batch of `labels` (B,), same- and different-class pairs in turn.

    seed: of the run; first_id: of the first pair, unique in the run. Both are whole numbers from 0 on, of any size.
    """
    # NumPy uses all their bits; PyTorch's CPU generator uses 32 bits of a seed.
    random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(first_id,)))
    pairs = torch.combinations(torch.arange(len(labels)))
    pairs = pairs[torch.from_numpy(random.permutation(len(pairs)))]
    same = labels.cpu()[pairs[:, 0]] == labels.cpu()[pairs[:, 1]]
    half = min(count // 2, int(same.sum()), int((~same).sum()))
    return torch.stack([pairs[same][:half], pairs[~same][:half]], 1).flatten(0, 1).to(labels.device)


class Candidates(NamedTuple):
    """Pairs of a micro-batch, in the order in which they are rolled out. features: of its images. pairs: (n, 2) int64,
    indices of these. classes: of both images of each pair. Pair i has the id first_id + i, unique in the run."""

    features: VisualFeatures
    pairs: Tensor
    classes: list[tuple[int, int]]
    first_id: int

    @property
    def same(self) -> list[bool]:
        return [a == b for a, b in self.classes]


def draw_contributing(
    supervisor: Supervisor,
    candidates: Candidates,
    wanted: int,
    contribution_rate: float,
    backoff: OomBackoff,
    readings: ClassReadings | None = None,
) -> Draw:
    """Rolls out the candidates in order until `wanted` of them contribute.

    readings: the values that attribute credit compares with; None for the verdict's reward alone. Pair i belongs to
    rank i mod world size. As many pairs are started as are expected to yield the missing ones at `contribution_rate`,
    less half a pair: that wastes about a tenth. A rank without a pair starts one all the same, as it would idle. A rank
    that is out of memory goes on with half its slots; their pairs start again and give the same completions.
    """
    features, pairs, _, first_id = candidates
    rank, world_size = distributed.rank(), distributed.world_size()
    slots = min(distributed.all_gather_object(supervisor.slots))
    judged: dict[int, JudgedPair] = {}
    in_flight: set[int] = set()
    started = wasted = 0

    def advance_engine(limit: int) -> list[PairRollouts]:
        supervisor.slots = limit
        engine = supervisor.engine
        queued = [i for i in sorted(in_flight) if i % world_size == rank and first_id + i not in engine.pair_ids]
        admitted = queued[: engine.free_slots]
        engine.admit(features.select(pairs[admitted].flatten()), [first_id + i for i in admitted])
        return engine.advance()

    while True:
        contributing = sorted(i for i, pair in judged.items() if pair.contributes)
        last = contributing[wanted - 1] if len(contributing) >= wanted else len(pairs) - 1
        if surplus := {i for i in in_flight if i > last}:
            wasted += sum(pair.tokens for pair in supervisor.engine.drop({first_id + i for i in surplus}))
            in_flight -= surplus
        if not in_flight and started > last:
            break
        in_flight_per_rank = Counter(i % world_size for i in in_flight)
        while started <= last and in_flight_per_rank[started % world_size] < slots:
            if (
                in_flight_per_rank[started % world_size]
                and len(contributing) + contribution_rate * (len(in_flight) + 1) > wanted - 0.5
            ):
                break
            in_flight_per_rank[started % world_size] += 1
            in_flight.add(started)
            started += 1
        finished = {pair.pair_id - first_id: pair for pair in backoff.run("roll out", supervisor.slots, advance_engine)}
        for gathered in distributed.all_gather_object(_judge(supervisor, finished, candidates.classes, readings)):
            judged |= gathered
        in_flight -= judged.keys()
    wasted += sum(pair.tokens for i, pair in judged.items() if i > last and i % world_size == rank)
    return Draw(
        [judged[i] for i in range(last + 1)], candidates.classes[: last + 1], sum(distributed.all_gather_object(wasted))
    )


def _judge(
    supervisor: Supervisor,
    done: dict[int, PairRollouts],
    classes: list[tuple[int, int]],
    readings: ClassReadings | None,
) -> dict[int, JudgedPair]:
    if not done:
        return {}
    completions, pair_classes = [pair.completions for pair in done.values()], [classes[i] for i in done]
    rewards, well_formed = supervisor.judge(completions, [a == b for a, b in pair_classes])
    attribute_values = [supervisor.attribute_values(group) for group in completions] if readings else []
    all_rewards = rewards[:, None]
    if readings:
        names = supervisor.prompt.attributes
        agreement = torch.stack(
            [readings.rewards(group, pair, names) for group, pair in zip(attribute_values, pair_classes)]
        )
        all_rewards = torch.cat([all_rewards, agreement.flatten(1, 2)], 1)
    all_rewards[[pair.broken for pair in done.values()]] = 0
    advantages, differs, _ = group_advantage(all_rewards)
    contributes = differs.any(1)
    return {
        i: JudgedPair(
            pair.completions,
            all_rewards[j, 0],
            well_formed[j],
            advantages[j, 0],
            attribute_values[j] if readings else None,
            advantages[j, 1:].unflatten(0, (2, -1)) if readings else None,
            bool(contributes[j]),
            pair.broken,
            pair.log_probs,
        )
        for j, (i, pair) in enumerate(done.items())
    }
