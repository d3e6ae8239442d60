"""No GPU, a GPU with few readings, trackers that are not installed: left out silently, or an error."""

from __future__ import annotations

import sys
import warnings
from types import SimpleNamespace

import pynvml
import pytest
import torch
from PIL import Image

from saga_fast.config import parse
from saga_fast.runtime.telemetry import Telemetry
from saga_fast.runtime.trackers import OptionalTracker, Tracker
from saga_fast.utils.errors import InputError

CPU = {"seconds_cpu", "memory_peak_rss_bytes"}


def test_without_a_gpu_only_the_process_is_read(capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        telemetry = Telemetry(torch.device("cpu"))
        ones = torch.ones(400, 400)
        for _ in range(20):
            ones @ ones
        read, idle = telemetry.read(), telemetry.read()
    assert read.keys() == CPU and capfd.readouterr() == ("", "")
    assert read["seconds_cpu"] > idle["seconds_cpu"] >= 0
    assert 2**20 < read["memory_peak_rss_bytes"] < 2**40


@pytest.fixture
def gpu(monkeypatch) -> SimpleNamespace:
    """A pretended GPU: its energy counter in mJ, and the NVML calls it refuses."""
    gpu = SimpleNamespace(energy=5_000, refuses=set(), asked=[])

    def answers(name, value):
        def call(handle):
            gpu.asked.append(name)
            assert handle == "the GPU"
            if name in gpu.refuses:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
            return value()

        monkeypatch.setattr(pynvml, name, call)

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12-34"))
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", {"GPU-12-34": "the GPU"}.__getitem__)
    answers("nvmlDeviceGetPowerUsage", lambda: 350_500)
    answers("nvmlDeviceGetUtilizationRates", lambda: SimpleNamespace(gpu=87, memory=40))
    answers("nvmlDeviceGetMemoryInfo", lambda: SimpleNamespace(total=80, free=30, used=50))
    answers("nvmlDeviceGetTotalEnergyConsumption", lambda: gpu.energy)
    return gpu


def test_a_gpu_is_read_in_watts_and_joules_a_step(gpu):
    telemetry = Telemetry(torch.device("cuda", 0))
    gpu.energy = 12_500
    read = telemetry.read()
    assert {name: read[name] for name in read.keys() - CPU} == {
        "gpu_power_watts": 350.5,
        "gpu_utilisation": 0.87,
        "gpu_memory_bytes": 50,
        "gpu_joules": 7.5,
    }
    gpu.energy = 12_600
    assert telemetry.read()["gpu_joules"] == pytest.approx(0.1)


def test_what_a_gpu_cannot_say_is_left_out_and_not_asked_again(gpu):
    gpu.refuses = {"nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetPowerUsage"}
    telemetry = Telemetry(torch.device("cuda", 0))
    gpu.asked.clear()
    assert telemetry.read().keys() == CPU | {"gpu_utilisation", "gpu_memory_bytes"}
    assert not gpu.refuses & set(gpu.asked)
    gpu.refuses |= {"nvmlDeviceGetUtilizationRates"}  # a GPU that fails in mid-run
    assert telemetry.read().keys() == CPU | {"gpu_memory_bytes"}


def test_without_nvidia_s_driver_there_is_no_reading(gpu, monkeypatch):
    def absent():
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", absent)
    assert Telemetry(torch.device("cuda", 0)).read().keys() == CPU


FAKE = """
calls = []
class Image:
    def __init__(self, value): self.size = value.size
def init(project, name, config): calls.append(("init", project, name, config))
def log(values, step): calls.append(("log", step, values))
def finish(): calls.append(("finish",))
"""


@pytest.mark.parametrize("tracker", ["trackio", "wandb"])
def test_a_tracker_gets_what_tensorboard_gets(tracker, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=f"--tracker: {tracker} is not installed; `pip install {tracker}`"):
        parse(["--tracker", tracker, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()

    (tmp_path / f"{tracker}.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path)
    assert parse(["--tracker", tracker, "--out", str(tmp_path / "run")]).config.tracker == tracker
    tensorboard = Tracker(tmp_path / "run", OptionalTracker(tracker, "run", {"seed": 0}))
    tensorboard.scalars(3, {"loss": 0.5})
    tensorboard.image(3, "gallery", Image.new("RGB", (4, 2)))
    tensorboard.close()
    begun, logged, (_, step, shown), ended = sys.modules.pop(tracker).calls
    assert begun == ("init", "saga_fast", "run", {"seed": 0}) and logged == ("log", 3, {"loss": 0.5})
    assert step == 3 and shown["gallery"].size == (4, 2) and ended == ("finish",)
    assert list((tmp_path / "run").glob("events.out.tfevents*"))
