"""The tower against transformers' own forward, the pooler against its formula, the hub's round trip."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from transformers import BeitConfig, Gemma3Config, Gemma3Model, LlamaConfig, LlavaConfig, LlavaModel
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from saga_fast.config import PRESETS
from saga_fast.encoder import AttributePooler, Encoder, Pooler
from saga_fast.report.model_card import model_card
from saga_fast.retrieval.blocks import Blocks
from saga_fast.towers import base, tower_of
from saga_fast.utils.errors import InputError
from saga_fast.utils.images import open_rgb

from .small import changed, save_encoder


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


def qwen_patches(pixels: torch.Tensor, patch: int, merge: int, mean=base.HALF, std=base.HALF) -> torch.Tensor:
    """Patches as the released processor lays them out: by merge block, channel, time (the frame twice), row, column."""
    x = (pixels / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
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


@pytest.mark.parametrize("height,width", [(32, 32), (24, 40), (8, 48), (16, 16), (16, 24)])
def test_windows_equal_transformers_at_every_edge(height, width):
    """Windows of 2 x 2 tokens, 8 pixels each: of odd numbers of tokens some are cut, and one image is a window."""
    torch.manual_seed(2)
    config = Qwen2_5_VLVisionConfig(
        depth=3, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=4, spatial_merge_size=2, window_size=16,
        out_hidden_size=24, fullatt_block_indexes=[1], initializer_range=0.2,
    )  # fmt: skip
    model = Qwen2_5_VisionTransformerPretrainedModel(config).eval()
    pixels = torch.randint(0, 256, (3, 3, height, width), dtype=torch.uint8)
    patches = qwen_patches(pixels, 4, 2, base.CLIP_MEAN, base.CLIP_STD)
    theirs = model(patches, grid_thw=torch.tensor([[1, height // 4, width // 4]] * 3)).pooler_output
    tower = tower_of(model)
    torch.testing.assert_close(tower(pixels).tokens.flatten(0, 1), theirs, rtol=1e-4, atol=1e-5)
    assert (tower._geometry(height, width, pixels.device).windows is None) == (height == width == 16)


@pytest.mark.parametrize("side", [16, 32])
def test_gemma_averages_squares_at_any_size(side):
    torch.manual_seed(3)
    vit = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    config = Gemma3Config(
        text_config=dict(hidden_size=24, num_hidden_layers=0, num_attention_heads=2, vocab_size=8),
        vision_config=dict(**vit, image_size=16, patch_size=4, vision_use_head=False), mm_tokens_per_image=4,
    )  # fmt: skip
    model = Gemma3Model(config).eval()
    model.multi_modal_projector.mm_input_projection_weight.data.normal_()
    pixels = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8)
    ours = tower_of(model)(pixels).tokens
    model.multi_modal_projector.patches_per_image = side // 4
    x = pixels / 127.5 - 1
    theirs = model.get_image_features(pixel_values=x, interpolate_pos_encoding=True).pooler_output
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


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
    plain = base.attend(q, k, v, scale)
    monkeypatch.setattr(base, "flash_attn_func", flash)
    assert torch.equal(base.attend(q, k, v, scale), plain), "float32 on a CPU is not for flash-attn"
    monkeypatch.setattr(base, "_flash_runs", lambda q: True)
    torch.testing.assert_close(base.attend(q, k, v, scale), plain)


def test_a_tower_without_known_pixel_statistics_is_refused():
    with torch.device("meta"):
        model = LlavaModel(LlavaConfig(text_config=LlamaConfig(num_hidden_layers=0), vision_config=BeitConfig()))
    with pytest.raises(InputError, match="of a 'beit' are unknown; add the model's preprocessor_config.json"):
        tower_of(model)


def test_attention_pooler_is_its_formula():
    torch.manual_seed(0)
    pooler, tokens = Pooler(8, 5), torch.randn(3, 6, 8)
    torch.testing.assert_close(pooler.attention(tokens), torch.full((3, 1, 6), 1 / 6))  # starts as mean pooling
    torch.nn.init.normal_(pooler.query)
    torch.nn.init.normal_(pooler.key)
    beta = torch.softmax(torch.stack([x @ pooler.key.T @ pooler.query for x in tokens]) / 8**0.5, -1)
    torch.testing.assert_close(pooler.attention(tokens)[:, 0], beta)
    z = torch.stack([pooler.project(b @ x) for b, x in zip(beta, tokens)])
    torch.testing.assert_close(pooler(tokens), z / z.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("dim,sizes", [(12, [4, 4, 4]), (13, [5, 4, 4]), (5, [2, 2, 1]), (3, [1, 1, 1])])
def test_attribute_pooler_is_its_formula(dim, sizes):
    """Against a loop over attributes, in float64."""
    torch.manual_seed(0)
    pooler, tokens = (
        AttributePooler(8, dim, ("a", "b", "c")).double(),
        3 + 2 * torch.randn(4, 6, 8, dtype=torch.float64),
    )
    for parameter in pooler.parameters():
        torch.nn.init.normal_(parameter)
    z, attention = pooler(tokens), pooler.attention(tokens)
    for i, x in enumerate(tokens):
        normed = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        blocks = []
        for m, size in enumerate(sizes):
            beta = torch.softmax(4 * normed @ pooler.key.T @ pooler.query[m] / 8**0.5, 0)
            torch.testing.assert_close(attention[i, m].double(), beta, rtol=1e-5, atol=1e-6)
            block = pooler.weight[m, :size] @ (beta @ x) + pooler.bias[m, :size]
            blocks.append(block / block.norm() / 3**0.5)
        torch.testing.assert_close(z[i].double(), torch.cat(blocks), rtol=1e-5, atol=1e-6)


def test_gradients_of_the_attribute_pooler_are_numerical_ones():
    torch.manual_seed(0)
    pooler, tokens = AttributePooler(4, 5, ("a", "b")).double(), torch.randn(2, 3, 4, dtype=torch.float64)
    # Attention and norms are float32 by design: a coarse step, and a tolerance to match.
    inputs = [*pooler.parameters()]
    weight = torch.randn(2, 5)
    (pooler(tokens) * weight).sum().backward()
    for parameter in inputs:
        at = tuple(torch.randint(side, ()) for side in parameter.shape)
        moved = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                parameter[at] += step
                moved.append((pooler(tokens) * weight).sum().item())
                parameter[at] -= step
        assert parameter.grad[at].item() == pytest.approx((moved[0] - moved[1]) / 2e-2, rel=2e-2, abs=2e-3)


@pytest.mark.parametrize("dimension", [5, 15, 17, 768])
def test_the_cosine_is_the_mean_of_the_blocks_cosines(dimension):
    torch.manual_seed(0)
    names = ("crown", "wing", "tail", "legs", "bill")
    pooler = AttributePooler(24, dimension, names).double()
    torch.nn.init.normal_(pooler.query)
    torch.nn.init.normal_(pooler.bias)
    with torch.no_grad():
        z = pooler(torch.randn(7, 9, 24, dtype=torch.float64))
    assert z.dtype == torch.float32 and z.shape == (7, dimension)
    parts = z.split([dimension // 5 + (m < dimension % 5) for m in range(5)], 1)
    blocks = pooler.blocks(z)
    assert blocks.shape == (7, 5, -(-dimension // 5))
    for m, part in enumerate(parts):  # a round trip: the blocks are z's own numbers, the rest zeros
        torch.testing.assert_close(blocks[:, m, : part.shape[1]], part * 5**0.5)
        assert not blocks[:, m, part.shape[1] :].any()
    torch.testing.assert_close(blocks.norm(dim=-1), torch.ones(7, 5))
    cosines = torch.einsum("amd,bmd->abm", blocks, blocks)
    torch.testing.assert_close(cosines.mean(-1), z @ z.T, atol=1e-6, rtol=0)
    sizes = Blocks({name: part.shape[1] for name, part in zip(names, parts)})
    np.testing.assert_allclose(sizes.cosines(z.numpy()[:, None], z.numpy()), cosines, atol=1e-6)


def test_an_encoder_says_which_attribute_agrees_and_where_it_is_looked_for(tmp_path):
    encoder = save_encoder(tmp_path / "encoder", attributes=("crown", "wing", "tail"))
    assert encoder.block_sizes == {"crown": 6, "wing": 5, "tail": 5}
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        z, beta = encoder(pixels), encoder.attention(pixels)
        assert torch.equal(beta.flatten(2), encoder.pooler.attention(encoder.tower(pixels).tokens))
    assert beta.shape == (2, 3, 4, 4)
    assert float(encoder.compare(z[:1], z[1:]).mean()) == pytest.approx(float(z[0] @ z[1]), abs=1e-6)
    plain = save_encoder(tmp_path / "plain")
    assert plain.block_sizes == {} and plain.attention(pixels).shape == (2, 1, 4, 4)
    with pytest.raises(ValueError, match="attention pooling has no attributes"):
        plain.compare(z[:1], z[1:])


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
    tensor = torch.tensor(list(image.getdata()), dtype=torch.uint8).reshape(20, 30, 3).permute(2, 0, 1)
    z = encoder([image, tmp_path / "picture.png", str(tmp_path / "picture.png"), tensor])
    assert z.shape == (4, 16) and all(torch.equal(z[0], row) for row in z)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(4))
    for alone in (image, str(tmp_path / "picture.png"), tensor):
        torch.testing.assert_close(encoder(alone), z[:1])
    for wrong in (tensor.float(), tensor[None].float(), tensor[None, :1], [tensor[0]]):
        with pytest.raises(InputError, match=r"images: got torch\.\w+ \(.*accepted are uint8"):
            encoder(wrong)
    for wrong, kind in ((np.asarray(image), "ndarray"), ([b"a.png"], "bytes"), ([None], "NoneType")):
        with pytest.raises(InputError, match=f"images: got a {kind}; accepted are PIL images, paths, and uint8"):
            encoder(wrong)
    with pytest.raises(InputError, match="images: none; give one or more"):
        encoder([])


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff"])
def test_a_picture_lies_upright_whether_it_is_handed_in_opened_or_by_its_path(encoder, tmp_path, suffix):
    """Telephones store what they see and turn it by a tag: path, PIL image and the upright picture embed alike."""
    upright = Image.fromarray(torch.randint(0, 256, (20, 30, 3), dtype=torch.uint8).numpy())
    (exif := Image.Exif())[0x0112] = 6
    path = tmp_path / f"picture.{suffix}"
    upright.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=100, subsampling=0)
    z = encoder([path, Image.open(path), open_rgb(path), upright])
    assert torch.equal(z[0], z[1]) and torch.equal(z[0], z[2])
    assert torch.equal(z[0], z[3]) or suffix == "jpg", "of a JPEG the pixels are others"


def test_a_pil_image_that_cannot_be_read_is_one_line(encoder, tmp_path):
    Image.new("RGB", (64, 64)).save(path := tmp_path / "cut.png")
    path.write_bytes(path.read_bytes()[:60])
    for image, what in (
        (Image.open(path), "cut.png"),
        (Image.new("F", (4, 4), 1e6), "mode F"),
        (Image.new("L", (0, 3)), "mode L"),
    ):
        with pytest.raises(InputError, match=f"images: the PIL image .*{what}.* is unreadable"):
            encoder(image)


ALONE = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if ABSENT & {name, name.split(".")[0]} else self.finder.find_spec(name, path, target)

    def find_distributions(self, *context):
        return getattr(self.finder, "find_distributions", lambda *_: [])(*context)

ABSENT = {"bitsandbytes", "triton", "faiss", "saga_kernels", "pytorch_metric_learning", "tyro", "sklearn", "scipy",
          "tensorboard", "accelerate", "saga_fast.supervisor", "saga_fast.tiny"}
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
from saga_fast.encoder import Encoder
z = Encoder.from_pretrained(sys.argv[1])(sys.argv[2:])
assert not ABSENT & set(sys.modules), ABSENT & set(sys.modules)
print(z.shape, float(z.norm(dim=1).sum()))
"""


@pytest.mark.slow
def test_it_runs_where_nothing_of_the_supervisor_is_installed(encoder, tmp_path):
    encoder.save_pretrained(tmp_path / "encoder")
    Image.new("RGB", (40, 30), "teal").save(tmp_path / "a.png")
    command = [sys.executable, "-c", ALONE, str(tmp_path / "encoder"), str(tmp_path / "a.png"), str(tmp_path / "a.png")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("torch.Size([2, 16]) ") and float(done.stdout.split()[-1]) == pytest.approx(2)


def damage(folder: Path, name: str, what: str) -> None:
    """Breaks one file of the encoder in `folder`."""
    file = folder / name
    if what == "missing":
        file.unlink()
    elif what == "cut":
        file.write_bytes(file.read_bytes()[:-9])
    elif what == "flipped":
        content = bytearray(file.read_bytes())
        content[-20] ^= 1
        file.write_bytes(content)
    elif what == "foreign":  # of something else, and the manifest with it
        other = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"PK\x03\x04"}.get(name, b"[1]")
        file.write_bytes(other)
        if name != "manifest.json":
            rehash(folder)


def rehash(folder: Path) -> None:
    names = ("config.json", "model.safetensors")
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    (folder / "manifest.json").write_text(json.dumps({"sha256": hashes}))


@pytest.mark.parametrize("what", ["missing", "cut", "flipped", "foreign"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "manifest.json"])
def test_a_damaged_folder_says_which_file(encoder, tmp_path, name, what):
    encoder.save_pretrained(tmp_path / "encoder")
    Encoder.from_pretrained(tmp_path / "encoder")
    damage(tmp_path / "encoder", name, what)
    with pytest.raises(InputError) as error:
        Encoder.from_pretrained(tmp_path / "encoder")
    assert name in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_weights_of_another_shape_are_refused(visual, encoder, tmp_path):
    encoder.save_pretrained(tmp_path / "encoder")
    config = json.loads((tmp_path / "encoder/config.json").read_text())
    (tmp_path / "encoder/config.json").write_text(json.dumps({**config, "embedding_dim": 15}))
    rehash(tmp_path / "encoder")
    with pytest.raises(InputError, match=r"model.safetensors': not this encoder's weights"):
        Encoder.from_pretrained(tmp_path / "encoder")


def test_neither_folder_nor_hub_id(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="'no/such/folder' is no folder, and was not found on the hub"):
        Encoder.from_pretrained("no/such/folder")
    with pytest.raises(InputError, match="--encoder: missing"):
        Encoder.from_pretrained("")


def test_the_id_is_that_of_weights_and_configuration(visual, encoder, tmp_path):
    encoder.save_pretrained(tmp_path / "a")
    encoder.card = "Another card."
    encoder.save_pretrained(tmp_path / "b")
    encoder.image_size = 24
    encoder._hub_mixin_config["image_size"] = 24
    encoder.save_pretrained(tmp_path / "c")
    a, b, c = (Encoder.from_pretrained(tmp_path / name).sha256 for name in "abc")
    assert a == b != c and len(a) == 64


def test_the_card_says_what_a_reader_needs():
    before, after = ({"recall_at_1": x, "recall_at_2": 0.5, "recall_at_4": 0.6, "recall_at_8": 0.7, "map_at_r": 0.2,
                      "nmi": 0.3} for x in (0.25, 0.755))  # fmt: skip
    card = ModelCard(model_card(PRESETS["cub"], before, after, 300))
    assert card.data.license == "unknown" and card.data.base_model == "Qwen/Qwen3-VL-8B-Instruct"
    assert "| before training | 25.00 | 50.00 |" in card.text and "| after training | 75.50 |" in card.text
    assert "CUB-200-2011" in card.text and "300 steps" in card.text and "from_pretrained" in card.text
    configuration = json.loads(card.text.split("```json")[1].split("```")[0])
    assert configuration["encoder"] == PRESETS["cub"].to_dict()["encoder"]
    tiny = ModelCard(model_card(PRESETS["drawn-birds"], before, after, 24))
    assert tiny.data.license == "apache-2.0" and tiny.data.base_model is None
    for sections in (
        {"supervisor": {"model": "/home/me/gone", "prompt": "/home/me/my.toml"}},
        {"encoder": {"tower": "/home/me/gone"}, "lambda_": {"lm": 0.0, "kl": 0.0}},
        {"encoder": {"tower": "timm:local-dir:/home/me"}, "lambda_": {"lm": 0.0, "kl": 0.0}},
    ):
        card = ModelCard(model_card(changed(PRESETS["cub"], **sections), before, after, 24))
        assert card.data.base_model is None and "/home" not in str(card), "where things lay is nobody's business"


def test_the_card_goes_to_the_hub_with_the_encoder(encoder, tmp_path, monkeypatch):
    sent = {}

    def upload(self, *, folder_path, repo_id, **_):
        sent.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()}, to=repo_id)

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: type("Repo", (), {"repo_id": repo_id}))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    encoder.card = "---\nlicense: mit\n---\nMy own words.\n"
    encoder.save_pretrained(tmp_path / "encoder")
    Encoder.from_pretrained(tmp_path / "encoder").push_to_hub("me/mine")
    assert sent.pop("to") == "me/mine" and sent["README.md"].decode() == encoder.card
    assert sent == {path.name: path.read_bytes() for path in (tmp_path / "encoder").iterdir()}


def test_clear_errors(visual):
    with pytest.raises(
        InputError, match="encoder.pooler: got 'median'; choose one of attributes, attention, mean, max"
    ):
        Encoder.from_tower(visual, "median", 16, 32)
    with pytest.raises(InputError, match="got 30x30; both sides must be multiples of patch x merge = 8"):
        Encoder.from_tower(visual, "mean", 16, 30)
