"""Train a retrieval encoder with SAGA: a frozen multimodal model judges pairs, its gradient teaches the encoder.

    python -m saga_fast.train [PRESET] [--out DIR] [--resume] [--section.field VALUE …]

`optimizer_step` is the method (Algorithm 1, arXiv 2606.15134). A embeds a class-balanced micro-batch and takes the
metric loss's gradient. B draws pairs from it and has the frozen language model describe and judge each pair G times;
pairs whose rollouts earn different rewards contribute and are buffered, until there are K. C replays those with
gradient: GRPO into the vision tower, attention alignment into the pooler. Left out, as the one update per draw is on
policy: importance ratio, clipping, a reference model.

A run's folder: config.json, metrics.jsonl (a line per step), final.json, encoder/, checkpoint/, report.html and its
files, TensorBoard events.
"""

from __future__ import annotations

import sys

from saga_fast.config import TINY, Config, expect_new, expect_same, parse, record_of, stored
from saga_fast.utils.errors import InputError, exit_on_input_error, first_line

if __name__ == "__main__":  # --help and errors in flags come before the seconds that importing PyTorch takes
    with exit_on_input_error():
        parse(sys.argv[1:])

import dataclasses
import itertools
import math
import shlex
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from saga_fast.data import Augmentation, Batch, ClassBalancedSampler, PixelLoader, augmented, checksum
from saga_fast.encoder import Encoder, VisualFeatures
from saga_fast.evaluate import embed_images, load_images, score, table
from saga_fast.losses import metric_loss
from saga_fast.losses.alignment import alignment_kl, attention_targets
from saga_fast.losses.balance import Balance
from saga_fast.losses.policy import add_attribute_credit, token_coefficients
from saga_fast.report.samples import describe, sampled_steps, sheet
from saga_fast.retrieval.gallery import neighbours
from saga_fast.runtime import distributed
from saga_fast.runtime.health import embedding_spread
from saga_fast.runtime.memory import GIB, FixedPlan, Predictor, Step, SupervisorParts, free_bytes
from saga_fast.runtime.oom import GradientCachedForward, OomBackoff, gradients_all_or_none
from saga_fast.runtime.run import SELECTION_METRIC, Run, State, run_lock
from saga_fast.runtime.signals import Stopped
from saga_fast.supervisor.agreement import ClassReadings
from saga_fast.supervisor.draw import Candidates, Draw, draw_contributing, draw_pairs
from saga_fast.supervisor.lengths import measure
from saga_fast.supervisor.mllm import Mllm, load_mllm, read_pretrained
from saga_fast.supervisor.prompt import Prompt
from saga_fast.supervisor.prompt_file import load_prompt, stored_prompt
from saga_fast.supervisor.replay import AnchorAttention, Group, ReplayResult
from saga_fast.supervisor.rollout import Sampling
from saga_fast.supervisor.supervisor import (
    AttributePositions,
    Supervisor,
    anchor_layer_index,
    flat_positions,
    prompt_prefix,
)
from saga_fast.supervisor.verdict import tokens_by_attribute
from saga_fast.tiny import SUPERVISOR
from saga_fast.towers import load_tower, tower_of

MAX_SKIPPED = 5  # steps in a row with a loss or gradient that is not finite, before the run gives up


class Diverged(RuntimeError):
    """Losses or gradients stayed non-finite. Earlier checkpoints are intact."""


@dataclass(eq=False)
class Training:
    """Models, optimizer and data of a run. autocast: makes a context for tower and pooler, never for the supervisor.

    supervisor_sha256: of the supervisor's weights, which no step changes; None without one. batches: micro-batches of
    the training half, without end.
    """

    config: Config
    encoder: Encoder
    _supervisor: Supervisor | None
    dml: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    autocast: Callable[[], AbstractContextManager[None]]
    batches: Iterator[Batch] = field(default_factory=lambda: iter(()))
    supervisor_sha256: str | None = None
    balance: Balance = field(default_factory=Balance)
    readings: ClassReadings = field(default_factory=ClassReadings)
    oom: OomBackoff = field(default_factory=OomBackoff)

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    @property
    def has_supervisor(self) -> bool:
        """Whether λ_lm or λ_kl is above 0. A run without a supervisor trains by the metric loss alone."""
        return self._supervisor is not None

    @property
    def supervisor(self) -> Supervisor:
        """Raises ValueError where the run has none."""
        if self._supervisor is None:
            raise ValueError("lambda.lm and lambda.kl are 0, so there is no supervisor")
        return self._supervisor

    @property
    def supervisor_weight(self) -> float:
        """The factor, in 0..1, of λ_lm and λ_kl; 1 without `lambda.adaptive`."""
        return self.balance.supervisor_weight if self.config.lambda_.adaptive else 1.0

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def visual_levels(self, pixels: Tensor) -> list[Tensor]:
        """uint8 pixels (B, 3, S, S) → the levels that the language model reads: tokens (B, N, D), then DeepStack's."""
        with self.autocast():
            return list(self.encoder.tower(pixels).levels)

    def embed_pixels(self, pixels: Tensor) -> list[Tensor]:
        """uint8 pixels (B, 3, S, S) → embeddings (B, D_e), then the levels of `visual_levels`."""
        levels = self.visual_levels(pixels)
        with self.autocast():
            return [self.encoder.pooler(levels[0]), *levels]


class Pair(NamedTuple):
    """A contributing pair, buffered between rollout and replay.

    images: (2,) int64, ids of the images, unique in the step. pixels: uint8 (2, 3, S, S). features: of both images, as
    used in the rollout. completions, rewards (G,), advantages (G,): of its rollouts. credit: see `JudgedPair`;
    log_probs: see `PairRollouts`.
    """

    images: Tensor
    pixels: Tensor
    features: VisualFeatures
    completions: list[list[int]]
    rewards: Tensor
    advantages: Tensor
    credit: Tensor | None = None
    log_probs: dict[tuple[int, int], float] = {}


def train(config: Config, out: Path, resume: bool = False) -> dict[str, Any]:
    """Runs (or resumes) `config` in the folder `out`, which is locked meanwhile; returns the content of final.json.
    Raises InputError, Diverged."""
    out = Path(out)
    with run_lock(out):
        if resume:
            expect_same(config, stored(out), out)
        else:
            expect_new(out)
        t, run, images = set_up(config, out, resume)
        return take_steps(t, run, *images)


def take_steps(
    t: Training, run: Run, validation_images: PixelLoader | None, test_images: PixelLoader
) -> dict[str, Any]:
    """Takes the remaining steps of the run; returns the content of final.json. Raises InputError, Diverged."""
    config = t.config
    t.encoder.train()
    progress = tqdm(
        range(run.step, run.total),
        "training",
        run.total,
        initial=run.step,
        unit="step",
        dynamic_ncols=True,
        disable=distributed.rank() > 0,
    )
    every = config.log.evaluate_every
    for step in run.steps(progress):
        log = optimizer_step(t, step, run.contribution_rate, partial(save_samples, t, run, step))
        log |= run.count(log)
        if every and validation_images and (step + 1) % every == 0:
            held_out = embed_images(t.encoder.eval(), validation_images)
            log[SELECTION_METRIC] = score(held_out, validation_images.labels)["recall_at_1"]
            t.encoder.train()
        run.record(step, log)
        shown = {"dml": "loss_dml", "lm": "loss_lm", "kl": "loss_kl", "reward": "reward"}
        progress.set_postfix(
            {short: f"{log[name]:.3g}" for short, name in shown.items() if name in log}
            | {"pairs": f"{log['pairs_replayed']}/{log.get('pairs_drawn', 0)}"}
        )
        if log["skipped_now"] == MAX_SKIPPED:
            raise Diverged(
                f"{MAX_SKIPPED} steps in a row were not finite (step {step}); the last checkpoint is intact: "
                "lower the learning rates"
            )

    if t.has_supervisor and t.supervisor.decoder.fingerprint() != t.supervisor_sha256:
        raise RuntimeError("the supervisor's weights changed during the run: it was not frozen")
    run.load_best()
    embeddings = embed_images(t.encoder.eval(), test_images)
    after = score(embeddings, test_images.labels)
    return run.finish(after, t.supervisor_sha256, test_images, embeddings)


def save_samples(t: Training, run: Run, step: int, buffer: list[Pair]) -> None:
    """Writes rollouts and attention of the buffered pairs for the report, in some of the steps."""
    if buffer and distributed.rank() == 0 and step in sampled_steps(run.total, t.config.log.samples_every):
        run.sample(step, describe(t.supervisor, t.encoder, buffer, t.autocast()), sheet(buffer))


def optimizer_step(
    t: Training, step: int, contribution_rate: float, before_update: Callable[[list[Pair]], None]
) -> dict[str, float]:
    """One update of the encoder. Returns the step's line of metrics.jsonl, without what a run counts over its steps.

    contribution_rate: share of the pairs drawn so far that contributed. before_update: called with the buffer, under
    the weights that rolled it out.
    """
    config, started = t.config, time.perf_counter()
    t.optimizer.zero_grad(set_to_none=True)
    buffer: list[Pair] = []
    draw, losses_dml = Draw(), []
    for batch in itertools.islice(t.batches, config.rollout.max_batches):
        # ── A. Embed a micro-batch; metric loss, with its gradient ──────────────────────────────────────────────────
        embeddings, features, loss_dml = embed_batch(t, batch)
        losses_dml.append(loss_dml)
        if not t.has_supervisor:
            break

        # ── B. Draw pairs and roll them out, without gradient, until K contribute ───────────────────────────────────
        first_id, missing = (step << 20) + len(draw.pairs), config.rollout.pairs - len(buffer)
        pair_rows, drawn = rollout_batch(t, batch, features, first_id, missing, contribution_rate)
        buffer += contributing_pairs(batch, len(losses_dml), features, pair_rows, drawn)
        draw.extend(drawn)
        if len(buffer) >= config.rollout.pairs:
            break
    # L_DML is the mean over the step's micro-batches, whose number is known only now.
    gradient_dml = take_gradients(t.parameters, len(losses_dml))
    # This draw's verdicts and values already weigh its own replay.
    t.balance.update(draw.same, [pair.rewards.mean().item() for pair in draw.pairs])
    for pair, classes in zip(draw.pairs, draw.classes):
        t.readings.add(pair.attribute_values or [], classes)
    log = {
        "loss_dml": sum(losses_dml) / len(losses_dml),
        "micro_batches": len(losses_dml),
        **embedding_spread(embeddings),
        **draw.summary(),
        "pairs_replayed": len(buffer),
        "seconds_embed_and_roll_out": (rolled_out := time.perf_counter()) - started,
    }

    # ── C. Replay with gradient: GRPO into the tower, L_KL into the pooler ──────────────────────────────────────────
    if buffer and t.supervisor_weight > 0:
        log |= replay_buffer(t, buffer)
    gradient_supervisor = take_gradients(t.parameters)
    before_update(buffer)

    # ── Add up, clip, update ────────────────────────────────────────────────────────────────────────────────────────
    log |= combine_gradients(t, gradient_dml, gradient_supervisor)
    norm = nn.utils.clip_grad_norm_(t.parameters, config.optim.clip).item()
    losses = [value for name, value in log.items() if name.startswith("loss_")]
    finite = all(map(math.isfinite, [norm, *losses]))
    if finite:
        t.optimizer.step()
    log |= {**t.oom.log(), "grad_norm": norm, "lr": t.optimizer.param_groups[0]["lr"], "applied": finite}
    t.schedule.step()
    return log | {"seconds_replay_and_update": time.perf_counter() - rolled_out}


def embed_batch(t: Training, batch: Batch) -> tuple[Tensor, VisualFeatures, float]:
    """Phase A: adds the gradient of λ_dml L_DML of a micro-batch. Returns its embeddings (B, D_e) and features, both
    detached and gathered on every rank, and L_DML."""
    weight, count = t.config.lambda_.dml, len(batch.pixels)
    labels, shard = batch.labels.to(t.device), batch.pixels[distributed.shard_rows(count)].to(t.device)
    with torch.set_grad_enabled(weight > 0):  # without the metric loss no graph is kept during the rollout
        cached_forward = GradientCachedForward(t.oom, "embed", t.embed_pixels, shard, list(t.encoder.parameters()))
        embeddings, *levels = cached_forward.outputs
        # Every rank computes the loss of the whole batch, and takes its share: gradients are summed over the ranks.
        embeddings = distributed.all_gather_rows(embeddings, count)
        loss = t.dml(embeddings, labels)
        if weight > 0:
            (weight * loss / distributed.world_size()).backward()
            cached_forward.backward()
    features = VisualFeatures.of(levels).detach().map(partial(distributed.all_gather_rows, count=count))
    return embeddings.detach(), features, loss.item()


def rollout_batch(
    t: Training, batch: Batch, features: VisualFeatures, first_id: int, wanted: int, contribution_rate: float
) -> tuple[Tensor, Draw]:
    """Phase B: rolls out pairs of one micro-batch, same-class and different-class in turn, until `wanted` contribute.
    Returns all its pairs, as rows (n, 2) of the batch, and the draw, which covers the first of them. Pair i has the id
    first_id + i, unique in the run."""
    config = t.config
    pairs = draw_pairs(batch.labels, config.rollout.pairs_per_batch, config.seed, first_id)
    classes = [(a, b) for a, b in batch.labels[pairs].tolist()]
    readings = t.readings if config.rollout.credit == "attributes" else None
    candidates = Candidates(features, pairs, classes, first_id)
    return pairs, draw_contributing(t.supervisor, candidates, wanted, contribution_rate, t.oom, readings)


def contributing_pairs(
    batch: Batch, micro_batch: int, features: VisualFeatures, pair_rows: Tensor, draw: Draw
) -> list[Pair]:
    """The contributing pairs of a draw, for the buffer. pair_rows: as `rollout_batch` returns them."""
    image_ids = torch.tensor(batch.indices) + (micro_batch << 32)  # an image is augmented anew in each micro-batch
    return [
        Pair(
            image_ids[rows],
            batch.pixels[rows],
            features.select(rows.to(features.tokens.device)),
            pair.completions,
            pair.rewards,
            pair.advantages,
            pair.credit,
            pair.log_probs,
        )
        for rows, pair in zip(pair_rows, draw.pairs)
        if pair.contributes
    ]


def replay_buffer(t: Training, buffer: list[Pair]) -> dict[str, float]:
    """Phase C: adds the gradients of λ_lm L_GRPO (into the tower) and λ_kl L_KL (into the pooler) of this rank's share
    of the buffered pairs. |T| and the mean of L_KL are those of the whole buffer. Returns figures of the whole
    buffer."""
    tokens = [sum(map(len, pair.completions)) for pair in buffer]
    packed = [len(t.supervisor.prefix) + count for count in tokens]
    shares = distributed.balance_loads(packed, distributed.world_size())
    own_pairs = [buffer[i] for i in shares[distributed.rank()]]
    attribute_positions: list[list[AttributePositions]] = [[] for _ in own_pairs]
    target_positions: list[dict[int, AttributePositions]] = [{} for _ in own_pairs]
    if t.config.reads_attributes:
        attribute_positions = [t.supervisor.attribute_positions(pair.completions) for pair in own_pairs]
    if t.config.lambda_.kl > 0:
        target_positions = [rewarded_positions(*pair) for pair in zip(own_pairs, attribute_positions)]
    rewarded = sum(distributed.all_gather_object(sum(map(len, target_positions))))
    loss_lm = loss_kl = 0.0
    drift: list[float] = []
    if own_pairs:
        # These are the features of the rollouts: no weight has changed since.
        leaves = VisualFeatures.of([torch.cat(level) for level in zip(*(pair.features.levels for pair in own_pairs))])
        groups = [
            make_group(t, pair, positions, targets, sum(tokens))
            for pair, positions, targets in zip(own_pairs, attribute_positions, target_positions)
        ]
        result = policy_gradient(t, own_pairs, leaves, groups)
        loss_lm = result.loss.item()
        for pair, log_probs in zip(own_pairs, result.log_probs):
            drift += [abs(log_probs[g][position].item() - sampled) for (g, position), sampled in pair.log_probs.items()]
        if result.attention:
            loss_kl = align_attention(t, leaves.tokens, result.attention, target_positions, rewarded)
    losses_lm, losses_kl, drifts = zip(*distributed.all_gather_object((loss_lm, loss_kl, drift)))
    loads = [sum(packed[i] for i in share) for share in shares]
    log = {"loss_lm": sum(losses_lm), "idle_share": 1 - sum(loads) / len(loads) / max(loads)}
    if drift := [value for values in drifts for value in values]:  # how far the ratio is from 1
        log["log_prob_drift"] = sum(drift) / len(drift)
    return log | ({"loss_kl": sum(losses_kl)} if rewarded else {})


def rewarded_positions(pair: Pair, attribute_positions: Sequence[AttributePositions]) -> dict[int, AttributePositions]:
    """Rollout → attribute positions, of the rollouts with reward 1 that describe both images: the targets of L_KL."""
    return {
        g: items
        for g, items in enumerate(attribute_positions)
        if pair.rewards[g] and all(any(item.values()) for item in items)
    }


def make_group(
    t: Training,
    pair: Pair,
    attribute_positions: Sequence[AttributePositions],
    target_positions: dict[int, AttributePositions],
    total_tokens: int,
) -> Group:
    """A pair's group for the replay: each token's coefficient c, with L_GRPO = Σ c log π, and the tokens whose
    attention L_KL needs."""
    lengths = [len(completion) for completion in pair.completions]
    coefficients = token_coefficients(pair.advantages, lengths, total_tokens).split(lengths)
    if pair.credit is not None:
        scale = t.config.rollout.credit_weight / total_tokens
        add_attribute_credit(coefficients, pair.credit, attribute_positions, t.supervisor.prompt.attributes, scale)
    return Group(pair.completions, coefficients, {g: flat_positions(items) for g, items in target_positions.items()})


def policy_gradient(t: Training, buffer: list[Pair], leaves: VisualFeatures, groups: list[Group]) -> ReplayResult:
    """Replays the buffer, and adds the gradient of λ_lm L_GRPO: through the frozen language model into the features,
    then through the tower. With λ_lm = 0 the replay alone is left, whose attention L_KL needs."""
    weight = t.config.lambda_.lm * t.supervisor_weight
    for leaf in leaves.levels:
        leaf.requires_grad_(weight > 0)

    def replay_within(token_budget: int) -> ReplayResult:
        for leaf in leaves.levels:
            leaf.grad = None
        return t.supervisor.replay(leaves, groups, token_budget)

    prefix = len(t.supervisor.prefix)
    packed = sum(prefix + sum(map(len, pair.completions)) for pair in buffer)
    result = t.oom.run("replay", min(packed, t.supervisor.plan.token_budget), replay_within, minimum=prefix)
    if weight > 0:
        # An image may be in several pairs: it goes through the tower once, with the sum of their gradients.
        image_ids, image = torch.cat([pair.images for pair in buffer]).unique(return_inverse=True)
        first = torch.stack([(image == i).nonzero()[0, 0] for i in range(len(image_ids))])
        pixels = torch.cat([pair.pixels for pair in buffer])[first].to(t.device)
        level_gradients = [
            gradient.new_zeros(len(pixels), *gradient.shape[1:]).index_add_(0, image.to(t.device), weight * gradient)
            for gradient in result.gradients
        ]

        def backward_rows(rows: slice) -> None:
            with gradients_all_or_none(list(t.encoder.tower.parameters())):
                torch.autograd.backward(t.visual_levels(pixels[rows]), [level[rows] for level in level_gradients])

        t.oom.map_chunks("encode", len(pixels), backward_rows)
    return result


def align_attention(
    t: Training,
    tokens: Tensor,
    attention: list[AnchorAttention],
    target_positions: list[dict[int, AttributePositions]],
    rewarded: int,
) -> float:
    """Adds the gradient of λ_kl L_KL to the pooler: each query's attention follows the supervisor's attention from the
    tokens of that query's attribute. rewarded: number of rollouts in the mean. Returns this rank's share of L_KL."""
    with t.autocast():
        beta = t.encoder.pooler.attention(tokens.detach())  # (images, queries, N)
    queries, names = beta.shape[1], t.supervisor.prompt.attributes
    targets = []
    for entry in attention:
        positions = target_positions[entry.group][entry.rollout][entry.image]
        # The paper's pooler has one query, which learns from all attributes.
        query = [names.index(name) if queries > 1 else 0 for name, said in positions.items() for _ in said]
        targets.append(attention_targets(entry.weights, torch.tensor(query, device=beta.device), queries))
    beta = beta[[2 * entry.group + entry.image for entry in attention]]
    # A rewarded rollout has two images: their divergences are added, and rollouts averaged.
    loss = alignment_kl(torch.stack(targets), beta).sum() / rewarded
    (t.config.lambda_.kl * t.supervisor_weight * loss).backward()
    return loss.item()


def take_gradients(parameters: Sequence[nn.Parameter], count: int = 1) -> list[Tensor | None]:
    """The parameters' gradients, summed over the ranks and divided by `count`; sets `.grad` to None."""
    distributed.all_reduce_gradients(parameters)
    taken = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return [gradient if gradient is None or count == 1 else gradient.div_(count) for gradient in taken]


def combine_gradients(t: Training, dml: list[Tensor | None], supervisor: list[Tensor | None]) -> dict[str, float]:
    """Sets `.grad` to the sum of both terms' gradients; with `lambda.adaptive` the policy gradient is scaled first.
    Returns norms, and cosines: DML with GRPO in the tower, DML with L_KL in the pooler."""
    log: dict[str, float] = {}
    tower = {id(parameter) for parameter in t.encoder.tower.parameters()}
    pooler = {id(parameter) for parameter in t.encoder.pooler.parameters()}
    scale = 1.0
    for part, other, owned in (("tower", "lm", tower), ("pooler", "kl", pooler)):
        pairs = [(a, b) for p, a, b in zip(t.parameters, dml, supervisor) if id(p) in owned]
        if all(b is None for _, b in pairs):
            continue
        norm_dml, norm_other, product = norms_and_dot(pairs)
        log[f"grad_{part}_dml"], log[f"grad_{part}_{other}"] = norm_dml, norm_other
        log[f"cosine_{part}_dml_{other}"] = product / (norm_dml * norm_other) if norm_dml * norm_other else 0.0
        if part == "tower" and t.config.lambda_.adaptive:
            # λ_lm and the supervisor's weight are in the gradient already; as the weight changes from step to step, the
            # running mean is of the norm without them.
            weight = t.config.lambda_.lm * t.supervisor_weight
            log["scale_lm"] = scale = t.balance.scale(norm_dml, norm_other / weight)
    for parameter, a, b in zip(t.parameters, dml, supervisor):
        if b is not None and id(parameter) in tower and scale != 1:
            b = b.mul_(scale)
        parameter.grad = b if a is None else a if b is None else a.add_(b)
    if t.config.lambda_.adaptive and t.balance.informedness is not None:
        log |= {"informedness": t.balance.informedness, "voice": t.supervisor_weight}
    return log


def norms_and_dot(pairs: Sequence[tuple[Tensor | None, Tensor | None]]) -> tuple[float, float, float]:
    """|a|, |b| and a·b of two lists of gradients, fp64; None counts as zero. One parameter at a time, as a copy of all
    of them may not fit."""
    zero = torch.zeros((), dtype=torch.float64)

    def dot(x: Tensor | None, y: Tensor | None) -> Tensor:
        return zero if x is None or y is None else torch.linalg.vecdot(x.flatten(), y.flatten()).double()

    sums = [torch.stack([dot(a, a), dot(b, b), dot(a, b)]) for a, b in pairs]
    aa, bb, ab = torch.stack([s.cpu() for s in sums]).sum(0).tolist()
    return math.sqrt(aa), math.sqrt(bb), ab


def set_up(config: Config, out: Path, resume: bool) -> tuple[Training, Run, tuple[PixelLoader | None, PixelLoader]]:
    """The models and data of a run, its folder, and the images of validation (or None) and test. Raises InputError for
    a configuration that cannot be run, before the folder is made."""
    torch.manual_seed(config.seed ^ config.seed >> 32)  # all 64 bits, as a CPU generator takes only the lower 32
    device = distributed.device()
    bf16 = config.optim.precision == "bf16"
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)

    # Prompt: a resumed run keeps its own, whatever is in the prompt's file now.
    prompt = None
    if config.uses_prompt:
        prompt = stored_prompt(out / "config.json") if resume else load_prompt(config.supervisor.prompt)

    # Data, split by class: no class of the test half is ever trained on.
    train_images, test_images = load_images(config.data, config.data.image_size)
    validation_images = None
    if config.log.evaluate_every:
        train_images, validation_images = train_images.hold_out()
    contents = "".join(checksum(half.dataset, lambda path: path.name) for half in (train_images, test_images))
    batch = config.data.classes_per_batch, config.data.images_per_class
    sampler = ClassBalancedSampler(train_images.labels.tolist(), *batch, config.seed, contents)
    steps = config.optim.steps or config.optim.epochs * sampler.batches_per_epoch

    # Model: the MLLM's tower becomes the encoder's, its language model the frozen supervisor; or a tower alone. A
    # resumed run reads its encoder from its own folder, so the tower's folder need not exist any more.
    kept = stored_encoder(config, out, prompt) if resume else None
    mllm = None
    if config.uses_supervisor or (config.encoder.tower is None and kept is None):
        pretrained = read_pretrained(SUPERVISOR if config.supervisor.model == TINY else config.supervisor.model)
        if prompt and config.uses_supervisor:
            check_prompt(config, pretrained.mllm, prompt)
        dtype = torch.bfloat16 if bf16 else torch.float32
        mllm = load_mllm(pretrained, config.supervisor.quantize, dtype, str(device), config.supervisor.quantize_head)
    encoder = (make_encoder(config, mllm, prompt) if kept is None else kept).to(device)
    supervisor = None
    if mllm and prompt and config.uses_supervisor:
        supervisor = make_supervisor(config, mllm, encoder, prompt)
    settings = {}
    if config.dml.loss == "potential-field":
        settings = dict(alpha=config.dml.alpha, delta=config.dml.delta, proxies_per_class=config.dml.proxies_per_class)
    classes = len(train_images.dataset.classes)
    dml = metric_loss(config.dml.loss, classes, config.encoder.embedding_dim, **settings).to(device)
    del mllm
    config = plan_memory(config, supervisor, encoder, dml, resume)
    if config.encoder.checkpointing:
        encoder.tower.checkpoint_blocks()

    optimizer = make_optimizer(config, encoder, dml)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps, config.optim.warmup)
    )

    t = Training(config, encoder, supervisor, dml, optimizer, schedule, autocast)
    t.supervisor_sha256 = supervisor.decoder.fingerprint() if supervisor else None
    state = State(encoder, dml, optimizer, schedule, sampler, t.balance, t.readings)
    run = Run(out, config, state, steps)
    if resume:
        run.restore(t.supervisor_sha256)
    else:
        embeddings = embed_images(encoder.eval(), test_images)
        run.begin(score(embeddings, test_images.labels), neighbours(embeddings), prompt, t.supervisor_sha256)
    distributed.assert_in_sync(encoder, dml)
    augmentation = Augmentation(**dataclasses.asdict(config.augment))
    t.batches = augmented(train_images.stream(sampler), augmentation, config.seed, run.batches)
    return t, run, (validation_images, test_images)


def make_encoder(config: Config, mllm: Mllm | None, prompt: Prompt | None) -> Encoder:
    """The encoder to train, around a copy of the MLLM's own vision model or a separate one."""
    visual = mllm.visual if mllm else load_tower(str(config.encoder.tower))
    return Encoder.from_tower(visual, *encoder_shape(config, prompt))


def encoder_shape(config: Config, prompt: Prompt | None) -> tuple[str, int, int, tuple[str, ...]]:
    """The arguments of `Encoder` after its tower."""
    attributes = prompt.attributes if prompt and config.encoder.pooler == "attributes" else ()
    return config.encoder.pooler, config.encoder.embedding_dim, config.data.image_size, attributes


def stored_encoder(config: Config, out: Path, prompt: Prompt | None) -> Encoder | None:
    """An encoder with the configuration of the run in `out`, whose weights are in its checkpoint; None where an earlier
    version wrote the run, without the tower's configuration. Raises InputError for a malformed one."""
    if (tower := record_of(out).get("tower")) is None:
        return None
    try:
        return Encoder(tower, *encoder_shape(config, prompt))
    except Exception as error:  # of any type: the libraries' configurations check their fields
        cause = f"tower: not the configuration of one ({first_line(error)})"
        raise InputError(
            f"{str(out / 'config.json')!r}: {cause}; restore the file, or start a new run with another --out"
        ) from error


def sampling_of(config: Config) -> Sampling:
    rollout = config.rollout
    return Sampling(rollout.group_size, rollout.temperature, rollout.top_p, rollout.max_new_tokens, config.seed)


def check_prompt(config: Config, mllm: Mllm, prompt: Prompt) -> None:
    """Raises InputError, before any weight is read, for a prompt that does not suit the model. mllm: on the meta
    device, see `Pretrained`."""
    used_prompt = prompt.as_generic() if config.supervisor.generic else prompt
    grid = tower_of(mllm.visual).grid(config.data.image_size, config.data.image_size)
    prefix, _ = prompt_prefix(mllm, used_prompt, config.supervisor.order, grid, sampling_of(config))
    anchor_layer_index(config.supervisor.anchor_layer, mllm.decoder.depth)
    if config.reads_attributes:  # raises for a tokenizer whose tokens cannot be traced to attributes
        tokens_by_attribute(prefix.input_ids, mllm.tokenizer, used_prompt)


def make_supervisor(config: Config, mllm: Mllm, encoder: Encoder, prompt: Prompt) -> Supervisor:
    """The MLLM's language model with its prompt; prints the lengths of prompt and answer."""
    supervisor = Supervisor(
        mllm,
        prompt.as_generic() if config.supervisor.generic else prompt,
        config.supervisor.order,
        encoder.tower.grid(config.data.image_size, config.data.image_size),
        sampling_of(config),
        config.supervisor.anchor_layer,
    )
    lengths = measure(supervisor)
    if distributed.rank() == 0:
        print(lengths.line(config.rollout.max_new_tokens))
        if shortage := lengths.shortage(config.rollout.max_new_tokens):
            warnings.warn(shortage, stacklevel=2)
    return supervisor


def plan_memory(
    config: Config, supervisor: Supervisor | None, encoder: Encoder, dml: nn.Module, resume: bool
) -> Config:
    """Sets and prints the supervisor's fastest memory plan. Returns the configuration with that plan, which a resumed
    run keeps where it fits. Raises InputError, with the numbers, where a step does not fit."""
    ranks, rollout = distributed.world_size(), config.rollout
    batch = config.data.classes_per_batch * config.data.images_per_class
    step = Step(
        encoder,
        SupervisorParts.of(supervisor) if supervisor else None,
        batch=-(-batch // ranks),
        pairs=-(-rollout.pairs // ranks),
        trained=dml,
        states_bits=8 if config.optim.states == "8bit" else 32,
        checkpointing=config.encoder.checkpointing,
        autocast=config.optim.precision == "bf16",
        embeds=config.lambda_.dml > 0,
    )
    predictor, free = Predictor(step), free_bytes(encoder.device)
    if supervisor is None:
        footprint = predictor.fit(free)
    else:
        supervisor.plan, supervisor.slots, footprint = predictor.choose(free, FixedPlan.of(config), may_replan=resume)
        plan = dataclasses.asdict(supervisor.plan)
        settings = dataclasses.replace(config.supervisor, resident="on" if plan.pop("resident") else "off")
        rollout = dataclasses.replace(rollout, slots=supervisor.slots, **plan)
        config = dataclasses.replace(config, rollout=rollout, supervisor=settings)
        if supervisor.plan.resident:
            supervisor.decoder.reside()
    if distributed.rank() == 0:
        print(f"memory of a step, {free / GIB:.1f} GiB are free\n{footprint.table()}")
        if supervisor:
            print(f"{supervisor.slots} pairs roll out at once; replay with {supervisor.plan}")
    return config


def make_optimizer(config: Config, encoder: Encoder, dml: nn.Module) -> torch.optim.Optimizer:
    """AdamW, with a learning rate each for the tower, the pooler and the proxies of the metric loss."""
    groups = [
        {"params": list(encoder.tower.parameters()), "lr": config.optim.encoder_lr},
        {"params": list(encoder.pooler.parameters()), "lr": config.optim.pooler_lr},
        {"params": list(dml.parameters()), "lr": config.optim.proxy_lr, "weight_decay": 0.0},
    ]
    adamw: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
    if config.optim.states == "8bit":
        from bitsandbytes.optim import AdamW8bit  # seconds to import

        adamw = AdamW8bit
    return adamw([group for group in groups if group["params"]], weight_decay=config.optim.weight_decay)


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over the share `warmup` of the steps, then a cosine to zero."""
    warmup_steps = max(1, round(warmup * steps))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def main() -> None:
    with exit_on_input_error(), distributed.process_group():
        config, out, resume = parse(sys.argv[1:])
        first_rank = distributed.rank() == 0
        resume_command = shlex.join([*distributed.launcher(), "--out", str(out), "--resume"])
        try:
            final = train(config, out, resume)
        except Stopped as stopped:
            if first_rank:
                print(f"\n{stopped}; go on with\n{resume_command}")
            return
        except KeyboardInterrupt:
            if first_rank:
                print(
                    f"\ninterrupted; go on with\n{resume_command}"
                    if (out / "config.json").is_file()
                    else "\ninterrupted; nothing was saved yet"
                )
            sys.exit(130)
        except Diverged as error:
            sys.exit(f"error: {error}" if first_rank else 1)
        if first_rank:
            rows = {when: final[when] for when in ("before", "after")}
            print(f"\nRetrieval on classes never seen in training, per cent\n{table(rows)}")
            print(f"\nrun: {out}   encoder: {out / 'encoder'}   report: {out / 'report.html'}")


if __name__ == "__main__":
    main()
