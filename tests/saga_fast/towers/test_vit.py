"""Vision models of transformers, saved to disk with random weights, against their own forward."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    SwinConfig,
    ViTConfig,
)

from saga_fast.encoder import Encoder
from saga_fast.export import export
from saga_fast.runtime.memory import tower_activation_bytes
from saga_fast.tiny import SUPERVISOR
from saga_fast.towers import load_tower, tower_of
from saga_fast.utils.errors import InputError

from ...sweep import sweep
from ..small import random_pixels

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES = {"image_size": 32, "patch_size": 8}
TEXT = {**SMALL, "vocab_size": 20, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
CONFIGS: dict[str, tuple[PretrainedConfig, int]] = {  # and how many tokens stand before those of the patches
    "vit": (ViTConfig(**SMALL, **SIZES), 1),
    "dinov2": (Dinov2Config(**SMALL, **SIZES), 1),
    "dinov2_with_registers": (Dinov2WithRegistersConfig(**SMALL, **SIZES, num_register_tokens=4), 5),
    "dinov3_vit": (DINOv3ViTConfig(**SMALL, **SIZES, num_register_tokens=4), 5),
    "siglip": (SiglipVisionConfig(**SMALL, **SIZES), 0),
    "clip": (CLIPVisionConfig(**SMALL, **SIZES), 1),
    "swin": (SwinConfig(embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2, image_size=32, patch_size=4), 0),
}


def save(kind: str, folder, processor: bool = True) -> PretrainedConfig:
    torch.manual_seed(0)
    config, _ = CONFIGS[kind]
    if kind == "clip":
        model = CLIPModel(CLIPConfig(text_config=CLIPTextConfig(**TEXT).to_dict(), vision_config=config.to_dict()))
    elif kind == "siglip":
        text = SiglipTextConfig(**TEXT).to_dict()
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=config.to_dict()))
    else:
        model = AutoModel.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    if processor:
        said = {
            "image_processor_type": "ViTImageProcessor",
            "image_mean": [0.1, 0.2, 0.3],
            "image_std": [0.4, 0.5, 0.6],
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(said))
    return config


@pytest.mark.parametrize("kind", sweep(CONFIGS, fast=3))
def test_a_tower_is_the_models_patches_and_goes_round(kind, tmp_path):
    save(kind, tmp_path / "model")
    _, before = CONFIGS[kind]
    model = load_tower(str(tmp_path / "model"))
    encoder = Encoder.from_tower(model, "attention", 8, 32).eval()
    images = random_pixels(3, 32)
    assert encoder.tower.grid(32, 32) == (4, 4)
    whole = AutoModel.from_pretrained(tmp_path / "model").eval()
    whole = getattr(whole, "vision_model", whole)
    x = images / 255
    x = (x - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.4, 0.5, 0.6])[:, None, None]
    theirs = whole(pixel_values=x).last_hidden_state
    theirs = whole.post_layernorm(theirs) if kind == "clip" else theirs
    tokens = encoder.tower(images).tokens
    assert tokens.shape[1] == theirs.shape[1] - before == 16
    torch.testing.assert_close(tokens, theirs[:, before:], rtol=1e-4, atol=1e-5)

    encoder.train()(images).sum(0)[0].backward()
    idle = [name for name, p in encoder.tower.named_parameters() if p.grad is None]
    assert all("mask_token" in name for name in idle), "an optimizer would carry weights that nothing reads"
    expected = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
    encoder.zero_grad()
    encoder.tower.checkpoint_blocks()
    fixed, each = tower_activation_bytes(encoder.tower, 32, autocast=False)
    encoder.tower.checkpoint_blocks(False)
    assert each < 0.5 * tower_activation_bytes(encoder.tower, 32, autocast=False)[1], "its blocks are not run again"
    encoder.tower.checkpoint_blocks()
    encoder(images).sum(0)[0].backward()
    for name, parameter in encoder.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], msg=name)

    encoder.eval().save_pretrained(tmp_path / "encoder")
    found = Encoder.from_pretrained(tmp_path / "encoder")
    with torch.inference_mode():
        assert torch.equal(found(images), encoder(images))


@pytest.mark.parametrize("kind", ["vit", "dinov2", "dinov3_vit", "siglip", "clip"])
def test_another_size_than_the_pretraining_has_a_grid_of_its_own(kind, tmp_path):
    save(kind, tmp_path / "model")
    tower = tower_of(load_tower(tmp_path / "model"))
    assert tower(random_pixels(2, 48)).tokens.shape == (2, 36, 32)
    with pytest.raises(InputError, match="pixels: got 36x36; both sides must be multiples of patch x merge = 8"):
        tower(random_pixels(2, 36))


def test_statistics_that_no_file_says_are_those_of_the_type(tmp_path):
    save("dinov2", tmp_path / "model", processor=False)
    tower = tower_of(load_tower(tmp_path / "model"))
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    torch.testing.assert_close(tower.normalize(255 * mean, torch.float32), torch.zeros(3, 1, 1), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_vit_goes_to_onnx(tmp_path):
    save("dinov2", tmp_path / "model")
    assert export(Encoder.from_tower(load_tower(tmp_path / "model"), "mean", 8, 48).eval(), tmp_path / "e.onnx") < 1e-4


def test_what_is_no_vision_model_is_refused_by_name(tmp_path):
    LlamaForCausalLM(LlamaConfig(**SMALL, vocab_size=10)).save_pretrained(tmp_path / "text")
    (tmp_path / "empty").mkdir()
    save("vit", tmp_path / "own")
    described = json.loads((tmp_path / "own/config.json").read_text())
    (tmp_path / "own/config.json").write_text(json.dumps(described | {"auto_map": {"AutoModel": "own.Model"}}))
    save("vit", tmp_path / "pickled")
    (tmp_path / "pickled/model.safetensors").rename(tmp_path / "pickled/pytorch_model.bin")
    save("vit", tmp_path / "torn")
    weights = (tmp_path / "torn/model.safetensors").read_bytes()
    (tmp_path / "torn/model.safetensors").write_bytes(weights[: len(weights) // 2])
    save("vit", tmp_path / "adapted")
    (tmp_path / "adapted/adapter_config.json").write_text("{}")
    save("vit", tmp_path / "lora")
    tensors = load_file(tmp_path / "lora/model.safetensors")
    tensors["layers.0.attention.q_proj.lora_A.weight"] = torch.zeros(2, 32)
    save_file(tensors, tmp_path / "lora/model.safetensors", {"format": "pt"})
    save("vit", tmp_path / "cut")
    (tmp_path / "cut/preprocessor_config.json").write_text('{"image_mean": [0.5')
    save("vit", tmp_path / "said")
    (tmp_path / "said/preprocessor_config.json").write_text('{"image_std": "half"}')
    save("vit", tmp_path / "odd")
    (tmp_path / "odd/config.json").write_text(json.dumps(described | {"patch_size": "x", "auto_map": None}))
    for name, said in (
        ("adapted", "holds an adapter that is not merged, .* merge it first .*adapter_config.json is there"),
        ("lora", "holds an adapter that is not merged, .*its weights have .*lora_A"),
        ("cut", "has a malformed preprocessor_config.json .*restore the file"),
        ("said", "has a malformed preprocessor_config.json .image_std is 'half'; accepted are three numbers"),
        ("odd", "(is no model|could not be loaded) \\("),
        ("text", "is a 'llama', which has no patches; give a folder or hub id of a vision model"),
        ("empty", "has no config.json, so it is no model; give a folder or hub id of a vision model"),
        ("own", "brings code of its own, which is not run"),
        ("pickled", "has no weights in safetensors files; pickles"),
        ("torn", "is not whole .*; restore the file"),
    ):
        with pytest.raises(InputError, match=rf"^encoder.tower: .*{name} {said}"):
            load_tower(str(tmp_path / name))
    with pytest.raises(InputError, match="a multimodal language model; name it with --supervisor.model"):
        load_tower(str(SUPERVISOR))
