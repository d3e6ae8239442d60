"""Throughput of the data loader, in images per second, compared with what training steps need.

    python -m bench.loader --data.name NAME --data.root DIR [--step-seconds S] [--micro-batches N] [--json FILE]

Decodes the micro-batches that training would draw, with each row's number of worker processes. Where a half of the
data set fits in memory, a run decodes it once, at its start, and keeps it; the last lines of the output report this.

The need is the number of images in a step's micro-batches over the step's time. By default both are the worst case: the
four micro-batches that the paper's presets allow at most, in the 3.3 seconds that rollouts and replay take one H100 at
best (1,024 tokens at 1.5 ms each, then 1.4 PFLOP at 800 TFLOP/s). A run's own times are in its metrics.jsonl.
"""

from __future__ import annotations

import argparse
import time
from itertools import islice
from pathlib import Path

from bench import write_json
from saga_fast.config import DataConfig
from saga_fast.data import ClassBalancedSampler, ImageDataset, cores, load_dataset
from saga_fast.data.loader import MEMORY_LIMIT, Decoder, prefetch
from saga_fast.utils.errors import InputError, exit_on_input_error

BATCH = DataConfig.classes_per_batch * DataConfig.images_per_class


def rate(data: ImageDataset, size: int, workers: int, seconds: float) -> float:
    """Images per second, over `seconds` or a little more, after every worker has delivered a micro-batch."""
    sampler = ClassBalancedSampler(data.labels, DataConfig.classes_per_batch, DataConfig.images_per_class)
    stream = prefetch(Decoder(data, size), sampler, workers)
    for _ in islice(stream, max(1, workers)):
        pass
    started, images = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < seconds:
        indices, _, faults = next(stream)
        if faults:
            raise InputError(next(iter(faults.values())))
        images += len(indices)
    return images / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data.name", "--name", dest="name", default="folder")
    parser.add_argument("--data.root", "--root", dest="root", type=Path)
    parser.add_argument("--data.image-size", dest="size", type=int, default=DataConfig.image_size)
    parser.add_argument("--data.workers", dest="workers", type=int, nargs="+", help="default 0, 1, 2, 4, 8 up to cores")
    parser.add_argument("--micro-batches", type=int, default=4, help=f"of a step, each of {BATCH} images")
    parser.add_argument("--step-seconds", type=float, default=3.3)
    parser.add_argument("--seconds", type=float, default=5.0, help="to measure each row for")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    with exit_on_input_error():
        halves = dict(zip(("train", "test"), load_dataset(options.name, options.root)))
        workers = options.workers or [count for count in (0, 1, 2, 4, 8) if count <= cores()]
        need = options.micro_batches * BATCH / options.step_seconds
        print(f"need: {options.micro_batches} x {BATCH} images in {options.step_seconds} s = {need:.0f} images/s")
        print(f"{'workers':>7}{'images/s':>10}{'of need':>9}")
        rates = {}
        for count in workers:
            rates[count] = rate(halves["train"], options.size, count, options.seconds)
            print(f"{count:7}{rates[count]:10.0f}{rates[count] / need:8.1f}x", flush=True)
        fits = {}
        for half, data in halves.items():
            size = len(data) * 3 * options.size**2
            fits[half] = size <= MEMORY_LIMIT
            how = "kept in memory, decoded once" if fits[half] else "decoded as it is drawn"
            seconds = len(data) / max(rates.values())
            print(f"{half}: {size / 2**30:.2f} GiB, {how}; {seconds:.0f} s to read it all at the start of a run")
    figures = {"images_per_second": rates, "need": need, "kept_in_memory": fits}
    write_json(options.json, {"data": options.name, "image_size": options.size, **figures})


if __name__ == "__main__":
    main()
