"""Builds `saga_kernels._C` from csrc/: C++ always; CUDA when PyTorch and a toolkit have it, unless SAGA_CUDA is 0.

TORCH_CUDA_ARCH_LIST names the GPUs; Hopper's own instructions need its "9.0a".
"""

import os

from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
from torch.version import cuda

sources = [f"csrc/{name}.cpp" for name in ("advantage", "attention", "decode", "linear", "pointwise", "sampling")]
# Without OpenMP at::parallel_for is a loop on one core; the runtime is the one PyTorch has loaded.
flags = {"cxx": ["-O3", "-std=c++20", "-fopenmp"]}
if cuda is not None and CUDA_HOME is not None and os.environ.get("SAGA_CUDA") != "0":
    extension, flags = CUDAExtension, {**flags, "nvcc": ["-O3"]}
    sources += ["csrc/advantage_cuda.cu", "csrc/nf4_cuda.cu"]
    # wgmma is an instruction of sm_90a alone, not of what comes after it.
    if "9.0a" in os.environ.get("TORCH_CUDA_ARCH_LIST", ""):
        sources.append("csrc/nf4_wgmma.cu")
else:
    extension = CppExtension
headers = ["csrc/multiply.h", "csrc/nf4.h", "csrc/nf4_wgmma.h", "csrc/vector.h"]

setup(
    ext_modules=[extension("saga_kernels._C", sources, depends=headers, extra_compile_args=flags)],
    cmdclass={"build_ext": BuildExtension},
)
