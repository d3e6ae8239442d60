"""csrc/nf4_wgmma.h, the whole kernel, run on a CPU by wgmma.cpp, which emulates its instructions and their rules."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.cpp_extension import get_cxx_compiler

from bench.gpu.nf4 import quantise
from saga_kernels import NF4Weight, nf4_dequantize
from tests.sweep import sweep

CSRC = Path(__file__).parents[2] / "csrc"
TOLERANCE = {torch.bfloat16: 2.2e-3, torch.float16: 4e-4}  # a rounded result, and the codes' rounding
AT_ONCE, COPIES_LATE, PRODUCTS_LATE, LATE = range(4)
Kernel = Callable[..., tuple[str, Tensor]]


def build(folder: Path, header: str) -> Kernel:
    """The kernel as `header` has it."""
    (folder / "nf4_wgmma.h").write_text(header)
    library = folder / "nf4_wgmma.so"
    source = Path(__file__).with_name("wgmma.cpp")
    flags = ("-std=c++20", "-O2", "-w", "-shared", "-fPIC", f"-I{folder}", f"-I{CSRC}")
    subprocess.run([get_cxx_compiler(), *flags, "-o", library, source], check=True)
    run = ctypes.CDLL(str(library)).nf4_wgmma
    run.restype = ctypes.c_char_p
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    run.argtypes = [pointer] * 6 + [integer] * 4 + [pointer, ctypes.c_bool, integer, integer, ctypes.c_uint32]

    def kernel(x: Tensor, w: NF4Weight, parts: int, late: int, seed: int = 0) -> tuple[str, Tensor]:
        """The first rule that was broken, or nothing; and y."""
        y = torch.full((len(x), w.shape[0]), float("nan"), dtype=x.dtype)
        said = run(
            x.data_ptr(), *(part.data_ptr() for part in w.tensors()), w.offset.dim(), *w.shape, len(x), y.data_ptr(),
            x.dtype == torch.bfloat16, parts, late, seed,
        )  # fmt: skip
        return said.decode(), y

    return kernel


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    return build(tmp_path_factory.mktemp("wgmma"), (CSRC / "nf4_wgmma.h").read_text())


def case(rows, shape, dtype=torch.bfloat16, several=1):
    """x, W of `several` weights, which have an offset each, and x @ W.T in float64."""
    generator = torch.Generator().manual_seed(rows)
    parts = [quantise((i + 1) * torch.randn(shape, generator=generator).to(dtype)) for i in range(several)]
    w = parts[0] if several == 1 else NF4Weight.concatenate(parts)
    x = torch.randn(rows, shape[1], generator=generator).to(dtype)
    return x, w, x.double() @ nf4_dequantize(w, dtype=torch.float64).T


def distance(y, oracle):
    return ((y.double() - oracle).norm() / oracle.norm()).item()  # nan, where anything was not written


@pytest.mark.parametrize(
    "rows, shape, parts, dtype, several",
    sweep(
        [
            (33, (76, 1408), 3, torch.bfloat16, 1),
            (128, (256, 1024), 1, torch.float16, 2),
            (1, (4, 128), 1, torch.bfloat16, 1),
            (17, (260, 256), 2, torch.float16, 1),
            (32, (516, 384), 3, torch.bfloat16, 1),
            (64, (256, 2048), 8, torch.bfloat16, 2),
            (65, (132, 640), 2, torch.bfloat16, 1),
            (96, (128, 1024), 1, torch.bfloat16, 3),
            (97, (300, 512), 4, torch.bfloat16, 1),
            (128, (388, 1152), 5, torch.float16, 1),
        ],
        fast=2,
        several=True,
    ),
)
def test_products_equal_float64_and_the_instructions_rules_are_kept(kernel, rows, shape, parts, dtype, several):
    x, w, oracle = case(rows, shape, dtype, several)
    results = []
    for late in range(4):
        broken, y = kernel(x, w, parts, late, seed=late)
        assert not broken, broken
        assert distance(y, oracle) <= TOLERANCE[dtype]
        results.append(y)
    assert all(torch.equal(y, results[0]) for y in results), "the order of events changes the sums"


# What would be wrong on a GPU, and in which emulation it must show; other emulations may not see it.
FAULTS = {
    "tensor cores read what was not published": ("    Machine::publish();\n", "", LATE),
    "published before it is there": (
        "    Machine::template wait<ahead - 1>();\n    Machine::publish();\n",
        "    Machine::publish();\n    Machine::template wait<ahead - 1>();\n",
        LATE,
    ),
    "read before it is there": ("wait<ahead - 1>", "wait<ahead>", LATE),
    "copied onto what tensor cores read": ("stages = 4;", "stages = 3;", PRODUCTS_LATE),
    "copied onto what others decode": ("    Machine::sync();\n    copy_next();", "    copy_next();", LATE),
    "sums read before they are there": (
        "    Machine::template wait_for_products<columns>(d, factor.a);\n", "", PRODUCTS_LATE,
    ),
    "sums of the block before are kept": (", s > 0);", ", true);", LATE),
    "no fence": ("    Machine::fence();\n", "", LATE),
    "stages in use when the sums are put there": ("  Machine::sync();  // the stages", "  // the stages", LATE),
    "sums of others read too early": ("  Machine::sync_cluster();\n  for", "  for", LATE),
    "gone while others read it": ("  Machine::sync_cluster();  // until", "  // until", LATE),
    "not swizzled": ("^ row % 8) * 16)", "^ 0) * 16)", LATE),
    "words in another order": ("return 8 * s + 4 * half + t;", "return word;", LATE),
    "units that overlap": ("uint64_t{unit_bytes >> 4} << 32", "uint64_t{unit_bytes >> 5} << 32", LATE),
    "registers in another order": ("found.a[s][2 * i + h]", "found.a[s][2 * h + i]", LATE),
    "scales of other rows": ("4 * g + 2 * j + h)", "4 * g + j + 2 * h)", LATE),
    "the first offset for all": ("group * w.offset_step", "0", LATE),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_shows(fault, tmp_path):
    right, wrong, late = FAULTS[fault]
    header = (CSRC / "nf4_wgmma.h").read_text()
    assert header.count(right) == 1
    kernel = build(tmp_path, header.replace(right, wrong))
    x, w, oracle = case(64, (256, 1920), several=2)  # the last chunk of a part lies where the sums are put
    assert any(
        broken or not distance(y, oracle) <= TOLERANCE[torch.bfloat16]
        for broken, y in (kernel(x, w, 3, late, seed) for seed in range(4))
    )
