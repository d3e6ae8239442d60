"""A run's configuration: one dataclass per component, the paper's settings as defaults, presets by name.

python -m saga_fast.train [PRESET] [--out DIR] [--resume] [--section.field VALUE …]
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from saga_fast.utils.errors import InputError
from saga_fast.utils.files import expect_replaceable, read_regular
from saga_fast.utils.flags import COUNT, SEED, WEIGHT, WORKERS, Range, check_ranges, fields_of, from_dict, parse_flags

RESUMABLE = "a resumed run may change this: no result depends on it"


@dataclass(frozen=True)
class DataConfig:
    name: str = "folder"
    """The data set: drawn-birds, cub, cars, aircraft, inat-aves, folder."""
    root: Annotated[Path | None, RESUMABLE] = None
    """Folder of the images; drawn-birds needs none. `folder` also takes a list (.csv, .jsonl) of path, label, split."""
    image_size: Annotated[int, Range(1, 8192)] = 224
    """Side in pixels that images are resized to."""
    classes_per_batch: Annotated[int, Range(2, 2**16, why="one class has no other to differ from")] = 16
    images_per_class: Annotated[int, Range(1, 2**16)] = 4
    skip_unreadable: bool = False
    """Skip and count images that cannot be read, instead of stopping at the first."""
    workers: Annotated[int | None, WORKERS, RESUMABLE] = None
    """Worker processes that decode images, 0 for none; default one per core, up to 8, and none for drawn birds."""
    train_classes: Annotated[int | None, COUNT] = None
    """Train on only this many classes, the first of the training half; default all."""
    species: Annotated[int, Range(4, 10**6)] = 100
    """drawn-birds: number of species, half of them for training."""
    images_per_species: Annotated[int, Range(2, 10**6)] = 30
    """drawn-birds: number of images per species."""
    seed: Annotated[int, SEED] = 0
    """drawn-birds: another seed draws other species and other pictures."""
    nuisance: Literal["easy", "moderate", "benchmark", "hard"] = "benchmark"
    """drawn-birds: how much the pictures differ from those that the tiny supervisor was trained on."""


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of training images."""

    least_area: Annotated[float, Range(0, 1, above=True)] = 1.0
    """Random resized crops that keep at least this share of an image's area; 1 for whole images."""
    flip: bool = False
    """Mirror an image with probability 1/2; turn off where left and right distinguish classes."""
    light: Annotated[float, Range(0, 0.99)] = 0.0
    """Brightness, contrast and saturation are scaled by 1 - light to 1 + light; 0 where shades distinguish classes."""


@dataclass(frozen=True)
class EncoderConfig:
    tower: str | None = None
    """Vision tower, where it is not the MLLM's own: efficientnet-lite0 (1, 2), timm:NAME, or the folder or hub id of a
    vision model that transformers reads, such as DINOv2, SigLIP or CLIP. No language model reads its tokens, so the
    metric loss alone trains it."""
    pooler: Literal["attributes", "attention", "mean", "max"] = "attention"
    """attributes: a query for each of the prompt's attributes, whose blocks make the embedding; attention: the paper's
    one query."""
    embedding_dim: Annotated[int, Range(1, 2**16)] = 4096
    """D_e, the width of the embedding."""
    checkpointing: Annotated[bool, RESUMABLE] = False
    """Gradient checkpointing: keep only the inputs of the tower's blocks, and recompute each block in the backward
    pass."""
    license: Annotated[str, RESUMABLE] = "unknown"
    """The encoder's licence for its model card, as an identifier of the hub; it must suit the tower's own licence."""


@dataclass(frozen=True)
class SupervisorConfig:
    model: Annotated[str, RESUMABLE] = "Qwen/Qwen3-VL-8B-Instruct"
    """Folder or hub id of the MLLM: its vision tower is trained, its language model supervises."""
    quantize: bool = True
    """Language model in NF4 with nested absmax; False keeps it dense."""
    quantize_head: bool = False
    """Embedding and head in NF4 too; `python -m bench.quantization` measures the error of that."""
    resident: Annotated[Literal["auto", "on", "off"], RESUMABLE] = "auto"
    """Keep a dense copy of the NF4 layers in memory, for many rollouts at once and for replays; auto: on a GPU with
    enough memory, where that is faster. The policy is the same."""
    prompt: str = "birds"
    """birds, cars, aircraft, drawn-birds, or a file of your own that ends in .toml."""
    generic: bool = False
    """The prompt without role and attribute list (an ablation; has no attention target)."""
    order: Literal["images_first", "instruction_first"] = "images_first"
    anchor_layer: Annotated[int | None, Range(0, 2**16)] = None
    """Zero-based decoder layer whose attention the pooler learns from; default round(26/36 of the depth)."""


@dataclass(frozen=True)
class RolloutConfig:
    group_size: Annotated[int, Range(1, 2**16)] = 8
    """G, completions per pair."""
    pairs: Annotated[int, Range(1, 2**16)] = 8
    """K, contributing pairs per optimizer step."""
    temperature: Annotated[float, Range(0, above=True, why="greedy rollouts are all equal")] = 0.7
    top_p: Annotated[float, Range(0, 1, above=True)] = 0.95
    max_new_tokens: Annotated[int, Range(1, 2**20)] = 1024
    pairs_per_batch: Annotated[int, Range(2, 2**20, why="same-class and different-class pairs are drawn in turn")] = 64
    """Pairs drawn from one micro-batch at most, before another is embedded."""
    credit: Literal["verdict", "attributes"] = "verdict"
    """Rewards of a rollout. verdict: one, as in the paper; attributes: one more per attribute of each image, for
    agreement with what rollouts write about other images of its class."""
    credit_weight: Annotated[float, WEIGHT] = 1.0
    """Weight of the attributes' advantages beside the verdict's."""
    max_batches: Annotated[int, COUNT] = 4
    """Micro-batches per step at most; a step may then have fewer than K pairs, or none."""
    slots: Annotated[int | None, COUNT, RESUMABLE] = None
    """Pairs that roll out at once, each with memory for G rollouts; default the fastest number in free memory.
    Completions do not depend on it."""
    token_budget: Annotated[int | None, COUNT, RESUMABLE] = None
    """Packed tokens per pass of a replay; a longer group is split into slices of completions."""
    recompute: Annotated[Literal["none", "mlp", "full"] | None, RESUMABLE] = None
    """Recomputation in a replay's backward pass: none; mlp, the gate and up projections; full, all of each layer."""
    prefix_recompute: Annotated[Literal["none", "mlp", "full"] | None, RESUMABLE] = None
    """The same for the prefix of a group that is split into slices."""


@dataclass(frozen=True)
class DmlConfig:
    loss: Literal["potential-field", "proxy-anchor", "multi-similarity", "nt-xent"] = "potential-field"
    alpha: Annotated[float, Range(0, above=True)] = 3.0
    """potential-field: how fast forces decay with distance."""
    delta: Annotated[float, Range(0, 2)] = 0.2
    """potential-field: the distance below which a force vanishes."""
    proxies_per_class: Annotated[int, Range(1, 2**16)] = 15
    """potential-field: M, fewer where classes are many."""


@dataclass(frozen=True)
class LambdaConfig:
    dml: Annotated[float, WEIGHT] = 1.0
    lm: Annotated[float, WEIGHT] = 1.0
    kl: Annotated[float, WEIGHT] = 1.0
    adaptive: bool = False
    """Scale the policy gradient in the tower so that its norm is 3 lm times the metric loss's; and lower lm and kl
    where the supervisor's verdicts do not depend on the truth."""


@dataclass(frozen=True)
class OptimConfig:
    encoder_lr: Annotated[float, WEIGHT] = 2e-5
    pooler_lr: Annotated[float, WEIGHT] = 1e-4
    proxy_lr: Annotated[float, WEIGHT] = 1e-2
    """Learning rate of the metric loss's own proxies, where it has any (the paper names none)."""
    weight_decay: Annotated[float, WEIGHT] = 0.01
    epochs: Annotated[int, COUNT] = 3
    """Passes over the training set, counted in micro-batches of one step each."""
    steps: Annotated[int | None, COUNT] = None
    """Optimizer steps; overrides epochs."""
    warmup: Annotated[float, Range(0, 1)] = 0.05
    """Share of the steps with linear warm-up; cosine to zero after it."""
    clip: Annotated[float, Range(0, above=True)] = 1.0
    """Largest global gradient norm; gradients above it are scaled down."""
    states: Literal["32bit", "8bit"] = "32bit"
    """Precision of AdamW's two moments; 8bit is that of bitsandbytes, in blocks of 256."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Autocast of the encoder, and dtype of the frozen language model."""


@dataclass(frozen=True)
class LogConfig:
    checkpoint_every: Annotated[int, COUNT, RESUMABLE] = 50
    """Steps between checkpoints."""
    keep: Annotated[int, COUNT, RESUMABLE] = 2
    """Number of checkpoints to keep, the newest ones."""
    evaluate_every: Annotated[int | None, COUNT] = None
    """Steps between two validations: Recall@1 on the last tenth of the training classes, which are then held out of
    training; best/ has the encoder with the highest. The test half never selects. Default: no validation."""
    patience: Annotated[int | None, COUNT] = None
    """Validations in a row without a better Recall@1 that stop the run; encoder/ is then the best one, not the last."""
    samples_every: Annotated[int | None, COUNT, RESUMABLE] = None
    """Steps between samples of rollouts for the report; default the first step, the middle one and the last."""


@dataclass(frozen=True)
class Config:
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    encoder: EncoderConfig = EncoderConfig()
    supervisor: SupervisorConfig = SupervisorConfig()
    rollout: RolloutConfig = RolloutConfig()
    dml: DmlConfig = DmlConfig()
    lambda_: Annotated[LambdaConfig, tyro.conf.arg(name="lambda")] = LambdaConfig()
    """Weight of each loss term."""
    optim: OptimConfig = OptimConfig()
    log: LogConfig = LogConfig()
    tracker: Annotated[Literal["trackio", "wandb"] | None, RESUMABLE] = None
    """Log the run to this experiment tracker too; it must be installed."""
    seed: Annotated[int, SEED] = 0

    def __post_init__(self) -> None:
        """Raises InputError for a number out of its range, and for fields that contradict each other."""
        check_ranges(self)
        for name, value in (("lm", self.lambda_.lm), ("kl", self.lambda_.kl)):
            if self.encoder.tower is not None and value > 0:
                raise InputError(
                    f"lambda.{name}: {value} with encoder.tower {self.encoder.tower!r}, which no language model reads: "
                    f"pass --lambda.{name} 0, or --supervisor.model in place of the tower, to train the MLLM's own"
                )
        if self.supervisor.generic and self.lambda_.kl > 0:
            raise InputError(
                f"lambda.kl: {self.lambda_.kl} with supervisor.generic, whose prompt names no attributes to attend to: "
                "pass --lambda.kl 0"
            )
        if self.encoder.pooler in ("mean", "max") and self.lambda_.kl > 0:
            raise InputError(
                f"lambda.kl: {self.lambda_.kl} with encoder.pooler {self.encoder.pooler!r}, which has no attention: "
                "pass --lambda.kl 0, or --encoder.pooler attributes"
            )
        if self.supervisor.generic and self.rollout.credit == "attributes":
            raise InputError(
                "rollout.credit: attributes with supervisor.generic, whose prompt names no attributes: "
                "pass --rollout.credit verdict"
            )
        if self.rollout.group_size < 2 and self.uses_supervisor:
            raise InputError(
                f"rollout.group-size: {self.rollout.group_size}; an advantage needs at least 2 rollouts a pair"
            )
        if self.data.images_per_class < 2 and (self.uses_supervisor or self.dml.loss in PAIRWISE):
            wants = "the supervisor's pairs" if self.uses_supervisor else f"dml.loss {self.dml.loss!r}"
            raise InputError(f"data.images-per-class: 1; two images per class are needed for {wants}: give 2 or more")
        if self.rollout.pairs_per_batch * self.rollout.max_batches > 2**20:
            raise InputError(
                f"rollout.max-batches: {self.rollout.max_batches} of {self.rollout.pairs_per_batch} pairs are more "
                f"than the {2**20:,} that a step can number; give fewer"
            )

    @property
    def uses_supervisor(self) -> bool:
        return self.lambda_.lm > 0 or self.lambda_.kl > 0

    @property
    def uses_prompt(self) -> bool:
        """Whether the prompt is read: by the supervisor, or by the pooler `attributes`, for the names of its
        queries."""
        return self.uses_supervisor or self.encoder.pooler == "attributes"

    @property
    def reads_attributes(self) -> bool:
        """Whether tokens of completions are mapped to the attributes that they describe."""
        return self.lambda_.kl > 0 or self.rollout.credit == "attributes"

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as config.json holds them; the section of the λ is called `lambda`."""
        values = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        return {name.rstrip("_"): value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Any) -> Config:
        """The inverse of `to_dict`. Raises InputError for an unknown field or a value of the wrong type."""
        return from_dict(cls, values)


PAIRWISE = ("multi-similarity", "nt-xent")  # losses without proxies: each image needs another one of its class

# The embedded default's supervisor by name, which train.py resolves: config imports utils alone.
TINY = "tiny"

PRESETS: dict[str, Config] = {
    "drawn-birds": Config(
        data=DataConfig(name="drawn-birds", image_size=112),
        encoder=EncoderConfig(pooler="attributes", embedding_dim=768, license="apache-2.0"),
        supervisor=SupervisorConfig(model=TINY, prompt="drawn-birds"),
        rollout=RolloutConfig(pairs=4, max_new_tokens=192, credit="attributes", credit_weight=5.0),
        lambda_=LambdaConfig(adaptive=True),
        # On 50 species the gradient of Potential Field is a thousand times that of the other two terms.
        dml=DmlConfig(loss="multi-similarity"),
        optim=OptimConfig(encoder_lr=2e-4, pooler_lr=4e-3, steps=70, precision="fp32"),
        log=LogConfig(checkpoint_every=25),
    ),
    # The paper's configurations; the other settings are the defaults.
    "cub": Config(data=DataConfig(name="cub")),
    "cars": Config(data=DataConfig(name="cars"), supervisor=SupervisorConfig(prompt="cars")),
    "aircraft": Config(data=DataConfig(name="aircraft"), supervisor=SupervisorConfig(prompt="aircraft")),
    # Two proxies for each of 743 classes make about as many as 15 for each of CUB's 100; the cost is quadratic in them.
    "inat-aves": Config(data=DataConfig(name="inat-aves"), dml=DmlConfig(proxies_per_class=2)),
    # Chosen on held-out training classes of the emoji, see README.
    "folder": Config(
        data=DataConfig(image_size=160),
        augment=AugmentConfig(least_area=0.8),
        encoder=EncoderConfig(tower="efficientnet-lite0", pooler="max", embedding_dim=512),
        lambda_=LambdaConfig(lm=0.0, kl=0.0),
        dml=DmlConfig(loss="multi-similarity"),
        optim=OptimConfig(encoder_lr=2e-4, pooler_lr=1e-3, steps=150, precision="fp32"),
        log=LogConfig(evaluate_every=25, patience=3),
    ),
}

# Replaces the preset of that name, whose tower has no language model, where --supervisor.model is given.
SUPERVISED: dict[str, Config] = {
    "folder": Config(
        data=DataConfig(image_size=112),
        encoder=EncoderConfig(pooler="attributes", embedding_dim=768),
        supervisor=SupervisorConfig(model=TINY, prompt="drawn-birds"),
        rollout=RolloutConfig(
            max_new_tokens=192, max_batches=1, pairs_per_batch=16, credit="attributes", credit_weight=5.0
        ),
        lambda_=LambdaConfig(adaptive=True),
        dml=DmlConfig(loss="multi-similarity"),
        optim=OptimConfig(encoder_lr=2e-4, pooler_lr=1e-3, precision="fp32"),
    ),
}


class Invocation(NamedTuple):
    config: Config
    out: Path
    resume: bool


@dataclass(frozen=True)
class _Arguments(Config):
    out: Path | None = None
    """Folder of the run; default runs/PRESET."""
    resume: bool = False
    """Continue from the last checkpoint in --out, with the configuration that the run was started with."""


@dataclass(frozen=True)
class CheckArguments(Config):
    """The flags of `saga_fast.models`."""

    cards: Annotated[tuple[float, ...], Range(0, above=True)] = (8, 16, 24, 40, 80)
    """Memory sizes of GPUs, in GiB, to plan a step for."""


def parse_check(arguments: Sequence[str]) -> tuple[str, CheckArguments]:
    """Parses `check ID_OR_FOLDER FLAGS…` into the model's name and the flags. Raises InputError."""
    known = len(arguments) > 1 and arguments[0] == "check" and bool(arguments[1]) and not arguments[1].startswith("-")
    if not known and not {"-h", "--help"} & set(arguments):
        raise InputError("models: give `check`, a model's folder or hub id, then flags of saga_fast.train")
    flags = arguments[2:] if known else ["--help"]
    description = "Check whether a model works as a supervisor, and how much memory it needs."
    program = "python -m saga_fast.models check ID_OR_FOLDER"
    parsed = parse_flags(CheckArguments(), flags, program, description)  # ends the process after --help
    return arguments[1], parsed


def parse(arguments: Sequence[str], restarted: bool | None = None) -> Invocation:
    """The command line; `restarted`, by default whether torchrun did, implies --resume where there is a run already.

    Raises InputError for an unknown preset or flag, a bad value, a contradiction, a folder that may not be used.
    """
    if restarted is None:
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    arguments = list(arguments)
    named = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    preset = "drawn-birds" if named is None else named
    if preset not in PRESETS:
        raise InputError(f"preset: {preset!r} is unknown; use one of {', '.join(PRESETS)}")
    parsed = _parse(arguments, _defaults(preset, arguments))
    if parsed.tracker and not importlib.util.find_spec(parsed.tracker):
        raise InputError(
            f"--tracker: {parsed.tracker} is not installed; `pip install {parsed.tracker}`, or leave --tracker out: "
            "TensorBoard has the same curves"
        )
    out = parsed.out or Path("runs") / preset
    resume = parsed.resume or (restarted and (out / "config.json").is_file())
    if resume:
        parsed = _resumed(arguments, out, named)
    else:
        expect_new(out)
    return Invocation(_config(parsed), out, resume)


def expect_new(out: Path) -> None:
    """Raises InputError where `out` is anything but a place for a new run: no folder yet, or an empty one."""
    try:
        free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    except OSError as error:
        raise InputError(f"--out: {out} cannot be used ({error.strerror}); name another folder") from None
    if not free:
        raise InputError(f"--out: {out} exists; go on with --resume, or name a new folder")
    expect_replaceable(out, "--out")


def record_of(out: Path) -> dict[str, Any]:
    """The content of config.json of the run in `out`: `run`, its name; `config`, a `Config`'s dict; `prompt`; and more.

    Raises InputError, naming the file, for one that is missing or malformed.
    """
    file = out / "config.json"
    if not file.is_file():
        raise InputError(f"--resume: {out} holds no run (no config.json); leave --resume out, or name the run's folder")
    try:
        values = json.loads(read_regular(file, 2**22))
        if not isinstance(values["config"], dict) or not isinstance(values.get("run", ""), str):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        cause = getattr(error, "strerror", None) or "truncated, or not the file of a run"
        raise InputError(f"{str(file)!r}: {cause}; restore the file, or start a new run with another --out") from None
    return values


def stored(out: Path) -> Config:
    """The configuration of the run in `out`. Raises InputError, naming file and field."""
    values = record_of(out)["config"]
    try:
        return Config.from_dict(values)
    except InputError as error:
        file = str(out / "config.json")
        raise InputError(f"{file!r}: {error}; restore the file, or start a new run with another --out") from None


# Why a resumed run keeps a field that is not RESUMABLE, by the longest matching prefix of the field's name.
KEEP_REASONS = {
    "data": "it determines which images make which batch",
    "data.skip-unreadable": "it determines which images there are, and with them every batch",
    "augment": "it determines the pixels of training",
    "encoder": "the checkpoint's weights are of that encoder",
    "supervisor": "it determines prompt and answers",
    "rollout": "it determines rollouts and rewards",
    "dml": "the checkpoint's proxies and the gradients so far are of that loss",
    "lambda": "earlier gradients have these weights",
    "optim": "earlier updates used it",
    "optim.epochs": "earlier learning rates followed a cosine over that many",
    "optim.steps": "earlier learning rates followed a cosine over that many",
    "optim.warmup": "earlier learning rates followed it",
    "optim.states": "the checkpoint's optimizer states are of that kind",
    "log.evaluate-every": "it determines which classes are held out, and how best/ is chosen",
    "log.patience": "it determines when the run ends",
    "seed": "batches, pairs and rollouts are drawn by it",
}


def _resumed(arguments: list[str], out: Path, preset: str | None) -> _Arguments:
    """The run's stored configuration with this command line's RESUMABLE flags. Raises InputError for other changes."""
    original = stored(out)
    if preset and PRESETS[preset].data.name != original.data.name:
        raise InputError(
            f"preset: {preset!r}, but {out} is a run on {original.data.name}; leave the preset out, or correct --out"
        )
    # The stored configuration provides the defaults, so that only flags on this command line can differ from it.
    parsed = _parse(arguments, original)
    expect_same(_config(parsed), original, out)
    return parsed


def expect_same(config: Config, original: Config, out: Path) -> None:
    """Raises InputError where `config` differs from that of the run in `out` in a field that is not RESUMABLE."""
    for field, before in zip(fields_of(config), fields_of(original)):
        if field.value != before.value and RESUMABLE not in field.metadata:
            reason = KEEP_REASONS[
                max((name for name in KEEP_REASONS if f"{field.name}.".startswith(f"{name}.")), key=len)
            ]
            raise InputError(
                f"--{field.name}: {field.value}, but {out} was started with {before.value}; a resumed run keeps that, "
                f"as {reason}: leave it out, or start a new run with another --out"
            )


def _defaults(preset: str, arguments: Sequence[str]) -> Config:
    """The preset, adapted to a command line with an MLLM or with a separate tower. Raises InputError for both at
    once."""
    typed = {argument.partition("=")[0] for argument in arguments}
    supervised, own_tower = "--supervisor.model" in typed, "--encoder.tower" in typed
    if supervised and own_tower:
        raise InputError(
            "--supervisor.model: with --encoder.tower, whose tokens no language model reads; leave out the former for "
            "the metric loss alone, or the latter for the MLLM's own tower"
        )
    config = SUPERVISED.get(preset, PRESETS[preset]) if supervised else PRESETS[preset]
    return (
        dataclasses.replace(config, lambda_=dataclasses.replace(config.lambda_, lm=0.0, kl=0.0))
        if own_tower
        else config
    )


def _config(parsed: _Arguments) -> Config:
    return Config(**{section.name: getattr(parsed, section.name) for section in dataclasses.fields(Config)})


def _parse(arguments: list[str], default: Config) -> _Arguments:
    start = _Arguments(**{section.name: getattr(default, section.name) for section in dataclasses.fields(Config)})
    description = f"Train a retrieval encoder with SAGA. Presets: {', '.join(PRESETS)}."
    return parse_flags(start, arguments, "python -m saga_fast.train [PRESET]", description)
