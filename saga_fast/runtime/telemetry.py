"""Resource use of a step: CPU seconds and peak memory, and an NVIDIA GPU's power, utilisation, memory and energy.

Readings that NVML does not support, and all of them without a GPU, are left out without a warning.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Callable

import pynvml
import torch


class Telemetry:
    """Readings of `device` and of this process; constructed once, before the first step."""

    def __init__(self, device: torch.device) -> None:
        self._readings: dict[str, Callable[[], float]] = {}
        self._joules: Callable[[], float] | None = None  # since the driver was loaded
        self._energy = 0.0
        self._cpu = time.process_time()
        if device.type == "cuda":
            with contextlib.suppress(pynvml.NVMLError):
                self._open(device)

    def _open(self, device: torch.device) -> None:
        pynvml.nvmlInit()
        # By UUID: NVML ignores CUDA_VISIBLE_DEVICES.
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        gpu = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
        readings = {
            "gpu_power_watts": lambda: pynvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
            "gpu_utilisation": lambda: pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100,
            "gpu_memory_bytes": lambda: pynvml.nvmlDeviceGetMemoryInfo(gpu).used,
        }

        def joules() -> float:
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3

        for name, reading in readings.items():
            with contextlib.suppress(pynvml.NVMLError):  # a reading that this GPU does not support is left out
                reading()
                self._readings[name] = reading
        with contextlib.suppress(pynvml.NVMLError):
            self._energy = joules()
            self._joules = joules

    def read(self) -> dict[str, float]:
        """Since the last `read`: seconds_cpu, of all threads of this process, and gpu_joules. Since the process began:
        memory_peak_rss_bytes. Now: gpu_power_watts, gpu_utilisation (0 to 1), gpu_memory_bytes (of all processes)."""
        cpu, self._cpu = time.process_time() - self._cpu, time.process_time()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        read = {"seconds_cpu": cpu, "memory_peak_rss_bytes": peak * (1 if sys.platform == "darwin" else 1024)}
        for name, reading in self._readings.items():
            with contextlib.suppress(pynvml.NVMLError):
                read[name] = reading()
        if self._joules is not None:
            with contextlib.suppress(pynvml.NVMLError):
                energy = self._joules()
                read["gpu_joules"], self._energy = energy - self._energy, energy
        return read
