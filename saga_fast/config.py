"""A run's configuration: one small dataclass per component, the paper's settings as defaults, presets by name.

python -m saga_fast.train [PRESET] [--out DIR] [--resume] [--section.field VALUE …]
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.util
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import tyro

from saga_fast.utils.errors import InputError

Arguments = TypeVar("Arguments")


@dataclass(frozen=True)
class DataConfig:
    name: str = "folder"
    """The data set: drawn-birds, cub, cars, aircraft, inat-aves, folder."""
    root: Path | None = None
    """Folder of the images; drawn-birds needs none."""
    image_size: int = 224
    """Side in pixels that images are resized to."""
    classes_per_batch: int = 16
    images_per_class: int = 4
    skip_unreadable: bool = False
    """Skip and count images that cannot be read, instead of stopping at the first."""
    workers: int | None = None
    """Processes that decode, 0 for none; default one a core up to 8, and none to draw birds."""
    train_classes: int | None = None
    """Train on the first so many classes of the training half only, to see what few classes can teach; default all."""
    species: int = 100
    """drawn-birds: species drawn, half of them for training."""
    images_per_species: int = 30
    """drawn-birds: images of each species."""
    seed: int = 0
    """drawn-birds: another seed draws other species and other pictures."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 0:
            raise InputError(f"data.workers: {self.workers}; give 0 or more")


@dataclass(frozen=True)
class AugmentConfig:
    """What training sees of an image; nothing else is augmented."""

    least_area: float = 1.0
    """Random resized crops that keep at least this share of an image's area; 1 for whole images."""
    flip: bool = False
    """Mirror every other image; not where left and right tell classes apart."""
    light: float = 0.0
    """Brightness, contrast and saturation times 1 - light to 1 + light; not where shades tell classes apart."""

    def __post_init__(self) -> None:
        if not 0 < self.least_area <= 1:
            raise InputError(f"augment.least-area: {self.least_area}; give a share above 0 and up to 1")
        if not 0 <= self.light < 1:
            raise InputError(f"augment.light: {self.light}; give 0 or more, and less than 1")


@dataclass(frozen=True)
class EncoderConfig:
    tower: str | None = None
    """Vision tower, where it is not the MLLM's own: efficientnet-lite0 (1, 2), timm:NAME, or the folder or hub id of a
    vision model that transformers reads, such as DINOv2, SigLIP or CLIP. No language model reads its tokens, so the
    metric loss alone trains it."""
    pooler: Literal["attention", "mean", "max"] = "attention"
    embedding_dim: int = 4096
    """D_e, the width of the embedding."""
    checkpointing: bool = False
    """Keep only the inputs of the tower's blocks for the backward pass, and run each block again there."""
    license: str = "unknown"
    """The encoder's licence as its model card states it, by the hub's identifier; the tower's own binds it."""


@dataclass(frozen=True)
class SupervisorConfig:
    model: str = "Qwen/Qwen3-VL-8B-Instruct"
    """Folder or hub id of the MLLM whose tower is trained and whose language model supervises."""
    quantize: bool = True
    """Language model in NF4 with nested absmax; False keeps it dense."""
    quantize_head: bool = False
    """Embedding and head in NF4 too; `python -m bench.quantization` says what that costs."""
    prompt: str = "birds"
    """birds, cars, aircraft, drawn-birds, or a file of your own that ends in .toml."""
    generic: bool = False
    """The prompt without role and attribute list (an ablation; has no attention target)."""
    order: Literal["images_first", "instruction_first"] = "images_first"
    anchor_layer: int | None = None
    """Zero-based decoder layer whose attention the pooler learns from; default round(26/36 of the depth)."""


@dataclass(frozen=True)
class RolloutConfig:
    group_size: int = 8
    """G, completions per pair."""
    pairs: int = 8
    """K, contributing pairs per optimizer step."""
    temperature: float = 0.7
    top_p: float = 0.95
    max_new_tokens: int = 1024
    pairs_per_batch: int = 64
    """Pairs drawn from one micro-batch at most, before another is embedded."""
    max_batches: int = 4
    """Micro-batches per step at most: the draw is bounded, and a step may go on with fewer than K pairs, or none."""
    slots: int | None = None
    """Pairs that roll out at once, each with memory for G rollouts; default what is fastest in the memory that is free.
    What is sampled does not depend on it."""
    token_budget: int | None = None
    """Packed tokens that go through a replay together; a pair's group that is longer goes in slices."""
    recompute: Literal["none", "mlp", "full"] | None = None
    """What a replay's backward computes again: nothing, gate and up of each layer, or all from each layer's input."""
    prefix_recompute: Literal["none", "mlp", "full"] | None = None
    """The same, of a prefix while its group goes in slices."""


@dataclass(frozen=True)
class DmlConfig:
    loss: Literal["potential-field", "proxy-anchor", "multi-similarity", "nt-xent"] = "potential-field"
    alpha: float = 3.0
    """potential-field: how fast forces decay with distance."""
    delta: float = 0.2
    """potential-field: the distance below which a force vanishes."""
    proxies_per_class: int = 15
    """potential-field: M, fewer where classes are many."""


@dataclass(frozen=True)
class LambdaConfig:
    dml: float = 1.0
    lm: float = 1.0
    kl: float = 1.0


@dataclass(frozen=True)
class OptimConfig:
    encoder_lr: float = 2e-5
    pooler_lr: float = 1e-4
    proxy_lr: float = 1e-2
    """Learning rate of the metric loss's own proxies, where it has any (the paper names none)."""
    weight_decay: float = 0.01
    epochs: int = 3
    """Passes over the training set, counted in micro-batches of one step each."""
    steps: int | None = None
    """Optimizer steps; overrides epochs."""
    warmup: float = 0.05
    """Share of the steps with linear warm-up; cosine to zero after it."""
    clip: float = 1.0
    """Global gradient norm."""
    states: Literal["32bit", "8bit"] = "32bit"
    """AdamW's two moments of each parameter; 8 bits are bitsandbytes', in blocks of 256."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Autocast of the encoder, and dtype of the frozen language model."""


@dataclass(frozen=True)
class LogConfig:
    checkpoint_every: int = 50
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints kept, the newest."""
    evaluate_every: int | None = None
    """Steps between two looks at Recall@1 on the last tenth of the training classes, which are then held out of
    training; best/ keeps the encoder that was best at it. The test half never selects. Default: none."""
    patience: int | None = None
    """Of those looks, how many in a row without a better one stop the run; encoder/ is then the best, not the last."""
    gradients_every: int = 10
    """Steps between measurements of each loss term's gradient norm and of the cosine between them."""
    samples_every: int | None = None
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
    tracker: Literal["trackio", "wandb"] | None = None
    """Show the run there too, if it is installed."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises InputError for fields that contradict each other."""
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
        if self.encoder.pooler != "attention" and self.lambda_.kl > 0:
            raise InputError(
                f"lambda.kl: {self.lambda_.kl} with encoder.pooler {self.encoder.pooler!r}, which has no attention: "
                "pass --lambda.kl 0, or --encoder.pooler attention"
            )
        if self.rollout.group_size < 2 and self.uses_supervisor:
            raise InputError(
                f"rollout.group-size: {self.rollout.group_size}; an advantage needs at least 2 rollouts a pair"
            )
        for name, value in (
            ("lambda.dml", self.lambda_.dml),
            ("lambda.lm", self.lambda_.lm),
            ("lambda.kl", self.lambda_.kl),
        ):
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name}: {value}; give a finite number, 0 or more")
        if not (math.isfinite(self.rollout.temperature) and self.rollout.temperature > 0):
            raise InputError(
                f"rollout.temperature: {self.rollout.temperature}; greedy rollouts are all alike: give more than 0"
            )
        if not 0 < self.rollout.top_p <= 1:
            raise InputError(f"rollout.top-p: {self.rollout.top_p}; give a number above 0 and up to 1")
        for name, count in (
            ("data.train-classes", self.data.train_classes),
            ("optim.steps", self.optim.steps),
            ("rollout.pairs", self.rollout.pairs),
            ("rollout.max-new-tokens", self.rollout.max_new_tokens),
            ("rollout.max-batches", self.rollout.max_batches),
            ("rollout.slots", self.rollout.slots),
            ("rollout.token-budget", self.rollout.token_budget),
            ("log.checkpoint-every", self.log.checkpoint_every),
            ("log.keep", self.log.keep),
            ("log.evaluate-every", self.log.evaluate_every),
            ("log.patience", self.log.patience),
            ("log.samples-every", self.log.samples_every),
            ("encoder.embedding-dim", self.encoder.embedding_dim),
        ):
            if count is not None and count < 1:
                raise InputError(f"{name}: {count}; give 1 or more")

    @property
    def uses_supervisor(self) -> bool:
        return self.lambda_.lm > 0 or self.lambda_.kl > 0

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as config.json holds them; the section of the λ is called `lambda`."""
        values = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        return {name.rstrip("_"): value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """The inverse of `to_dict`. Raises TypeError for unknown fields."""
        values = {f"{name}_" if name == "lambda" else name: value for name, value in values.items()}
        for section in dataclasses.fields(cls):
            if isinstance(values.get(section.name), dict):
                values[section.name] = type(section.default)(**values[section.name])
        if (root := values["data"].root) is not None:
            values["data"] = dataclasses.replace(values["data"], root=Path(root))
        return cls(**values)


# The embedded default's supervisor is named, not imported: config knows nothing of ours. train.py resolves it.
TINY = "tiny"

PRESETS: dict[str, Config] = {
    "drawn-birds": Config(
        data=DataConfig(name="drawn-birds", image_size=112),
        encoder=EncoderConfig(embedding_dim=192, license="apache-2.0"),
        supervisor=SupervisorConfig(model=TINY, prompt="drawn-birds"),
        rollout=RolloutConfig(max_new_tokens=192),
        # On 50 species Potential Field's gradient is a thousand times that of the other two terms.
        dml=DmlConfig(loss="multi-similarity"),
        optim=OptimConfig(encoder_lr=2e-4, pooler_lr=1e-3, steps=24, precision="fp32"),
        log=LogConfig(checkpoint_every=12, gradients_every=4),
    ),
    # The paper's configurations: what is not said is in the defaults.
    "cub": Config(data=DataConfig(name="cub")),
    "cars": Config(data=DataConfig(name="cars"), supervisor=SupervisorConfig(prompt="cars")),
    "aircraft": Config(data=DataConfig(name="aircraft"), supervisor=SupervisorConfig(prompt="aircraft")),
    # Two proxies for each of 743 classes make as many as 15 for CUB's 100; every point meets every other.
    "inat-aves": Config(data=DataConfig(name="inat-aves"), dml=DmlConfig(proxies_per_class=2)),
    # Chosen on held-out training classes of the emoji, see README.
    "folder": Config(
        data=DataConfig(image_size=160),
        augment=AugmentConfig(least_area=0.5, light=0.4),
        encoder=EncoderConfig(tower="efficientnet-lite0", pooler="max", embedding_dim=512),
        lambda_=LambdaConfig(lm=0.0, kl=0.0),
        dml=DmlConfig(loss="multi-similarity"),
        optim=OptimConfig(encoder_lr=2e-4, pooler_lr=1e-3, steps=100, precision="fp32"),
        log=LogConfig(evaluate_every=25, patience=3),
    ),
}

# What a preset whose tower stands alone is where an MLLM is named.
SUPERVISED: dict[str, Config] = {
    "folder": Config(
        data=DataConfig(image_size=112),
        encoder=EncoderConfig(embedding_dim=192),
        supervisor=SupervisorConfig(model=TINY, prompt="drawn-birds"),
        rollout=RolloutConfig(max_new_tokens=192, max_batches=1, pairs_per_batch=16),
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
    """Go on from the last checkpoint in --out, with the configuration it was started with."""


def parse(arguments: Sequence[str], restarted: bool = False) -> Invocation:
    """The command line; `restarted` implies --resume where there is a run already.

    Raises InputError for an unknown preset or flag, a bad value, a contradiction, a folder that may not be used.
    """
    arguments = list(arguments)
    preset = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "drawn-birds"
    if preset not in PRESETS:
        raise InputError(f"preset: {preset!r} is unknown; use one of {', '.join(PRESETS)}")
    parsed = _parse(arguments, _defaults(preset, arguments))
    if parsed.tracker and not importlib.util.find_spec(parsed.tracker):
        raise InputError(
            f"--tracker: {parsed.tracker} is not installed; `pip install {parsed.tracker}`, or leave --tracker out: "
            "TensorBoard has it all"
        )
    out = parsed.out or Path("runs") / preset
    config_file = out / "config.json"
    resume = parsed.resume or (restarted and config_file.is_file())
    if resume:
        if not config_file.is_file():
            raise InputError(
                f"--resume: {out} holds no run (no config.json); leave --resume out, or name the run's folder"
            )
        stored = Config.from_dict(json.loads(config_file.read_text())["config"])
        # The run's own configuration is the default now, so that only flags typed this time can differ from it.
        parsed = _parse(arguments, stored)
        for name, value in _config(parsed).to_dict().items():
            if value != stored.to_dict()[name]:
                raise InputError(
                    f"--{name}: differs from {config_file}; a resumed run keeps its configuration: leave it out"
                )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out: {out} exists; go on with --resume, or name a new folder")
    return Invocation(_config(parsed), out, resume)


def _defaults(preset: str, arguments: Sequence[str]) -> Config:
    """The preset, as it is where the command line names an MLLM, or a tower that none reads. Raises InputError for both
    at once."""
    typed = {argument.partition("=")[0] for argument in arguments}
    supervised, alone = "--supervisor.model" in typed, "--encoder.tower" in typed
    if supervised and alone:
        raise InputError(
            "--supervisor.model: with --encoder.tower, whose tokens no language model reads; leave out the one, for "
            "the metric loss alone, or the other, for the MLLM's own tower"
        )
    config = SUPERVISED.get(preset, PRESETS[preset]) if supervised else PRESETS[preset]
    return dataclasses.replace(config, lambda_=dataclasses.replace(config.lambda_, lm=0.0, kl=0.0)) if alone else config


def _config(parsed: _Arguments) -> Config:
    return Config(**{section.name: getattr(parsed, section.name) for section in dataclasses.fields(Config)})


def _parse(arguments: list[str], default: Config) -> _Arguments:
    start = _Arguments(**{section.name: getattr(default, section.name) for section in dataclasses.fields(Config)})
    description = f"Train a retrieval encoder with SAGA. Presets: {', '.join(PRESETS)}."
    return parse_flags(start, arguments, "python -m saga_fast.train [PRESET]", description)


def parse_flags(default: Arguments, arguments: Sequence[str], program: str, description: str) -> Arguments:
    """Flags of a (nested) dataclass over its defaults. Raises InputError, in a line, for what tyro frames in a box."""
    screen = io.StringIO()
    try:
        with contextlib.redirect_stderr(screen):
            parsed, unknown = tyro.cli(
                type(default),
                default=default,
                args=list(arguments),
                return_unknown_args=True,
                prog=program,
                description=description,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        words = " ".join(re.sub(r"[─-╿]", " ", re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue())).split())
        words = re.sub(r"^.*?Error parsing (\w*Arguments: )?| Argument helptext:.*| For full helptext.*", "", words)
        raise InputError(words) from None
    if unknown:
        close = difflib.get_close_matches(unknown[0].split("=")[0], _flags(default), n=1)
        hint = f"did you mean {close[0]}?" if close else "--help lists what there is"
        raise InputError(f"{unknown[0]}: unknown flag; {hint}")
    return parsed


def _flags(config: object, prefix: str = "--") -> list[str]:
    flags = []
    for part in dataclasses.fields(config):
        name = prefix + part.name.rstrip("_").replace("_", "-")
        value = getattr(config, part.name)
        flags += _flags(value, f"{name}.") if dataclasses.is_dataclass(value) else [name]
    return flags
