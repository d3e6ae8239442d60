"""Data parallelism over the processes of `torchrun`, with PyTorch's collectives.

    torchrun --nproc-per-node 8 -m saga_fast.train …

Each rank holds all weights. All ranks draw the same batches and pairs, each computes its share, and results are
gathered on all of them, so that all take the same decisions. The loss of a step is the *sum* of the ranks'
losses; gradients are summed over the ranks before the update. With one process there is no communication and no
process group.

Left out: sharded weights and optimizer states, and an all-reduce that overlaps with the backward pass: a step takes
seconds, the all-reduce milliseconds (`python -m bench.scale --ranks 1..512`).
"""

from __future__ import annotations

import heapq
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from saga_fast.utils.devices import expect_device

Item = TypeVar("Item")

# How long a rank waits for the others: they may be reading a data set, or the first may be clustering embeddings.
TIMEOUT = timedelta(minutes=30)


class OutOfSync(RuntimeError):
    """Ranks have different weights, which should be equal."""


@contextmanager
def process_group() -> Iterator[None]:
    """The process group of torchrun's processes, by NCCL on GPUs, else by Gloo; no group without torchrun."""
    if not dist.is_torchelastic_launched():
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(device())
    store, number, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
    # Restarted processes may get the store of the failed ones, and must not read the addresses left in it.
    store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=number, world_size=count, timeout=TIMEOUT)
    try:
        yield
    except Exception as error:
        get_error_handler().record_exception(error)  # so that torchrun can report the error of each rank
        raise  # without destroying the group, which could wait for a rank that has ended
    dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size() -> int:
    """Number of ranks on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if dist.is_initialized() else 1


def device() -> torch.device:
    """The GPU of this process by torchrun's local rank, or the CPU where there is none. Raises InputError for a GPU
    that does not run."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    found = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    expect_device(str(found))
    return found


def launcher() -> list[str]:
    """The command line that started this process, without the module's own arguments."""
    typed = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    if not dist.is_torchelastic_launched():
        return typed
    return [
        "torchrun",
        "--nproc-per-node",
        os.environ["LOCAL_WORLD_SIZE"],
        *(typed[typed.index("-m") :] if "-m" in typed else typed[-1:]),
    ]


def all_gather_object(value: Item) -> list[Item]:
    """The `value` (picklable, small) of every rank, in order of rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def shard_rows(count: int) -> Tensor:
    """Indices of this rank's share of `count` rows: int64 (⌈count / world size⌉,); they wrap around to the first rows
    where `count` is not a multiple of the world size."""
    per_rank = -(-count // world_size())
    return (rank() * per_rank + torch.arange(per_rank)) % count


def all_gather_rows(shard: Tensor, count: int) -> Tensor:
    """All `count` rows, from the shards (`shard_rows(count)`) of all ranks. Its backward sums the ranks' gradients."""
    return shard if world_size() == 1 else _AllGather.apply(shard)[:count]


class _AllGather(torch.autograd.Function):
    """As `torch.distributed.nn.functional.all_gather`, which is deprecated in PyTorch 2.13, without successor in
    2.11."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor) -> Tensor:
        parts = [torch.empty_like(shard) for _ in range(world_size())]
        dist.all_gather(parts, shard.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[rank()]


def all_reduce_sum(tensors: Sequence[Tensor]) -> None:
    """Replaces each tensor (all of one dtype) by its sum over the ranks, bitwise equal on all of them. One collective
    on a flat copy: it takes the memory of all gradients, when activations are freed already, and one latency."""
    if world_size() > 1 and tensors:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(total.view_as(tensor))


def all_reduce_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sums `.grad` over the ranks. A gradient that a rank lacks counts as zero; one that all lack stays None, as the
    optimizer skips such a parameter."""
    if world_size() > 1:
        present = all_gather_object([parameter.grad is not None for parameter in parameters])
        owners = [parameter for parameter, *has_gradient in zip(parameters, *present) if any(has_gradient)]
        for parameter in owners:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        all_reduce_sum([parameter.grad for parameter in owners])


def balance_loads(sizes: Sequence[int], shares: int) -> list[list[int]]:
    """Distributes items of the given `sizes` over `shares` lists of nearly equal total; returns their indices,
    ascending.

    Longest processing time first (Graham 1969): the largest total is at most 4/3 of the optimum.
    """
    assigned: list[list[int]] = [[] for _ in range(shares)]
    loads = [(0, share) for share in range(shares)]
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        load, lightest = loads[0]
        assigned[lightest].append(i)
        heapq.heapreplace(loads, (load + sizes[i], lightest))
    return [sorted(items) for items in assigned]


def assert_in_sync(*modules: nn.Module) -> None:
    """Raises OutOfSync, on every rank, if the modules' parameters differ between ranks, by a checksum of their bits."""
    if world_size() == 1:
        return
    names = [name for module in modules for name, _ in module.named_parameters()]
    sums = [p.detach().contiguous().view(torch.uint8).sum() for module in modules for p in module.parameters()]
    checksums = all_gather_object(torch.stack(sums).tolist())
    for other, theirs in enumerate(checksums):
        if theirs != checksums[0]:
            name = next(name for name, ours, its in zip(names, checksums[0], theirs) if ours != its)
            raise OutOfSync(
                f"rank {other}: its {name} is no longer rank 0's, so the ranks train different encoders; the last "
                "checkpoint is intact: resume from it, and check that rank's device"
            )
