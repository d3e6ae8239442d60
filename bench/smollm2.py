"""SmolLM2-135M-Instruct as a supervisor whose answers are known.

It reads no images. Its prompt is cut so that two runs of ordinary words stand where images would, with their own
embeddings for visual tokens: then rollout and replay must say what the plain language model says.
"""

from __future__ import annotations

from torch import nn
from transformers import LlamaForCausalLM

from saga_fast.encoder import VisualFeatures
from saga_fast.supervisor.decoder import FrozenDecoder
from saga_fast.supervisor.pair import PairPrefix
from saga_fast.supervisor.prompt import Prefix
from saga_fast.tiny.smollm2 import installed, load

__all__ = ["ask", "installed", "load", "quantize_layers"]

WORDS = 4  # tokens that stand for one image


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
