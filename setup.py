"""Builds `saga_kernels._C` from csrc/: C++ always; CUDA when PyTorch and a toolkit have it, unless SAGA_CUDA is 0."""

import os

from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
from torch.version import cuda

sources = [f"csrc/{name}.cpp" for name in ("advantage", "decode", "pointwise", "sampling")]
flags = {
    "cxx": ["-O3", "-std=c++20", "-fopenmp"]
}  # at::parallel_for is one loop without the last; PyTorch has the runtime
if cuda is not None and CUDA_HOME is not None and os.environ.get("SAGA_CUDA") != "0":
    extension, sources, flags = CUDAExtension, [*sources, "csrc/advantage_cuda.cu"], {**flags, "nvcc": ["-O3"]}
else:
    extension = CppExtension

setup(
    ext_modules=[extension("saga_kernels._C", sources, depends=["csrc/vector.h"], extra_compile_args=flags)],
    cmdclass={"build_ext": BuildExtension},
)
