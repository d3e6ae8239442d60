"""Train a retrieval encoder with SAGA: a frozen multimodal model judges pairs, its gradient teaches the encoder.

    python -m saga_fast.train [PRESET] [--out DIR] [--resume] [--section.field VALUE …]

One optimizer step has three phases. A embeds a class-balanced micro-batch and takes the metric loss's gradient. B draws
pairs from it and lets the frozen language model describe and judge each pair G times; pairs it judges both right and
wrong are kept, until there are K. C replays those with gradient: GRPO into the vision tower, attention alignment into
the pooler. Left out, as the one update per draw is on policy: importance ratio, clipping, a reference model.

A run's folder: config.json, metrics.jsonl (a line a step), final.json, encoder/, checkpoint/, report.html and what it
shows, TensorBoard events.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import bitsandbytes
import torch
from torch import Tensor, nn
from tqdm import tqdm

from saga_fast.config import TINY, Config, parse
from saga_fast.data import Augmentation, ClassBalancedSampler, augmented
from saga_fast.encoder import Encoder, VisualFeatures
from saga_fast.evaluate import embed_all, load_images, score, table
from saga_fast.losses import metric_loss
from saga_fast.losses.alignment import alignment_kl, attention_target
from saga_fast.losses.policy import token_coefficients
from saga_fast.report.samples import describe, sampled_steps, sheet
from saga_fast.retrieval.gallery import neighbours
from saga_fast.runtime import distributed
from saga_fast.runtime.health import spread
from saga_fast.runtime.memory import GIB, Predictor, Step, free_bytes
from saga_fast.runtime.oom import Encoded, Fits, gradients_all_or_none
from saga_fast.runtime.run import SELECTS, Run
from saga_fast.runtime.signals import Stopped
from saga_fast.supervisor.draw import Draw, draw_contributing, draw_pairs
from saga_fast.supervisor.lengths import measure
from saga_fast.supervisor.mllm import Mllm, load_mllm
from saga_fast.supervisor.prompt import Prompt
from saga_fast.supervisor.prompt_file import load_prompt, stored_prompt
from saga_fast.supervisor.replay import Group, Replay
from saga_fast.supervisor.rollout import Sampling
from saga_fast.supervisor.supervisor import Supervisor
from saga_fast.supervisor.verdict import attribute_tokens
from saga_fast.tiny import SUPERVISOR
from saga_fast.towers import load_tower
from saga_fast.utils.errors import exit_on_input_error

MAX_SKIPPED = 5  # steps in a row with a loss or gradient that is not finite, before the run gives up


class Diverged(RuntimeError):
    """Losses or gradients stayed non-finite; what was saved before stands."""


class Pair(NamedTuple):
    """A contributing pair, kept between roll-out and replay. pixels: uint8 (2, 3, S, S); features: of both images, as
    they were rolled out with; the rest per rollout."""

    pixels: Tensor
    features: VisualFeatures
    completions: list[list[int]]
    rewards: Tensor
    advantages: Tensor


def train(config: Config, out: Path, resume: bool = False) -> dict[str, Any]:
    """Runs (or resumes) `config` in the folder `out`; returns what final.json holds. Raises InputError, Diverged."""
    torch.manual_seed(config.seed)
    device = distributed.device()
    dtype = torch.bfloat16 if config.optim.precision == "bf16" else torch.float32
    autocast = torch.autocast(
        device.type, torch.bfloat16, enabled=config.optim.precision == "bf16", cache_enabled=False
    )

    # The question: a resumed run asks what it began with, whatever became of its file.
    prompt = None
    if config.uses_supervisor:
        prompt = stored_prompt(out / "config.json") if resume else load_prompt(config.supervisor.prompt)

    # Data, split by class: no class of the test half is ever trained on.
    train_images, test_images = load_images(config.data, config.data.image_size)
    if config.log.evaluate_every:
        train_images, validation_images = train_images.hold_out()
    sampler = ClassBalancedSampler(
        train_images.labels.tolist(), config.data.classes_per_batch, config.data.images_per_class, config.seed
    )
    steps = config.optim.steps or config.optim.epochs * sampler.batches_per_epoch

    # Model: the MLLM's tower becomes the encoder's, its language model the frozen supervisor; or a tower alone.
    mllm = None
    if config.encoder.tower is None:
        name = SUPERVISOR if config.supervisor.model == TINY else config.supervisor.model
        mllm = load_mllm(name, config.supervisor.quantize, dtype, str(device), config.supervisor.quantize_head)
    encoder = make_encoder(config, mllm).to(device)
    supervisor = make_supervisor(config, mllm, encoder, prompt) if prompt else None
    frozen = supervisor and supervisor.decoder.fingerprint()
    settings = {}
    if config.dml.loss == "potential-field":
        settings = dict(alpha=config.dml.alpha, delta=config.dml.delta, proxies_per_class=config.dml.proxies_per_class)
    classes = len(train_images.dataset.classes)
    dml = metric_loss(config.dml.loss, classes, config.encoder.embedding_dim, **settings).to(device)
    del mllm
    config = plan_memory(config, supervisor, encoder, dml)
    if config.encoder.checkpointing:
        encoder.tower.checkpoint_blocks()

    groups = [
        {"params": list(encoder.tower.parameters()), "lr": config.optim.encoder_lr},
        {"params": list(encoder.pooler.parameters()), "lr": config.optim.pooler_lr},
        {"params": list(dml.parameters()), "lr": config.optim.proxy_lr, "weight_decay": 0.0},
    ]
    adamw = bitsandbytes.optim.AdamW8bit if config.optim.states == "8bit" else torch.optim.AdamW
    optimizer = adamw([g for g in groups if g["params"]], weight_decay=config.optim.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps, config.optim.warmup)
    )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    run = Run(out, config, encoder, dml, optimizer, schedule, sampler)
    if resume:
        run.restore()
    else:
        embeddings = embed_all(encoder.eval(), test_images)
        run.begin(score(embeddings, test_images.labels), neighbours(embeddings), prompt)
    distributed.check_alike(encoder, dml)
    fits = Fits()
    encoder.train()
    augmentation = Augmentation(**dataclasses.asdict(config.augment))
    batches = augmented(train_images.stream(sampler), augmentation, config.seed, run.batches)
    sampled = sampled_steps(steps, config.log.samples_every)
    progress = tqdm(
        range(run.step, steps),
        "training",
        steps,
        initial=run.step,
        unit="step",
        dynamic_ncols=True,
        disable=distributed.rank() > 0,
    )

    for step in run.steps(progress):
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        buffer: list[Pair] = []
        draw, used = Draw(), 0
        loss_dml = torch.zeros((), device=device)
        while True:
            # ── A. Embed ────────────────────────────────────────────────────────────────────────────────────────────
            batch = next(batches)
            used += 1
            pixels, labels = batch.pixels.to(device), batch.labels.to(device)
            mine = pixels[distributed.rows(len(pixels))]
            embedded = Encoded(fits, "embed", partial(embed, encoder, autocast), mine, list(encoder.parameters()))
            embeddings, *features = embedded.outputs
            # Every rank takes the loss of the whole batch, and a share of it: gradients of all ranks are added up.
            embeddings = distributed.gather(embeddings, len(pixels))
            batch_loss = dml(embeddings, labels)
            if config.lambda_.dml > 0:
                (config.lambda_.dml * batch_loss / distributed.ranks()).backward()
                embedded.backward()
            loss_dml += batch_loss.detach()
            if supervisor is None:
                break

            # ── B. Roll out, no gradient ────────────────────────────────────────────────────────────────────────────
            wanted = config.rollout.pairs - len(buffer)
            features = VisualFeatures.of(features).detach().map(partial(distributed.gather, count=len(pixels)))
            buffer += roll_out(config, supervisor, features, pixels, labels, step, wanted, draw, run, fits)
            if len(buffer) >= config.rollout.pairs or used == config.rollout.max_batches:
                break
        # The metric loss is a mean over all micro-batches of the step, and how many there are is known only now.
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad /= used
        log = {
            "loss_dml": loss_dml.item() / used,
            "micro_batches": used,
            **spread(embeddings.detach()),
            **draw.summary(),
        }
        rolled_out = time.perf_counter()

        # ── C. Replay, with gradient ────────────────────────────────────────────────────────────────────────────────
        measured = step % config.log.gradients_every == 0
        gradient_dml = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters if measured]
        if measured:
            distributed.add_up(gradient_dml)
            gradient_dml = [gradient.cpu() for gradient in gradient_dml]  # replay has need of the device's memory
        if buffer:
            log |= replay(config, supervisor, encoder, buffer, autocast, fits)
        distributed.add_up_gradients(parameters)
        if measured:
            log |= gradient_terms(encoder, parameters, gradient_dml)

        if buffer and step in sampled and distributed.rank() == 0:
            run.sample(step, describe(supervisor, encoder, buffer, autocast), sheet(buffer))

        # ── Update ──────────────────────────────────────────────────────────────────────────────────────────────────
        norm = nn.utils.clip_grad_norm_(parameters, config.optim.clip).item()
        losses = [value for name, value in log.items() if name.startswith("loss_")]
        finite = all(map(math.isfinite, [norm, *losses]))
        if finite:
            optimizer.step()
        log |= {**fits.log(), "grad_norm": norm, "lr": optimizer.param_groups[0]["lr"]}
        schedule.step()
        run.skipped_in_a_row = 0 if finite else run.skipped_in_a_row + 1
        run.skipped += not finite

        log |= {
            "pairs_replayed": len(buffer),
            "skipped": run.skipped,
            "skipped_now": run.skipped_in_a_row,
            "seconds_embed_and_roll_out": rolled_out - started,
            "seconds_replay_and_update": time.perf_counter() - rolled_out,
        }
        if config.log.evaluate_every and (step + 1) % config.log.evaluate_every == 0:
            held_out = embed_all(encoder.eval(), validation_images)
            log[SELECTS] = score(held_out, validation_images.labels)["recall_at_1"]
            encoder.train()
        run.record(step, used, log)
        shown = {"dml": "loss_dml", "lm": "loss_lm", "kl": "loss_kl", "reward": "reward"}
        progress.set_postfix(
            {short: f"{log[name]:.3g}" for short, name in shown.items() if name in log}
            | {"pairs": f"{len(buffer)}/{len(draw.pairs)}"}
        )
        if run.skipped_in_a_row == MAX_SKIPPED:
            raise Diverged(
                f"{MAX_SKIPPED} steps in a row were not finite (step {step}); the last checkpoint stands: "
                "lower the learning rates"
            )

    if supervisor and supervisor.decoder.fingerprint() != frozen:
        raise RuntimeError("the supervisor's weights changed during the run: it was not frozen")
    run.take_best()
    embeddings = embed_all(encoder.eval(), test_images)
    after = score(embeddings, test_images.labels)
    return run.finish(after, frozen, test_images, neighbours(embeddings))


def make_encoder(config: Config, mllm: Mllm | None) -> Encoder:
    """The encoder to train, around the tower that the configuration names, or, where it names none, the MLLM's own."""
    visual = mllm.visual if config.encoder.tower is None else load_tower(config.encoder.tower)
    return Encoder.from_tower(visual, config.encoder.pooler, config.encoder.embedding_dim, config.data.image_size)


def make_supervisor(config: Config, mllm: Mllm, encoder: Encoder, prompt: Prompt) -> Supervisor:
    rollout = config.rollout
    supervisor = Supervisor(
        mllm,
        prompt.as_generic() if config.supervisor.generic else prompt,
        config.supervisor.order,
        encoder.tower.grid(config.data.image_size, config.data.image_size),
        Sampling(rollout.group_size, rollout.temperature, rollout.top_p, rollout.max_new_tokens, config.seed),
        config.supervisor.anchor_layer,
    )
    if config.lambda_.kl > 0:  # a tokenizer whose tokens cannot be traced to attributes is refused now, not mid-run
        attribute_tokens(supervisor.prefix.input_ids.tolist(), supervisor.tokenizer, supervisor.prompt)
    lengths = measure(supervisor)
    if distributed.rank() == 0:
        print(lengths.line(rollout.max_new_tokens))
        if shortage := lengths.shortage(rollout.max_new_tokens):
            warnings.warn(shortage, stacklevel=2)
    return supervisor


def plan_memory(config: Config, supervisor: Supervisor | None, encoder: Encoder, dml: nn.Module) -> Config:
    """Has the supervisor make the most of the memory that is free, and says how; the configuration with that in it, so
    that a resumed run does the same. Raises InputError, with the numbers, where a step does not fit."""
    ranks, rollout = distributed.ranks(), config.rollout
    batch = config.data.classes_per_batch * config.data.images_per_class
    step = Step(
        encoder,
        supervisor and supervisor.decoder,
        supervisor and supervisor.prefix,
        supervisor and supervisor.sampling,
        -(-batch // ranks),
        -(-rollout.pairs // ranks),
        dml,
        8 if config.optim.states == "8bit" else 32,
        config.encoder.checkpointing,
        config.optim.precision == "bf16",
    )
    predictor, free = Predictor(step), free_bytes(next(encoder.parameters()).device)
    if supervisor is None:
        footprint = predictor.fit(free)
    else:
        chosen = rollout.token_budget, rollout.recompute, rollout.prefix_recompute, rollout.slots
        supervisor.plan, supervisor.slots, footprint = predictor.choose(free, *chosen)
        plan = dataclasses.asdict(supervisor.plan)
        config = dataclasses.replace(config, rollout=dataclasses.replace(rollout, slots=supervisor.slots, **plan))
    if distributed.rank() == 0:
        print(f"memory of a step, {free / GIB:.1f} GiB are there\n{footprint.table()}")
        if supervisor:
            print(f"{supervisor.slots} pairs roll out at once; {supervisor.plan}")
    return config


def roll_out(
    config: Config,
    supervisor: Supervisor,
    features: VisualFeatures,
    pixels: Tensor,
    labels: Tensor,
    step: int,
    wanted: int,
    draw: Draw,
    run: Run,
    fits: Fits,
) -> list[Pair]:
    """Rolls out pairs of one micro-batch, in turn of one class and of two, until `wanted` contribute; returns those."""
    pairs = draw_pairs(labels, config.rollout.pairs_per_batch, (config.seed << 40) + (step << 20) + len(draw.pairs))
    same = (labels[pairs[:, 0]] == labels[pairs[:, 1]]).tolist()
    first_id = (step << 20) + len(draw.pairs)
    found = draw_contributing(supervisor, features, pairs, same, first_id, wanted, run.contribution_rate, fits)
    draw.extend(found)
    run.drawn, run.contributing = run.drawn + len(found.pairs), run.contributing + found.contributing
    return [
        Pair(pixels[images], features.select(images), pair.completions, pair.rewards, pair.advantages)
        for images, pair in zip(pairs, found.pairs)
        if pair.contributes
    ]


def encode(encoder: Encoder, autocast, pixels: Tensor) -> list[Tensor]:
    """The levels that the language model reads of `pixels`."""
    with autocast:
        features = encoder.tower(pixels)
    return list(features.levels)


def embed(encoder: Encoder, autocast, pixels: Tensor) -> list[Tensor]:
    """The embeddings of `pixels`, and those levels."""
    levels = encode(encoder, autocast, pixels)
    with autocast:
        return [encoder.pooler(levels[0]), *levels]


def replay(
    config: Config, supervisor: Supervisor, encoder: Encoder, buffer: list[Pair], autocast, fits: Fits
) -> dict[str, float]:
    """Adds the gradients of λ_lm L_GRPO (into the tower) and λ_kl L_KL (into the pooler) of this rank's share of the
    buffered pairs. |T| and the mean of L_KL are of the whole buffer, and so are the figures returned."""
    tokens = [sum(map(len, pair.completions)) for pair in buffer]
    packed = [len(supervisor.prefix) + count for count in tokens]
    shares = distributed.balance(packed, distributed.ranks())
    mine = [buffer[i] for i in shares[distributed.rank()]]
    described = [supervisor.described(pair.completions, pair.rewards) if config.lambda_.kl > 0 else {} for pair in mine]
    rewarded = sum(distributed.everyone(sum(map(len, described))))
    losses = replay_share(config, supervisor, encoder, mine, described, sum(tokens), rewarded, autocast, fits)
    loss_lm, loss_kl = map(sum, zip(*distributed.everyone(losses)))
    loads = [sum(packed[i] for i in share) for share in shares]
    log = {"loss_lm": loss_lm, "idle_share": 1 - sum(loads) / len(loads) / max(loads)}
    return log | ({"loss_kl": loss_kl} if rewarded else {})


def replay_share(
    config: Config,
    supervisor: Supervisor,
    encoder: Encoder,
    buffer: list[Pair],
    described: list[dict],
    total_tokens: int,
    rewarded: int,
    autocast,
    fits: Fits,
) -> tuple[float, float]:
    """Backward of the part that these pairs have in (L_GRPO, L_KL), whose denominators are the last two numbers."""
    if not buffer:
        return 0.0, 0.0
    weight = config.lambda_
    # The features that the pairs were rolled out with: no weight has changed since.
    leaves = VisualFeatures.of([torch.cat(level) for level in zip(*(pair.features.levels for pair in buffer))])
    for leaf in leaves.levels:
        leaf.requires_grad_(weight.lm > 0)

    groups = []
    for pair, spans in zip(buffer, described):
        lengths = [len(completion) for completion in pair.completions]
        coefficients = token_coefficients(pair.advantages, lengths, total_tokens).split(lengths)
        groups.append(Group(pair.completions, coefficients, spans))

    def replay_within(token_budget: int) -> Replay:
        for leaf in leaves.levels:
            leaf.grad = None
        return supervisor.replay(leaves, groups, token_budget)

    prefix = len(supervisor.prefix)
    packed = sum(prefix + sum(map(len, pair.completions)) for pair in buffer)
    result = fits.run("replay", min(packed, supervisor.plan.token_budget), replay_within, least=prefix)
    if weight.lm > 0:
        # An image may be in several pairs: it goes through the tower once, with the gradient of all.
        pixels, image = distinct(torch.cat([pair.pixels for pair in buffer]))
        asked = [
            leaf.new_zeros(len(pixels), *leaf.shape[1:]).index_put_((image,), weight.lm * leaf.grad, accumulate=True)
            for leaf in leaves.levels
        ]

        def back(rows: slice) -> None:
            with gradients_all_or_none(list(encoder.tower.parameters())):
                torch.autograd.backward(encode(encoder, autocast, pixels[rows]), [level[rows] for level in asked])

        fits.pieces("encode", len(pixels), back)
    if not result.attention:
        return result.loss.item(), 0.0
    targets = torch.stack([attention_target(entry.weights) for entry in result.attention])
    with autocast:
        beta = encoder.pooler.attention(leaves.tokens.detach())
    beta = beta[[2 * entry.group + entry.image for entry in result.attention]]
    # Two images a rewarded rollout: their divergences add up, rollouts are averaged.
    loss_kl = alignment_kl(targets, beta).sum() / rewarded
    (weight.kl * loss_kl).backward()
    return result.loss.item(), loss_kl.item()


def distinct(images: Tensor) -> tuple[Tensor, Tensor]:
    """The different ones among uint8 images (n, 3, S, S), in the order of their bytes, and which of them each is (n,).

    On the host: for a GPU, whose threads would compare whole images one by one, `torch.unique` takes seconds.
    """
    contents = [image.numpy().tobytes() for image in images.cpu()]
    order = {content: i for i, content in enumerate(sorted(set(contents)))}
    image = torch.tensor([order[content] for content in contents])
    first = torch.tensor([contents.index(content) for content in order])
    return images[first.to(images.device)], image.to(images.device)


def gradient_terms(encoder: Encoder, parameters: list[nn.Parameter], gradient_dml: list[Tensor]) -> dict[str, float]:
    """Norms of the terms' gradients, and cosines: DML with GRPO in the tower, DML with L_KL in the pooler."""
    terms = {}
    for part, other, owned in (("tower", "lm", encoder.tower), ("pooler", "kl", encoder.pooler)):
        mine = {id(parameter) for parameter in owned.parameters()}
        pairs = [(p.grad, g) for p, g in zip(parameters, gradient_dml) if id(p) in mine and p.grad is not None]
        if not pairs:
            continue
        # A parameter at a time: of all gradients together another copy would not fit everywhere.
        products = torch.stack([_products(g := dml.to(total.device), total - g) for total, dml in pairs]).sum(0)
        dml, rest, both = products.tolist()
        terms[f"grad_{part}_dml"], terms[f"grad_{part}_{other}"] = math.sqrt(dml), math.sqrt(rest)
        terms[f"cosine_{part}_dml_{other}"] = both / math.sqrt(dml * rest) if dml * rest > 0 else 0.0
    return terms


def _products(a: Tensor, b: Tensor) -> Tensor:
    """(3,) fp64: a·a, b·b and a·b."""
    pairs = (a, a), (b, b), (a, b)
    return torch.stack([torch.linalg.vecdot(x.flatten(), y.flatten()).double() for x, y in pairs])


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over the first share of the steps, then a cosine to zero."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def main() -> None:
    with exit_on_input_error(), distributed.process_group():
        config, out, resume = parse(sys.argv[1:], distributed.restarted())
        speaks = distributed.rank() == 0
        again = shlex.join([*distributed.launcher(), "--out", str(out), "--resume"])
        try:
            final = train(config, out, resume)
        except Stopped as stopped:
            if speaks:
                print(f"\n{stopped}; go on with\n{again}")
            return
        except KeyboardInterrupt:
            if speaks:
                print(f"\ninterrupted; go on with\n{again}" if out.exists() else "\ninterrupted; nothing was saved yet")
            sys.exit(130)
        except Diverged as error:
            sys.exit(f"error: {error}" if speaks else 1)
        if speaks:
            rows = {when: final[when] for when in ("before", "after")}
            print(f"\nRetrieval on classes never seen in training, per cent\n{table(rows)}")
            print(f"\nrun: {out}   encoder: {out / 'encoder'}   report: {out / 'report.html'}")


if __name__ == "__main__":
    main()
