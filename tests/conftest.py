"""What must be said before anything imports PyTorch or Triton."""

import os

# Of the tests and of the processes that they start: sums of another number of threads have other bytes, and workers do
# not wait for each other's.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

# Without a GPU, Triton's kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from .touched import Touched, asked_for


def pytest_configure(config):
    if asked_for(config):
        config.pluginmanager.register(Touched())
