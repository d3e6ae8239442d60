"""The frozen decoder, loaded and quantised as in a run, against transformers with the same bitsandbytes weights."""

from __future__ import annotations

import shutil

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers import Qwen3VLForConditionalGeneration

from saga_fast.encoder import VisualFeatures
from saga_fast.supervisor.decoder import Projection
from saga_fast.supervisor.mllm import load_mllm
from saga_fast.supervisor.pair import PairPrefix, PrefixCache
from saga_fast.supervisor.prompt import PROMPTS, build_prefix
from saga_fast.supervisor.replay import Group, replay_groups
from saga_fast.tiny import SUPERVISOR
from saga_fast.utils.errors import InputError
from saga_kernels import NF4Weight, nf4_dequantize

from .tiny_models import GRID, IMAGE, nf4, pair_prefix, random_model, tower_gives


def test_quantised_replay_equals_transformers_with_the_same_nf4_weights():
    """Log-probs through NF4: exact values are bitsandbytes' own, so only the order of float32 sums differs."""
    mllm = load_mllm(SUPERVISOR)
    model = Qwen3VLForConditionalGeneration.from_pretrained(
        SUPERVISOR, dtype=torch.float32, device_map="cpu", quantization_config=nf4("model.visual", "lm_head")
    )
    instruction = PROMPTS["drawn-birds"].instruction()
    prefix = PairPrefix.of(build_prefix(mllm.tokenizer, instruction, 49, "images_first"), (7, 7))
    torch.manual_seed(0)
    levels = [torch.randn(2, 49, 192) for _ in range(4)]
    completion = torch.randint(10, 400, (20,)).tolist()
    ids = torch.cat([prefix.input_ids, torch.tensor(completion)])[None]
    image = mllm.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    features = VisualFeatures(levels[0], tuple(levels[1:]))
    grid = torch.tensor([[1, 14, 14]] * 2)
    kinds, pixels = (ids == image).int(), torch.empty(0)
    with tower_gives(features, model):
        out = model(input_ids=ids, mm_token_type_ids=kinds, image_grid_thw=grid, pixel_values=pixels)
    logits = out.logits[0, len(prefix) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
    groups = [Group([completion], [torch.ones(20)], {})]
    (ours,) = replay_groups(PrefixCache(mllm.decoder, prefix), features, groups, 1.0, 3).log_probs[0]
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    assert expected.std() > 0.1, "log-probs that are all alike would hide an error"

    dense = load_mllm(SUPERVISOR, quantize=False)
    (other,) = replay_groups(PrefixCache(dense.decoder, prefix), features, groups, 1.0, 3).log_probs[0]
    assert (other - ours).abs().max() > 1e-2, "the language model was not quantised at all"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("storage", [torch.uint8, torch.float32])
def test_merged_nf4_weights_are_one_and_the_model_keeps_views(nested, bias, storage):
    linears = [linear_4bit(out, 256, i + 1, nested, bias, storage) for i, out in enumerate((128, 64, 64))]
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(9))
    before = [linear(x) for linear in linears]
    shapes = [linear.weight.shape for linear in linears]
    matrix = torch.cat([nf4_dequantize(NF4Weight.from_bitsandbytes(linear.weight)) for linear in linears])
    projection = Projection.of(*linears)
    (w,) = projection.weights
    assert isinstance(w, NF4Weight) and projection.shape == w.shape == (256, 256)
    assert torch.equal(projection.dense(torch.empty(256, 256)), matrix)
    torch.testing.assert_close(projection(x), torch.cat(before, -1))
    for linear, y, shape in zip(linears, before, shapes):
        state = linear.weight.quant_state
        assert linear.weight.shape == shape and linear.weight.dtype == storage
        assert torch.equal(linear(x), y)
        views = [(linear.weight, w.packed), (state.absmax, w.absmax)]
        views += [(state.state2.absmax, w.absmax2)] if nested else []
        assert all(mine.untyped_storage()._cdata == ours.untyped_storage()._cdata for mine, ours in views)


def linear_4bit(out: int, width: int, scale: float, nested=True, bias=False, storage=torch.uint8) -> Linear4bit:
    """In training mode: an inference forward would repack the weight on some CPUs."""
    torch.manual_seed(out)
    options = {"compute_dtype": torch.float32, "compress_statistics": nested, "quant_storage": storage}
    linear = Linear4bit(width, out, bias, quant_type="nf4", **options)
    linear.weight.data *= scale  # so that offsets differ
    return linear.to("cpu").train()


def test_nf4_weights_that_do_not_fit_stay_apart():
    linears = [linear_4bit(out, 192, 1) for out in (192, 96, 96)]  # 2.25 and 1.125 times 256 blocks of 64
    storages = [linear.weight.data_ptr() for linear in linears]
    x = torch.randn(5, 192, generator=torch.Generator().manual_seed(9))
    projection = Projection.of(*linears)
    assert [w.shape for w in projection.weights] == [(192, 192), (96, 192), (96, 192)]
    assert [linear.weight.data_ptr() for linear in linears] == storages
    torch.testing.assert_close(projection(x), torch.cat([linear(x) for linear in linears], -1))


def test_the_tiny_supervisor_has_both():
    layer = load_mllm(SUPERVISOR).decoder.layers[0]
    assert [len(projection.weights) for projection in (layer.qkv, layer.gate_up)] == [3, 1]


def test_positions_equal_transformers():
    model, prefix = random_model(), pair_prefix()
    ids = prefix.input_ids[None]
    grid = torch.tensor([[1, 2 * GRID[0], 2 * GRID[1]]] * 2)
    positions, delta = model.model.get_rope_index(ids, (ids == IMAGE).int(), grid)
    assert torch.equal(prefix.positions, positions[:, 0])
    assert prefix.next_position == int(delta) + len(prefix)


def test_fingerprint_sees_a_single_bit():
    mllm = load_mllm(SUPERVISOR)
    before = mllm.decoder.fingerprint()
    assert load_mllm(SUPERVISOR).decoder.fingerprint() == before
    mllm.decoder.layers[2].down.weights[0].packed.view(-1)[7] ^= 1
    assert mllm.decoder.fingerprint() != before


def test_clear_errors(tmp_path):
    with pytest.raises(InputError, match="supervisor.model: .* has no config.json, so it is no model; give"):
        load_mllm(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(InputError, match="is a 'qwen3', which reads no images"):
        load_mllm(tmp_path)
    partial = shutil.copytree(SUPERVISOR, tmp_path / "partial")
    weights = partial / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(InputError, match="is not whole"):
        load_mllm(partial)
    weights.unlink()
    with pytest.raises(InputError, match="has no weights in safetensors files"):
        load_mllm(partial)
