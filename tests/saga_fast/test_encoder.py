"""The tower against transformers' own forward, the pooler against its formula, the hub's round trip."""

from __future__ import annotations

import copy

import pytest
import torch
from PIL import Image
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from saga_fast import towers
from saga_fast.encoder import Encoder, Pooler
from saga_fast.errors import InputError


@pytest.fixture(scope="module")
def visual() -> Qwen3VLVisionModel:
    torch.manual_seed(0)
    config = Qwen3VLVisionConfig(
        depth=4, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=4, spatial_merge_size=2,
        out_hidden_size=24, num_position_embeddings=36, deepstack_visual_indexes=[0, 2], initializer_range=0.2,
    )  # fmt: skip
    return Qwen3VLVisionModel(config).eval()


@pytest.fixture
def encoder(visual) -> Encoder:
    torch.manual_seed(1)
    return Encoder.from_tower(visual, "attention", 16, 32)


def qwen_patches(pixels: torch.Tensor, patch: int, merge: int) -> torch.Tensor:
    """Patches as the released processor lays them out: by merge block, channel, time (the frame twice), row, column."""
    x = pixels.float() / 127.5 - 1
    rows = []
    for image in x:
        _, height, width = image.shape
        for top in range(0, height, patch * merge):
            for left in range(0, width, patch * merge):
                for r in range(merge):
                    for c in range(merge):
                        y, z = top + r * patch, left + c * patch
                        rows.append(image[:, None, y : y + patch, z : z + patch].expand(-1, 2, -1, -1).flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("height,width", [(32, 32), (16, 40)])
def test_tower_equals_transformers(visual, height, width):
    encoder = Encoder.from_tower(visual, "mean", 16, 32)
    pixels = torch.randint(0, 256, (3, 3, height, width), dtype=torch.uint8)
    grid = torch.tensor([[1, height // 4, width // 4]] * 3)
    theirs = visual(qwen_patches(pixels, 4, 2), grid_thw=grid)
    ours = encoder.tower(pixels)
    torch.testing.assert_close(ours.tokens.flatten(0, 1), theirs.pooler_output, rtol=1e-4, atol=1e-5)
    assert len(ours.deepstack) == 2
    for mine, other in zip(ours.deepstack, theirs.deepstack_features):
        torch.testing.assert_close(mine.flatten(0, 1), other, rtol=1e-4, atol=1e-5)


def test_tower_gradients_equal_transformers(visual, encoder):
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    weight = torch.randn(2 * 16, 24)
    for parameter in visual.parameters():
        parameter.grad = None
    out = visual(qwen_patches(pixels, 4, 2), grid_thw=torch.tensor([[1, 8, 8]] * 2))
    ((out.pooler_output * weight).sum() + (out.deepstack_features[1] * weight).sum()).backward()
    features = encoder.tower(pixels)
    ((features.tokens.flatten(0, 1) * weight).sum() + (features.deepstack[1].flatten(0, 1) * weight).sum()).backward()
    theirs = dict(visual.named_parameters())
    for name, parameter in encoder.tower.model.named_parameters():
        if theirs[name].grad is not None:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_flash_attention_where_it_runs_is_the_same_attention(monkeypatch, scale):
    """The call's layout and scale, with a stand-in for the package: (B, n, heads, head_dim) throughout."""

    def flash(q, k, v, softmax_scale=None):
        softmax_scale = softmax_scale or q.shape[-1] ** -0.5
        p = (torch.einsum("bihd,bjhd->bhij", q, k) * softmax_scale).softmax(-1)
        return torch.einsum("bhij,bjhd->bihd", p, v)

    q, k, v = torch.randn(3, 2, 7, 4, 8)
    plain = towers.attend(q, k, v, scale)
    monkeypatch.setattr(towers, "flash_attn_func", flash)
    assert torch.equal(towers.attend(q, k, v, scale), plain), "float32 on a CPU is not for flash-attn"
    monkeypatch.setattr(towers, "_flash_runs", lambda q: True)
    torch.testing.assert_close(towers.attend(q, k, v, scale), plain)


def test_a_tower_without_known_pixel_statistics_is_refused(visual):
    visual = copy.deepcopy(visual)
    visual.config.model_type = "unheard_of"
    with pytest.raises(InputError, match="of a 'unheard_of' are unknown; add the model's preprocessor_config.json"):
        towers.VisionTower.of(visual)


def test_attention_pooler_is_its_formula():
    torch.manual_seed(0)
    pooler, tokens = Pooler(8, 5), torch.randn(3, 6, 8)
    torch.testing.assert_close(pooler.attention(tokens), torch.full((3, 6), 1 / 6))  # starts as mean pooling
    torch.nn.init.normal_(pooler.query)
    torch.nn.init.normal_(pooler.key)
    beta = torch.softmax(torch.stack([x @ pooler.key.T @ pooler.query for x in tokens]) / 8**0.5, -1)
    torch.testing.assert_close(pooler.attention(tokens), beta)
    z = torch.stack([pooler.project(b @ x) for b, x in zip(beta, tokens)])
    torch.testing.assert_close(pooler(tokens), z / z.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("kind,reduce", [("mean", lambda x: x.mean(1)), ("max", lambda x: x.max(1).values)])
def test_baseline_poolers(kind, reduce):
    torch.manual_seed(0)
    pooler, tokens = Pooler(8, 5, kind), torch.randn(3, 6, 8)
    z = pooler.project(reduce(tokens))
    torch.testing.assert_close(pooler(tokens), z / z.norm(dim=1, keepdim=True))
    with pytest.raises(ValueError, match="no attention"):
        pooler.attention(tokens)


def test_round_trip_through_a_folder(encoder, tmp_path):
    encoder.save_pretrained(tmp_path / "encoder")
    restored = Encoder.from_pretrained(tmp_path / "encoder")
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(restored(pixels), encoder(pixels))
    assert restored.image_size == 32


def test_images_paths_and_tensors_agree(encoder, tmp_path):
    image = Image.fromarray(torch.randint(0, 256, (20, 30, 3), dtype=torch.uint8).numpy())
    image.save(tmp_path / "picture.png")
    z = encoder([image, tmp_path / "picture.png"])
    assert z.shape == (2, 16) and torch.equal(z[0], z[1])
    torch.testing.assert_close(z.norm(dim=1), torch.ones(2))


def test_clear_errors(visual):
    with pytest.raises(InputError, match="encoder.pooler: got 'median'; choose one of attention, mean, max"):
        Encoder.from_tower(visual, "median", 16, 32)
    with pytest.raises(InputError, match="got 30x30; both sides must be multiples of patch x merge = 8"):
        Encoder.from_tower(visual, "mean", 16, 30)
