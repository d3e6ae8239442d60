"""Loading: errors, checkpoints that are quantised already, memory while loading, head in NF4."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from saga_fast.encoder import Encoder, VisualFeatures
from saga_fast.runtime.memory import LiveBytes
from saga_fast.supervisor.mllm import load_mllm
from saga_fast.supervisor.pair import PairPrefix, PrefixCache
from saga_fast.supervisor.prompt import ImageMarkup, build_prefix
from saga_fast.supervisor.replay import Group, replay_groups
from saga_fast.supervisor.rollout import Sampling, rollout_pairs
from saga_fast.utils import releases
from saga_fast.utils.errors import InputError
from saga_kernels import NF4Weight, nf4_dequantize

from . import families
from .families import save

CLIP = {"model_type": "clip_vision_model"}


def llava(**text) -> dict:
    return {"model_type": "llava", "text_config": {"model_type": "llama", **text}, "vision_config": CLIP}


def edit(file: Path, change: Callable[[dict], object]) -> None:
    """Changes the JSON object in `file`, which need not be there."""
    values = json.loads(file.read_text()) if file.exists() else {}
    change(values)
    file.write_text(json.dumps(values))


REFUSED = {
    "text only": ({"model_type": "qwen3"}, "is a 'qwen3', which reads no images; a vision-language model is needed"),
    "video only": ({"model_type": "instructblipvideo"}, "is a 'instructblipvideo', which reads videos only"),
    "experts": ({"model_type": "qwen3_vl_moe"}, "experts a layer; a dense model is needed"),
    "hybrid": (
        {"model_type": "qwen3_5"},
        "is a 'qwen3_5' whose layers are of linear_attention too; .*: take a model of these alone, such as Qwen3-VL",
    ),
    "gemma": (llava(model_type="gemma2"), "whose language model is a 'gemma2'"),
    "rotary": (
        llava(rope_parameters={"rope_type": "proportional", "factor": 2.0, "rope_theta": 1e4}),
        "scales its rotary positions by 'proportional'; accepted are default, linear",
    ),
    "activation": (llava(hidden_act="gelu"), "has 'gelu' for its activation"),
    "tower": (llava() | {"model_type": "llava_next"}, "is a 'llava_next'; accepted are qwen2_vl, qwen2_5_vl"),
    "timm": (
        llava() | {"vision_config": {"model_type": "timm_wrapper", "architecture": "vit_tiny_patch16_224"}},
        "is a 'llava' with 'vit_tiny_patch16_224' for its tower, whose features it cannot read; of the models whose",
    ),
    "timm's own hub": (
        {"model_type": "fast_vlm", "vision_config": {"model_type": "timm_wrapper", "architecture": "local-dir:/tmp"}},
        "has a tower whose architecture is 'local-dir:/tmp'; accepted are timm's own names",
    ),
    "other weights": (
        {"model_type": "fast_vlm", "vision_config": {"model_args": {"checkpoint_path": "x.pth"}}},
        "has a tower whose arguments to timm hold 'checkpoint_path', which is not accepted; take it out",
    ),
    "not timm": (
        llava() | {"model_type": "fast_vlm"},
        "is a 'fast_vlm' with 'clip_vision_model' for its tower, whose features it cannot read",
    ),
    "caps": (
        {"model_type": "gemma3", "text_config": {"attn_logit_softcapping": 50.0}},
        "caps its numbers by attn_logit_softcapping 50.0",
    ),
    "both directions": (
        {"model_type": "gemma3", "text_config": {"use_bidirectional_attention": True}},
        "reads text in both directions",
    ),
    "later Gemma": ({"model_type": "gemma3n"}, "is a 'gemma3n'"),
    "GPTQ": (llava() | {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantised already, by 'gptq'"),
    "FP4": (
        llava() | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "is quantised already, by 'bitsandbytes'; of quantised checkpoints those of bitsandbytes in NF4 are read",
    ),
    "own code of a known kind": (
        llava() | {"auto_map": {"AutoModelForImageTextToText": "code.Model"}},
        "brings code of its own, which is not run; take the release",
    ),
    "own code": (
        {"model_type": "internvl_chat", "auto_map": {"AutoConfig": "configuration.Config"}},
        "brings code of its own, which is not run; take the release .* whose name ends in -HF",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_of_another_kind_is_refused_by_its_configuration_alone(case, tmp_path):
    config, message = REFUSED[case]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message) as caught:
        load_mllm(tmp_path)
    assert str(caught.value).startswith(f"supervisor.model: {tmp_path} ") and "\n" not in str(caught.value)


def test_a_gated_model_says_where_to_ask(monkeypatch):
    def gated(*_, **__):
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it.")

    monkeypatch.setattr(releases, "cached_file", gated)
    with pytest.raises(InputError, match="meta/some is gated; accept its terms on its page, then log in"):
        load_mllm("meta/some")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    return save("internvl", tmp_path_factory.mktemp("models") / "internvl", max_shard_size="200KB")


def test_weights_that_are_not_all_there_are_named(sharded, tmp_path):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    key = "model.language_model.layers.2.mlp.up_proj.weight"
    shard = index[next(name for name in index if name.endswith("layers.2.mlp.up_proj.weight"))]
    without = shutil.copytree(sharded, tmp_path / "without")
    tensors = load_file(without / shard)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("layers.2.mlp.up_proj.weight")}
    save_file(tensors, without / shard, {"format": "pt"})
    with pytest.raises(InputError, match=f"is not whole .*{key}"):
        load_mllm(without)
    (without / shard).unlink()
    with pytest.raises(InputError, match="is not whole"):
        load_mllm(without)
    other = shutil.copytree(sharded, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 96
    (other / "config.json").write_text(json.dumps(config))
    for quantize in (True, False):
        with pytest.raises(InputError, match="is not whole"):
            load_mllm(other, quantize)


def test_code_and_pickles_in_a_folder_are_refused_and_never_run(sharded, tmp_path):
    ran = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return Path.touch, (ran,)

    def refused(folder: Path, message: str) -> None:
        with pytest.raises(InputError, match=message) as caught:
            load_mllm(folder)
        assert str(caught.value).startswith(f"supervisor.model: {folder} ") and not ran.exists()

    pickles = "pickles .* are not read: take a release in safetensors, or convert it"
    folder = shutil.copytree(sharded, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors*"))
    for name in ("pytorch_model.bin", "model.bin", "pytorch_model-00001-of-00001.bin"):
        torch.save({"weight": Payload()}, folder / name)
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model-00001-of-00001.bin"}}
    refused(folder, "has no weights in safetensors files; " + pickles)
    (folder / "pytorch_model.bin").unlink()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    refused(folder, "has no weights in safetensors files; " + pickles)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "names 'pytorch_model-00001-of-00001.bin' among its weights; " + pickles)
    for malformed in ("[]", "{", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'):
        (folder / "model.safetensors.index.json").write_text(malformed)
        refused(folder, "has a malformed model.safetensors.index.json")

    folder = shutil.copytree(sharded, tmp_path / "code")
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w')")
    for file, value in (
        ("config.json", {"AutoConfig": "code.Config"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["code.Tokenizer", None]}),
    ):
        whole = (folder / file).read_text()
        (folder / file).write_text(json.dumps({**json.loads(whole), "auto_map": value}))
        refused(folder, "brings code of its own, which is not run")
        (folder / file).write_text(whole)
    load_mllm(folder)


@pytest.mark.parametrize("family,tower", [("qwen3-vl", False), ("internvl", True)])
def test_a_checkpoint_in_nf4_loads_as_it_is(family, tower, tmp_path):
    """tower: in NF4 as well, as some releases have it; training gets what those weights stand for."""
    dense = save(family, tmp_path / "dense")
    kept = ["lm_head"] if tower else ["model.visual", "model.vision_tower", "model.multi_modal_projector", "lm_head"]
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, llm_int8_skip_modules=kept
    )
    model = AutoModelForImageTextToText.from_pretrained(dense, dtype=torch.float32, quantization_config=quantization)
    stored = shutil.copytree(dense, tmp_path / "stored", ignore=shutil.ignore_patterns("model*"))
    model.save_pretrained(stored)
    ours, fresh = load_mllm(stored, quantize=False), load_mllm(dense)
    assert ours.decoder.fingerprint() == fresh.decoder.fingerprint()
    tokens = [
        Encoder.from_tower(mllm.visual, "mean", 8, 32).tower(torch.full((1, 3, 32, 32), 9, dtype=torch.uint8)).tokens
        for mllm in (ours, fresh)
    ]
    distance = (tokens[0] - tokens[1]).norm() / tokens[1].norm()
    assert 1e-3 < distance < 0.5 if tower else distance == 0


def test_a_template_kept_beside_the_tokenizer_is_found(tmp_path):
    folder = save("llava-llama", tmp_path / "llava")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert load_mllm(folder).tokenizer.chat_template == template
    (folder / "chat_template.json").unlink()
    with pytest.raises(InputError, match="has no chat template"):
        build_prefix(load_mllm(folder).tokenizer, "Same?", 4)


@pytest.mark.slow
def test_dense_weights_never_stand_all_at_once(tmp_path, monkeypatch):
    """82 MB in bf16, 21 MB in NF4: loading peaks far below the first, which a dense load, as a check, does not."""
    wide = dict(families.TEXT, hidden_size=256, intermediate_size=768, num_hidden_layers=64)
    monkeypatch.setattr(families, "TEXT", wide)
    folder = save("internvl", tmp_path / "wide", max_shard_size="20MB")
    shards = list(folder.glob("*.safetensors"))
    bf16 = sum(shard.stat().st_size for shard in shards) / 2
    assert len(shards) > 5
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # as with quantisation: what other threads make is not counted
    peaks = []
    for quantize in (True, False):
        with LiveBytes("cpu") as live:
            load_mllm(folder, quantize, torch.bfloat16)
        peaks.append(live.peak)
    assert peaks[0] < 0.4 * bf16 < 0.99 * bf16 < peaks[1]


@pytest.mark.parametrize("family", ["llava-llama", "qwen3-vl-tied"])
def test_a_head_in_nf4_is_the_dequantised_head_everywhere(family, tmp_path):
    folder = save(family, tmp_path / family)
    packed, dense = load_mllm(folder, quantize_head=True), load_mllm(folder)
    assert isinstance(packed.decoder.head, NF4Weight) and isinstance(packed.decoder.embedding, NF4Weight)
    assert (packed.decoder.head is packed.decoder.embedding) == family.endswith("tied")
    changed = nf4_dequantize(packed.decoder.head) - dense.decoder.head
    assert 0 < changed.norm() < 0.2 * dense.decoder.head.norm()
    dense.decoder.head = nf4_dequantize(packed.decoder.head)
    dense.decoder.embedding = nf4_dequantize(packed.decoder.embedding)

    ids = torch.tensor([3, 287, 0, 3, 64])
    assert torch.equal(packed.decoder.embed_tokens(ids), dense.decoder.embed_tokens(ids))
    features = VisualFeatures(torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(0)), ())
    prefix = build_prefix(packed.tokenizer, "Same?", 4, image=ImageMarkup(packed.image_token))
    prefix = PairPrefix.of(prefix, (2, 2) if packed.decoder.mrope else None)
    sampling = Sampling(group_size=3, temperature=1.0, top_p=0.9, max_new_tokens=8)
    drawn = [
        rollout_pairs(PrefixCache(m.decoder, prefix), features, torch.tensor([0]), sampling, (-1,))
        for m in (packed, dense)
    ]
    assert drawn[0] == drawn[1]
    groups = [Group(drawn[0][0], [torch.ones(8)] * 3, {})]
    ours, theirs = (
        replay_groups(PrefixCache(m.decoder, prefix), features, groups, 1.0, 0).log_probs[0] for m in (packed, dense)
    )
    torch.testing.assert_close(ours, theirs)


def test_a_head_that_nf4_cannot_hold_row_by_row_is_refused(tmp_path):
    folder = save("llava-llama", tmp_path / "llava")
    edit(folder / "config.json", lambda config: config["text_config"].update(hidden_size=96))
    with pytest.raises(InputError, match="supervisor.quantize-head: hidden states of .* are 96 wide"):
        load_mllm(folder, quantize_head=True)
