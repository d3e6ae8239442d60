"""Phase B: draw pairs of a micro-batch and roll them out until enough of them contribute (DAPO, arXiv 2503.14476).

The order of the pairs is drawn before any is rolled out. A draw keeps **the first K contributing pairs in that order**
and reports figures of all pairs up to the K-th of them. So neither depends on the lengths of answers, on how many pairs
roll out at once, or on the number of processes: only the waste does. A pair behind K contributing ones cannot be kept,
and its rollouts stop at once; a pair before the K-th is waited for.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from saga_fast.encoder import VisualFeatures
from saga_fast.runtime import distributed
from saga_fast.runtime.oom import OomBackoff
from saga_fast.supervisor.agreement import AttributeValues, attribute_agreement, value_entropy
from saga_fast.supervisor.rollout import PairRollouts
from saga_fast.supervisor.supervisor import Supervisor
from saga_kernels import group_advantage


class JudgedPair(NamedTuple):
    """A pair that was rolled out. rewards (fp32), well_formed (bool), advantages (fp32): (G,).

    attribute_values: of each rollout, attribute → value for both images. credit: advantages (2, M, G) of these values.
    Both are None without attribute credit. contributes: whether any advantage is not zero. broken: a rollout met logits
    that are not finite; all rewards are 0 and the pair does not contribute. log_probs: see `PairRollouts`.
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

    same: whether both images of each pair are of one class. wasted: tokens of pairs that were started and not needed.
    """

    pairs: list[JudgedPair] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)
    wasted: int = 0

    @property
    def contributing(self) -> int:
        return sum(pair.contributes for pair in self.pairs)

    def extend(self, other: Draw) -> None:
        """Appends the draw from another micro-batch."""
        self.pairs += other.pairs
        self.same += other.same
        self.wasted += other.wasted

    def summary(self) -> dict[str, float]:
        """For a step's line in the log."""
        log = {"pairs_drawn": len(self.pairs), "pairs_contributing": self.contributing}
        if not self.pairs:
            return log
        if self.pairs[0].attribute_values is not None:
            names = list(
                dict.fromkeys(
                    name for pair in self.pairs for rollout in pair.attribute_values for i in rollout for name in i
                )
            )
            log["value_entropy"] = value_entropy([pair.attribute_values for pair in self.pairs], names)
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


def draw_pairs(labels: Tensor, count: int, seed: int) -> Tensor:
    """(≤ count, 2) indices of distinct pairs in a batch of `labels` (B,), same- and different-class pairs in turn.

    seed: any whole number from 0 on.
    """
    if seed >= 2**63:  # more than a generator takes
        seed = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:8], "little") >> 1
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.combinations(torch.arange(len(labels)))
    pairs = pairs[torch.randperm(len(pairs), generator=generator)]
    same = labels.cpu()[pairs[:, 0]] == labels.cpu()[pairs[:, 1]]
    half = min(count // 2, int(same.sum()), int((~same).sum()))
    return torch.stack([pairs[same][:half], pairs[~same][:half]], 1).flatten(0, 1).to(labels.device)


def draw_contributing(
    supervisor: Supervisor,
    features: VisualFeatures,
    pairs: Tensor,
    same: list[bool],
    first_id: int,
    wanted: int,
    contribution_rate: float,
    backoff: OomBackoff,
    credit: bool = False,
) -> Draw:
    """Rolls out `pairs` (n, 2), indices of images in `features`, in order, until `wanted` of them contribute.

    same [n]: whether both images are of one class. Pair i has id first_id + i and belongs to rank i mod world size. As
    many pairs are started as are expected to yield the missing ones at `contribution_rate`, less half a pair: that
    wastes about a tenth. A rank without a pair starts one all the same, as it would idle. A rank that is out of memory
    goes on with half its slots; their pairs start again and give the same completions.
    """
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
        for gathered in distributed.all_gather_object(_judge(supervisor, finished, same, credit)):
            judged |= gathered
        in_flight -= judged.keys()
    wasted += sum(pair.tokens for i, pair in judged.items() if i > last and i % world_size == rank)
    return Draw([judged[i] for i in range(last + 1)], same[: last + 1], sum(distributed.all_gather_object(wasted)))


def _judge(
    supervisor: Supervisor, done: dict[int, PairRollouts], same: list[bool], credit: bool
) -> dict[int, JudgedPair]:
    if not done:
        return {}
    completions, same_class = [pair.completions for pair in done.values()], [same[i] for i in done]
    rewards, well_formed = supervisor.judge(completions, same_class)
    attribute_values = [supervisor.attribute_values(group) for group in completions] if credit else [None] * len(done)
    all_rewards = rewards[:, None]
    if credit:
        agreement = torch.stack(
            [attribute_agreement(group, supervisor.prompt.attributes) for group in attribute_values]
        )
        # Images of two classes may differ in any attribute, and no label says in which.
        agreement = agreement * torch.tensor(same_class)[:, None, None, None]
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
            attribute_values[j],
            advantages[j, 1:].unflatten(0, (2, -1)) if credit else None,
            bool(contributes[j]),
            pair.broken,
            pair.log_probs,
        )
        for j, (i, pair) in enumerate(done.items())
    }
