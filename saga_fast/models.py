"""Checks whether a model works as a supervisor, and the memory that it takes, before its weights are loaded.

    python -m saga_fast.models check ID_OR_FOLDER [--cards 24 40 80] [--section.field VALUE …]

The flags are those of `saga_fast.train`, and so are their defaults. Configuration, tokenizer and the processor's pixel
statistics are read, weights are not: the language model runs on the meta device, where tensors have no values, and the
tower once on the CPU, with uninitialised weights. Exit code 2 and one line for a model that cannot be used with these
flags.
"""

from __future__ import annotations

import sys

from saga_fast.config import TINY, CheckArguments, Config, parse_check
from saga_fast.utils.errors import InputError, exit_on_input_error

if __name__ == "__main__":  # --help and errors in flags come before the seconds that importing PyTorch takes
    with exit_on_input_error():
        parse_check(sys.argv[1:])

from collections.abc import Iterator, Sequence

import torch
from accelerate import init_empty_weights

from saga_fast.encoder import Encoder
from saga_fast.runtime.memory import GIB, FixedPlan, Predictor, Step, SupervisorParts, on_meta, quantize_head
from saga_fast.supervisor.families import KINDS
from saga_fast.supervisor.lengths import measure
from saga_fast.supervisor.mllm import Mllm, Pretrained, expect_head_in_blocks, read_pretrained
from saga_fast.supervisor.prompt_file import load_prompt
from saga_fast.supervisor.rollout import Sampling
from saga_fast.supervisor.supervisor import Supervisor
from saga_fast.tiny import SUPERVISOR


def check(name: str, config: CheckArguments) -> Iterator[str]:
    """The report about a model, line by line. Raises InputError for a model that cannot be used with `config`."""
    model = SUPERVISOR if name == TINY else name
    pretrained = read_pretrained(model, torch.bfloat16 if config.optim.precision == "bf16" else torch.float32)
    mllm = shapes(pretrained, config)
    side = config.data.image_size
    prompt, rollout = load_prompt(config.supervisor.prompt), config.rollout
    encoder = empty_encoder(mllm, config, prompt.attributes)
    rows, columns = encoder.tower.grid(side, side)
    decoder, text = mllm.decoder, pretrained.config.text_config
    kind = pretrained.config.model_type
    yield f"{model}: {KINDS[kind].name} ({kind}), which can be used"
    yield (
        f"tower: {_count(sum(p.numel() for p in encoder.tower.parameters()))} parameters, at {side} pixels "
        f"{rows * columns} tokens an image ({rows} x {columns} of {encoder.tower.width} numbers)"
    )
    yield (
        f"language model: {text.model_type}, {decoder.depth} layers of {text.hidden_size} numbers, "
        f"{text.vocab_size:,} words, {'in NF4' if config.supervisor.quantize else 'not quantised'}"
    )
    sampling = Sampling(rollout.group_size, rollout.temperature, rollout.top_p, rollout.max_new_tokens, config.seed)
    supervisor = Supervisor(
        mllm,
        prompt.as_generic() if config.supervisor.generic else prompt,
        config.supervisor.order,
        (rows, columns),
        sampling,
        config.supervisor.anchor_layer,
    )
    lengths = measure(supervisor)
    yield lengths.line(rollout.max_new_tokens)
    if shortage := lengths.shortage(rollout.max_new_tokens):
        yield f"warning: {shortage}"
    if decoder.window:
        yield f"sliding window: {decoder.window} tokens, which prompt and answer together do not pass"
    if decoder.head_dim > 128:
        yield f"heads: {decoder.head_dim} numbers each; on a GPU their attention runs in plain PyTorch, far slower"
    yield from _memory(supervisor, encoder, config)


def shapes(pretrained: Pretrained, config: Config) -> Mllm:
    """The model's parts on the meta device, with the shapes of their quantised weights."""
    decoder = on_meta(pretrained.mllm.decoder, config.supervisor.quantize)
    if config.supervisor.quantize_head:
        expect_head_in_blocks(pretrained)
        quantize_head(decoder)
    return pretrained.mllm._replace(decoder=decoder)


def empty_encoder(mllm: Mllm, config: Config, attributes: Sequence[str] = ()) -> Encoder:
    """The encoder on the CPU, with uninitialised weights and its real buffers."""
    with init_empty_weights(include_buffers=False):
        encoder = Encoder(
            mllm.visual.config.to_diff_dict(),
            config.encoder.pooler,
            config.encoder.embedding_dim,
            config.data.image_size,
            attributes,
        )
    for module in encoder.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, key, torch.nn.Parameter(torch.empty_like(parameter, device="cpu")))
    return encoder


def _memory(supervisor: Supervisor, encoder: Encoder, config: CheckArguments) -> Iterator[str]:
    batch = config.data.classes_per_batch * config.data.images_per_class
    states = 8 if config.optim.states == "8bit" else 32
    rollout = config.rollout
    step = Step(
        encoder, SupervisorParts.of(supervisor), batch, rollout.pairs, None, states, config.encoder.checkpointing,
        config.optim.precision == "bf16",
    )  # fmt: skip
    predictor = Predictor(step)
    yield "memory of a step, without the metric loss's proxies, GiB:"
    for name, size in predictor.resident.items():
        yield f"  {name:36}{size / GIB:8.2f}"
    for card in config.cards:
        try:
            plan, slots, footprint = predictor.choose(int(card * GIB), FixedPlan.of(config))
        except InputError as error:
            yield f"{card:g} GiB: too little; {str(error).removeprefix('memory: ')}"
        else:
            yield f"{card:g} GiB: peak {footprint.peak / GIB:.2f}; {slots} pairs roll out at once; replay with {plan}"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e8 else f"{number / 1e6:.1f} M"


def main(arguments: Sequence[str]) -> None:
    for line in check(*parse_check(arguments)):
        print(line, flush=True)


if __name__ == "__main__":
    with exit_on_input_error():
        main(sys.argv[1:])
