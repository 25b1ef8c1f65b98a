"""The few NVML calls needed here, through ctypes. The NVIDIA driver ships the library, so no package is needed."""

from __future__ import annotations

import ctypes

LIBRARY = "libnvidia-ml.so.1"


class _Utilization(ctypes.Structure):
    """nvmlUtilization_t: percent of the last sample period (up to one second)."""

    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class Nvml:
    """One GPU, by its UUID ("GPU-..."). Raises OSError if NVML or the GPU is not found."""

    def __init__(self, uuid: str, library: str = LIBRARY) -> None:
        self._library = ctypes.CDLL(library)
        self._handle = ctypes.c_void_p()
        try:
            found = self._library.nvmlInit_v2() or self._library.nvmlDeviceGetHandleByUUID(
                uuid.encode(), ctypes.byref(self._handle)
            )
        except AttributeError as error:  # an NVML without one of the two functions
            raise OSError(f"{library}: {error}") from None
        if found:
            raise OSError(f"{library} does not know {uuid} (nvmlReturn_t {found})")

    def utilization(self) -> float | None:
        """Share of the last sample period in which a kernel ran, 0 to 1; None if unknown."""
        rates = _Utilization()
        return rates.gpu / 100 if self._query("nvmlDeviceGetUtilizationRates", rates) else None

    def energy_j(self) -> float | None:
        """Joules since the driver was loaded; None if unknown (GPUs before Volta)."""
        millijoules = ctypes.c_ulonglong()
        return millijoules.value / 1000 if self._query("nvmlDeviceGetTotalEnergyConsumption", millijoules) else None

    def _query(self, name: str, into: ctypes.Structure | ctypes.c_ulonglong) -> bool:
        """Calls a function that fills `into`; returns whether it succeeded."""
        function = getattr(self._library, name, None)
        return function is not None and function(self._handle, ctypes.byref(into)) == 0
