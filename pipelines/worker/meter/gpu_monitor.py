"""Monitors a GPU: memory through torch, utilization and energy through NVML.

A thread queries NVML once a second, so no step waits for an answer. If NVML is not available (no permission, a MIG
slice, an old GPU), its figures are absent.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from pipelines.worker.meter.nvml import Nvml

EVERY_S = 1.0
GIB = 2**30


class GpuMonitor:
    """Watches the GPU of this process until `close`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.name = torch.cuda.get_device_name(device)
        torch.cuda.reset_peak_memory_stats(device)  # an earlier trial may have run in this process
        self._utilization, self._energy = nvml_readings(device)
        self._energy_began_j = self._energy() or 0.0
        self._lock, self._seen = threading.Lock(), list[float]()
        self._over = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def figures(self) -> dict[str, float]:
        """gpu_memory_gib and gpu_reserved_gib (peaks so far), and gpu_utilization (0 to 1, mean since `restart`)."""
        with self._lock:
            seen = list(self._seen)
        return {
            "gpu_memory_gib": torch.cuda.max_memory_allocated(self._device) / GIB,
            "gpu_reserved_gib": torch.cuda.max_memory_reserved(self._device) / GIB,
            **({"gpu_utilization": sum(seen) / len(seen)} if seen else {}),
        }

    def restart(self) -> None:
        """Resets the mean utilization."""
        with self._lock:
            self._seen.clear()

    def energy_j(self) -> float:
        """Joules the entire GPU has consumed since the monitor started; 0 if unknown."""
        now_j = self._energy()
        return now_j - self._energy_began_j if now_j is not None else 0.0

    def close(self) -> None:
        """Ends the thread."""
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(EVERY_S):
            value = self._utilization()
            if value is None:
                return
            with self._lock:
                self._seen.append(value)


def nvml_readings(device: torch.device) -> tuple[Callable[[], float | None], Callable[[], float | None]]:
    """Returns two functions: utilization (0 to 1) and energy since driver start (J). They return None if unknown."""
    try:
        # By UUID, because CUDA may number devices differently. Older torch versions lack the attribute.
        nvml = Nvml(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except (OSError, AttributeError):
        return lambda: None, lambda: None
    return nvml.utilization, nvml.energy_j
