"""The four benchmark presets are the paper's configuration, number by number."""

from __future__ import annotations

import pytest

from saga_fast.config import PRESETS, parse
from saga_fast.data import DATASETS
from saga_fast.supervisor.prompt import PROMPTS


@pytest.mark.parametrize(
    ("preset", "prompt", "attributes", "proxies"),
    [
        ("cub", "birds", 28, 15),
        ("cars", "cars", 17, 15),
        ("aircraft", "aircraft", 17, 15),
        ("inat-aves", "birds", 28, 2),
    ],
)
def test_a_benchmark_preset_is_the_papers_configuration(preset, prompt, attributes, proxies, tmp_path):
    out = tmp_path / "run"
    config = parse([preset, "--data.root", str(tmp_path), "--supervisor.model", "some/model", "--out", str(out)]).config
    assert config.supervisor.model == "some/model" and config.data.root == tmp_path
    assert PRESETS[preset].supervisor.model == "Qwen/Qwen3-VL-8B-Instruct"

    data, rollout, optim, dml = config.data, config.rollout, config.optim, config.dml
    assert data.name == preset and preset in DATASETS
    assert data.image_size == 224 and data.classes_per_batch * data.images_per_class == 64
    assert (config.encoder.pooler, config.encoder.embedding_dim) == ("attention", 4096)
    assert (rollout.credit, config.lambda_.adaptive) == ("verdict", False)
    assert config.supervisor.prompt == prompt and len(PROMPTS[prompt].attributes) == attributes
    assert config.supervisor.quantize and not config.supervisor.generic
    assert (rollout.group_size, rollout.pairs, rollout.max_new_tokens) == (8, 8, 1024)
    assert (rollout.temperature, rollout.top_p) == (0.7, 0.95)
    assert (dml.loss, dml.alpha, dml.proxies_per_class) == ("potential-field", 3.0, proxies)
    assert 0.1 <= dml.delta <= 0.3
    assert (config.lambda_.dml, config.lambda_.lm, config.lambda_.kl) == (1, 1, 1)
    assert (optim.encoder_lr, optim.pooler_lr, optim.epochs, optim.steps) == (2e-5, 1e-4, 3, None)
    assert (optim.warmup, optim.clip, optim.precision) == (0.05, 1.0, "bf16")
