"""Builds `saga_kernels._C` from csrc/: C++ always; CUDA when PyTorch and a toolkit have it, unless SAGA_CUDA is 0."""

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
else:
    extension = CppExtension
headers = ["csrc/multiply.h", "csrc/vector.h"]

setup(
    ext_modules=[extension("saga_kernels._C", sources, depends=headers, extra_compile_args=flags)],
    cmdclass={"build_ext": BuildExtension},
)
