"""What a query per attribute costs beside the paper's one: both poolers, forward and backward.

    python -m bench.pooler [--attributes 28] [--width 4096] [--batch 64] [--tokens 49] [--rounds 9] [--json FILE]

The poolers take turns, so that a machine that is busy for a while is so for both; printed are the medians and the ratio
of the medians. Backward is into parameters and tokens, as in phase A.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from bench import write_json
from saga_fast.encoder import AttributePooler, Pooler


def seconds(pooler: nn.Module, tokens: Tensor, gradient: Tensor) -> tuple[float, float]:
    """One forward pass, and one backward pass of `gradient` (B, D_e)."""

    def now() -> float:
        if tokens.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    pooler.zero_grad(set_to_none=True)
    tokens.grad = None
    began = now()
    embeddings = pooler(tokens)
    between = now()
    embeddings.backward(gradient)
    return between - began, now() - between


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attributes", type=int, default=28, help="M")
    parser.add_argument("--width", type=int, default=4096, help="D, and D_e")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=49)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    width = options.width
    poolers = {
        "attention": Pooler(width, width),
        "attributes": AttributePooler(width, width, [f"attribute {m}" for m in range(options.attributes)]),
    }
    tokens = torch.randn(options.batch, options.tokens, width, device=device, requires_grad=True)
    gradient = torch.randn(options.batch, width, device=device)
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in poolers}
    for turn in range(options.rounds + 1):
        for name, pooler in poolers.items():
            found = seconds(pooler.to(device), tokens, gradient)
            if turn:  # the first warms up
                took[name].append(found)

    figures = {}
    print(f"{'':12}{'forward, ms':>14}{'backward, ms':>14}{'parameters':>14}")
    for name, pooler in poolers.items():
        forward, backward = (1000 * statistics.median(part) for part in zip(*took[name]))
        count = sum(p.numel() for p in pooler.parameters())
        figures[name] = {"forward_ms": forward, "backward_ms": backward, "parameters": count}
        print(f"{name:12}{forward:14.1f}{backward:14.1f}{count:14,}")
    ratios = {key: figures["attributes"][key] / figures["attention"][key] for key in figures["attention"]}
    print(f"{'ratio':12}" + "".join(f"{ratio:14.2f}" for ratio in ratios.values()))
    shape = {key: getattr(options, key) for key in ("attributes", "width", "batch", "tokens", "rounds")}
    write_json(options.json, {**shape, "device": device, "poolers": figures, "ratio": ratios})


if __name__ == "__main__":
    main()
