"""Each family of models, saved to disk and loaded by path, against transformers on the same files, NF4 and not."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from saga_fast.encoder import Encoder
from saga_fast.supervisor.mllm import Mllm, load_mllm
from saga_fast.supervisor.prompt import Prompt
from saga_fast.supervisor.replay import Group, Plan
from saga_fast.supervisor.rollout import Sampling
from saga_fast.supervisor.supervisor import Supervisor
from saga_fast.utils.errors import InputError

from ...sweep import sweep
from ..small import random_pixels
from ..test_encoder import qwen_patches
from .families import FAMILIES, save
from .tiny_models import as_leaves, nf4, tower_gives

SIZE, TEMPERATURE, ANCHOR = 32, 0.7, 2
PROMPT = Prompt("expert", "bird", "same", ("bill",))
ONE_OF_EACH = (
    "qwen3-vl",
    "internvl",
    "llava-llama",
    "llava-onevision",
    "idefics3",
    "gemma3",
    "fastvlm-llama",
)  # file of `families`
STATISTICS = {  # what each family's released processor subtracts and divides by; LLaVA with a SigLIP says its own
    "qwen3-vl": ([0.5] * 3, [0.5] * 3),
    "internvl": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "llava-llama": (CLIP := ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])),
    "qwen2.5-vl": CLIP,
    "qwen2-vl": CLIP,
    "llava-qwen": ([0.4, 0.5, 0.6], [0.3, 0.2, 0.1]),
    "llava-mistral": ([0.4, 0.5, 0.6], [0.3, 0.2, 0.1]),
    "llava-onevision": ([0.5] * 3, [0.5] * 3),
    "fastvlm": ([0.0] * 3, [1.0] * 3),
    "smolvlm": ([0.5] * 3, [0.5] * 3),
    "idefics3": ([0.5] * 3, [0.5] * 3),
    "gemma3": ([0.5] * 3, [0.5] * 3),
}
MARKS = {  # what stands around an image's tokens in the prompt
    "qwen": "<|vision_start|>{}<|vision_end|>",
    "internvl": "<img>{}</img>\n",
    "llava": "{}\n",
    "llava-onevision": "{}<image>\n",
    "fastvlm": "{}\n",
    "smolvlm": "<fake_token_around_image><global-img>{}<fake_token_around_image>",
    "gemma3": "\n\n<start_of_image>{}<end_of_image>\n\n",
    "idefics3": "<fake_token_around_image><global-img>{}<fake_token_around_image>",
}


def of(family: str, table: dict[str, Any]) -> Any:
    """The entry whose name `family` begins with, the longest of them."""
    return table[max((name for name in table if family.startswith(name)), key=len)]


VISION = ("visual", "vision_tower", "multi_modal_projector", "vision_model", "connector")


class Case(NamedTuple):
    family: str
    mllm: Mllm
    encoder: Encoder
    supervisor: Supervisor
    oracle: PreTrainedModel
    pixels: Tensor  # of two pairs

    def inputs(self, pixels: Tensor) -> dict:
        """What transformers' tower wants of uint8 images (B, 3, S, S)."""
        statistics = of(self.family, STATISTICS)
        if self.mrope:
            grid = torch.tensor([[1, SIZE // 4, SIZE // 4]] * len(pixels))
            return {"pixel_values": qwen_patches(pixels, 4, 2, *statistics), "image_grid_thw": grid}
        mean, std = (torch.tensor(values)[:, None, None] for values in statistics)
        x = (pixels / 255 - mean) / std
        if self.family.startswith(("smolvlm", "idefics3")):
            return {"pixel_values": x[None]}
        if self.family.startswith("llava-onevision"):
            sizes = torch.tensor([[SIZE, SIZE]] * len(x))
            return {"pixel_values": x, "image_sizes": sizes, "batch_num_images": torch.tensor([len(x)])}
        return {"pixel_values": x}

    def asked(self, completion: list[int]) -> dict:
        ids = torch.cat([self.supervisor.prefix.input_ids, torch.tensor(completion, dtype=torch.int64)])[None]
        kinds = (ids == self.image_id).int()
        named = {"qwen": {"mm_token_type_ids": kinds}, "gemma3": {"token_type_ids": kinds}, "": {}}
        return {"input_ids": ids, **of(self.family, named)}

    @property
    def image_id(self) -> int:
        return self.mllm.tokenizer.convert_tokens_to_ids(self.mllm.image_token)

    @property
    def mrope(self) -> bool:
        return self.family.startswith("qwen")


def load_oracle(folder: Path, quantize: bool) -> PreTrainedModel:
    oracle = AutoModelForImageTextToText.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        device_map="cpu",
        quantization_config=nf4(*(f"model.{part}" for part in VISION), "lm_head") if quantize else None,
    ).eval()
    if oracle.config.model_type == "llava":  # which does not hand this on to its tower
        look = functools.partial(oracle.model.get_image_features, interpolate_pos_encoding=True)
        oracle.model.get_image_features = look
    return oracle


@pytest.fixture(
    scope="module",
    params=sweep([*ONE_OF_EACH, *(name for name in FAMILIES if name not in ONE_OF_EACH)], len(ONE_OF_EACH)),
)
def folder(request, tmp_path_factory) -> tuple[str, Path]:
    return request.param, save(request.param, tmp_path_factory.mktemp("models") / request.param)


@pytest.fixture(scope="module", params=sweep([False, True]), ids=["dense", "nf4"])
def case(request, folder) -> Case:
    family, path = folder
    mllm = load_mllm(path, quantize=request.param)
    encoder = Encoder.from_tower(mllm.visual, "attention", 16, SIZE).eval()
    sampling = Sampling(group_size=2, temperature=TEMPERATURE, max_new_tokens=12)
    grid = encoder.tower.grid(SIZE, SIZE)
    supervisor = Supervisor(mllm, PROMPT, "images_first", grid, sampling, anchor_layer=ANCHOR)
    return Case(family, mllm, encoder, supervisor, load_oracle(path, request.param), random_pixels(4, SIZE, seed=1))


def test_the_language_model_is_in_nf4_if_asked_and_nothing_else(case, request):
    quantized = "nf4" in request.node.callspec.id
    kinds = {type(layer.down.weights[0]).__name__ for layer in case.mllm.decoder.layers}
    assert kinds == {"NF4Weight" if quantized else "Tensor"}
    assert isinstance(case.mllm.decoder.head, Tensor)
    assert all(parameter.dtype == torch.float32 for parameter in case.encoder.parameters())


def test_tower_equals_transformers(case):
    with torch.no_grad():
        theirs = case.oracle.model.get_image_features(**case.inputs(case.pixels))
        ours = case.encoder.tower(case.pixels)
    tokens = torch.cat([x.reshape(-1, x.shape[-1]) for x in theirs.pooler_output])
    if case.mllm.newline is not None:
        tokens = tokens.unflatten(0, (len(case.pixels), -1))
        assert (tokens[:, -1] == case.mllm.newline).all()
        tokens = tokens[:, :-1].flatten(0, 1)
    torch.testing.assert_close(ours.tokens.flatten(0, 1), tokens, rtol=1e-4, atol=1e-4)
    assert len(ours.deepstack) == (3 if case.family.startswith("qwen3-vl") else 0)
    for mine, other in zip(ours.deepstack, getattr(theirs, "deepstack_features", ())):
        images = torch.cat([x.reshape(-1, x.shape[-1]) for x in other])
        torch.testing.assert_close(mine.flatten(0, 1), images, rtol=1e-4, atol=1e-4)


def test_prompt_holds_one_pad_a_token_between_the_familys_marks(case):
    ids = case.supervisor.prefix.input_ids
    text = case.mllm.tokenizer.decode(ids)
    rows, columns = case.encoder.tower.grid(SIZE, SIZE)
    pads = case.mllm.image_token * (rows * columns)
    image = of(case.family, MARKS).format(pads)
    assert text.count(case.mllm.image_token) == (image * 2).count(case.mllm.image_token)
    assert image * 2 + PROMPT.instruction() in text
    assert (ids[case.supervisor.prefix.images] == case.image_id).all()


def test_replay_equals_transformers(case):
    """Log-probs, gradient at every visual input, anchor attention; two pairs, completions of unequal length."""
    with torch.no_grad():
        features = case.encoder.tower(case.pixels)
    ours, theirs = as_leaves(features), as_leaves(features)
    generator = torch.Generator().manual_seed(2)
    groups = [
        Group(
            [torch.randint(40, 250, (n,), generator=generator).tolist() for n in lengths],
            [torch.randn((), generator=generator).expand(n) for n in lengths],
            {0: ([1, 2], [lengths[0] - 1])},
        )
        for lengths in ([5, 9], [3, 1])
    ]
    result = case.supervisor.replay(ours, groups)

    prefix = case.supervisor.prefix
    for i, group in enumerate(groups):
        for g, completion in enumerate(group.completions):
            pair = theirs.select(torch.tensor([2 * i, 2 * i + 1]))
            with tower_gives(pair, case.oracle):
                out = case.oracle(**case.asked(completion), **case.inputs(case.pixels[:2]), output_attentions=True)
            predicted = (out.logits[0, len(prefix) - 1 : -1] / TEMPERATURE).log_softmax(-1)
            log_probs = predicted.gather(1, torch.tensor(completion)[:, None])[:, 0]
            torch.testing.assert_close(result.log_probs[i][g], log_probs.detach(), rtol=1e-3, atol=1e-3)
            (group.coefficients[g] * log_probs).sum().backward()
            for image, rows in enumerate(group.attribute_token_positions.get(g, ())):
                (entry,) = [a for a in result.attention if (a.group, a.rollout, a.image) == (i, g, image)]
                attention = out.attentions[ANCHOR][0].mean(0)[len(prefix) + torch.tensor(rows)]
                torch.testing.assert_close(
                    entry.weights, attention[:, prefix.images[image]].detach(), rtol=1e-3, atol=1e-5
                )
    for mine, other in zip((ours.tokens, *ours.deepstack), (theirs.tokens, *theirs.deepstack)):
        assert other.grad.norm() > 1e-3, "a gradient that vanishes says nothing"
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-2, atol=1e-3 * other.grad.abs().max().item())


def test_a_replay_in_slices_that_computes_all_again_gives_the_same(case):
    with torch.no_grad():
        features = case.encoder.tower(case.pixels[:2])
    whole, sliced = as_leaves(features), as_leaves(features)
    groups = [Group([[50, 60, 70], [80, 90]], [torch.tensor([0.3, -1.0, 0.5]), torch.tensor([1.0, 2.0])], {})]
    supervisor = copy.copy(case.supervisor)
    supervisor.replay(whole, groups)
    supervisor.plan = Plan(token_budget=1, recompute="full", prefix_recompute="mlp")
    supervisor.replay(sliced, groups)
    for mine, other in zip(sliced.levels, whole.levels):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-4 * other.grad.abs().max().item())


def test_greedy_rollouts_equal_generate_from_pixels(case):
    """Everything at once: pixels, tower, prompt, prefill, decode."""
    supervisor = copy.copy(case.supervisor)
    supervisor.sampling = Sampling(group_size=1, temperature=0.0, top_p=1.0, max_new_tokens=12)
    with torch.no_grad():
        rollouts = supervisor.rollout(case.encoder.tower(case.pixels), torch.arange(2))
    for pair, (ours,) in zip(case.pixels.split(2), rollouts):
        inputs = case.inputs(pair)
        if isinstance(case.mllm.decoder.layers[0].down.weights[0], Tensor):
            out = case.oracle.generate(**case.asked([]), **inputs, max_new_tokens=12, do_sample=False)
            assert ours == out[0, len(supervisor.prefix) :].tolist()
        # bitsandbytes sums NF4 in another order, which tips the choice where two logits are nearly equal. In evaluation
        # it would compute in bf16 on some CPUs.
        oracle = case.oracle.train()
        for module in oracle.modules():  # batch norm's statistics are those of the files all the same
            module.train(not isinstance(module, torch.nn.BatchNorm2d))
        with torch.no_grad():
            logits = oracle(**case.asked(ours), **inputs).logits[0, len(supervisor.prefix) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(ours)[:, None])[:, 0]
        assert (logits.amax(1) - chosen).max() < 1e-3
    if case.mllm.decoder.head is not case.mllm.decoder.embedding:  # random tied models repeat themselves
        assert rollouts[0] != rollouts[1], "pairs that are answered alike would hide a mix-up"


def test_encoder_round_trip_needs_no_language_model(case, tmp_path):
    case.encoder.save_pretrained(tmp_path / "encoder")
    restored = Encoder.from_pretrained(tmp_path / "encoder").eval()
    assert torch.equal(restored(case.pixels), case.encoder(case.pixels))
    assert not any("language" in name for name in restored.state_dict())
    said = json.loads((tmp_path / "encoder" / "config.json").read_text())["vision_config"]
    assert "quantization_config" not in said


def test_checkpointed_tower_has_the_same_gradients(case):
    def gradients(encoder: Encoder) -> dict[str, Tensor]:
        features = encoder.train().tower(case.pixels)
        sum(level.square().sum() for level in (features.tokens, *features.deepstack)).backward()
        return {name: parameter.grad for name, parameter in encoder.tower.named_parameters()}

    plain, checkpointed = copy.deepcopy(case.encoder), copy.deepcopy(case.encoder)
    checkpointed.tower.checkpoint_blocks()
    expected, got = gradients(plain), gradients(checkpointed)
    for name, gradient in expected.items():
        assert (gradient is None) == (got[name] is None) and (gradient is None or torch.equal(gradient, got[name]))


@pytest.mark.parametrize("family", sweep(["llava-mistral", "gemma3"]))
def test_runs_within_a_sliding_window_are_right_and_longer_ones_refused(family, tmp_path):
    folder = save(family, tmp_path / family)
    sampling = Sampling(group_size=1, temperature=1.0, max_new_tokens=6)
    mllm = load_mllm(folder, quantize=False)
    grid = Encoder.from_tower(mllm.visual, "mean", 8, SIZE).tower.grid(SIZE, SIZE)
    reach = len(Supervisor(mllm, PROMPT, "images_first", grid, sampling).prefix) + 5
    file = folder / "config.json"
    found = []
    for window in (reach, reach - 1):
        said = json.loads(file.read_text())
        said["text_config"]["sliding_window"] = window
        file.write_text(json.dumps(said))
        mllm = load_mllm(folder, quantize=False)
        if window < reach:
            with pytest.raises(InputError, match=f"max-new-tokens: 6 after a prompt of {reach - 5} .*: give at most 5"):
                Supervisor(mllm, PROMPT, "images_first", grid, sampling)
        else:
            supervisor = Supervisor(mllm, PROMPT, "images_first", grid, sampling)
            encoder = Encoder.from_tower(mllm.visual, "mean", 8, SIZE)
            pixels = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
        case = Case(family, mllm, encoder, supervisor, load_oracle(folder, False), pixels)
        completion = [50, 60, 70, 80, 90, 100]
        with torch.no_grad():
            pair = encoder.tower(pixels)
            with tower_gives(pair, case.oracle):
                out = case.oracle(**case.asked(completion), **case.inputs(pixels))
        found.append(out.logits[0, len(supervisor.prefix) - 1 : -1].log_softmax(-1)[range(6), completion])
    (ours,) = supervisor.replay(pair, [Group([completion], [torch.ones(6)], {})]).log_probs[0]
    torch.testing.assert_close(ours, found[0], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found[0][-1], found[1][-1], atol=1e-4), "a window that cuts nothing says nothing"
