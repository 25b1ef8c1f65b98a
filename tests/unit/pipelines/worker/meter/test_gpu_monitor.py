"""NVML and the meter on a real GPU."""

import time

import pytest
import torch

from pipelines.worker.meter.gpu_monitor import EVERY_S, GpuMonitor
from pipelines.worker.meter.nvml import Nvml

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

GPU = torch.device("cuda", 0)


def load(seconds: float) -> None:
    """Keeps the GPU busy."""
    matrix = torch.randn(4096, 4096, device=GPU)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        matrix = torch.nn.functional.normalize(matrix @ matrix)
        torch.cuda.synchronize()


def test_a_busy_gpu_shows_its_utilization_memory_and_energy():
    monitor = GpuMonitor(GPU)
    try:
        load(3 * EVERY_S)
        monitor.restart()
        load(5 * EVERY_S)
        figures, energy_j = monitor.figures(), monitor.energy_j()
    finally:
        monitor.close()
    assert monitor.name == torch.cuda.get_device_name(GPU)
    assert 0.5 < figures["gpu_utilization"] <= 1
    assert 4096**2 * 4 / 2**30 < figures["gpu_memory_gib"] <= figures["gpu_reserved_gib"]
    assert energy_j > 50, "eight seconds at more than a few watts"


def test_a_gpu_that_nvml_does_not_know_has_no_figures_of_nvml():
    with pytest.raises(OSError, match="does not know GPU-none"):
        Nvml("GPU-none")
