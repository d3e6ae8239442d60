"""Time and memory of evaluating an encoder on iNat-Aves' test half.

    python -m bench.evaluate [--classes 743] [--images-per-class 50] [--dimension 4096] [--json FILE]

Times `saga_fast.retrieval.metrics` in a process of its own, on unit vectors around a mean a class that overlap.
They are generated in that process, so its peak memory includes them, PyTorch and faiss. Embedding is not included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from bench import write_json
from saga_fast.data import cores
from saga_fast.retrieval.metrics import nmi, retrieve, summary


def embeddings(classes: int, images: int, dimension: int) -> tuple[Tensor, Tensor]:
    """Unit vectors of overlapping classes, and the labels: class means plus noise of twice their norm, in 64
    dimensions, rotated at random."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(classes).repeat_interleave(images)
    means, basis = torch.randn(classes, 64, generator=generator), torch.randn(64, dimension, generator=generator)
    inner = means[labels] + 2 * torch.randn(len(labels), 64, generator=generator)
    return torch.nn.functional.normalize(inner @ torch.linalg.qr(basis.T).Q.T), labels


def measure(classes: int, images: int, dimension: int) -> dict[str, float]:
    vectors, labels = embeddings(classes, images, dimension)
    began = time.perf_counter()
    scores = summary(retrieve(vectors, labels))
    searched = time.perf_counter()
    scores["nmi"] = nmi(vectors, labels)
    clustered = time.perf_counter()
    return {
        "seconds_search": searched - began,
        "seconds_nmi": clustered - searched,
        "seconds": clustered - began,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        **scores,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=743)
    parser.add_argument("--images-per-class", type=int, default=50)
    parser.add_argument("--dimension", type=int, default=4096)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    shape = (options.classes, options.images_per_class, options.dimension)

    load = os.getloadavg()[0]
    script = f"import json; from bench.evaluate import measure; print(json.dumps(measure{shape}))"
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    count = options.classes * options.images_per_class
    print(f"{count:,} x {options.dimension}, {options.classes} classes, {cores()} cores, load {load:.1f} before")
    print(f"{'search':>10}{'k-means':>10}{'together':>10}{'peak':>10}")
    seconds = "".join(f"{found[key]:8.1f} s" for key in ("seconds_search", "seconds_nmi", "seconds"))
    print(f"{seconds}{found['peak_gb']:7.2f} GB   R@1 {100 * found['recall_at_1']:.1f}, NMI {100 * found['nmi']:.1f}")
    write_json(options.json, {"embeddings": shape, "load_before": load, **found})


if __name__ == "__main__":
    main()
