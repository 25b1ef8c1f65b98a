"""The few calls to NVIDIA's management library (NVML) that are needed here, through ctypes.

The driver brings the library, so no package has to be installed for it.
"""

from __future__ import annotations

import ctypes

LIBRARY = "libnvidia-ml.so.1"


class _Utilization(ctypes.Structure):
    """nvmlUtilization_t: percent of the last sample period, at most a second."""

    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class Nvml:
    """One GPU, by its UUID ("GPU-..."). Raises OSError where NVML or the GPU is not there."""

    def __init__(self, uuid: str, library: str = LIBRARY) -> None:
        self._library = ctypes.CDLL(library)
        self._handle = ctypes.c_void_p()
        try:
            found = self._library.nvmlInit_v2() or self._library.nvmlDeviceGetHandleByUUID(
                uuid.encode(), ctypes.byref(self._handle)
            )
        except AttributeError as error:  # an NVML without one of the two
            raise OSError(f"{library}: {error}") from None
        if found:
            raise OSError(f"{library} does not know {uuid} (nvmlReturn_t {found})")

    def utilization(self) -> float | None:
        """Share of the last moment in which a kernel ran, 0 to 1; None where NVML does not say."""
        rates = _Utilization()
        return rates.gpu / 100 if self._asked("nvmlDeviceGetUtilizationRates", rates) else None

    def energy_j(self) -> float | None:
        """Joules since the driver was loaded; None where NVML does not say (before Volta)."""
        millijoules = ctypes.c_ulonglong()
        return millijoules.value / 1000 if self._asked("nvmlDeviceGetTotalEnergyConsumption", millijoules) else None

    def _asked(self, name: str, into: ctypes.Structure | ctypes.c_ulonglong) -> bool:
        """Calls a function that fills `into`; whether it did."""
        function = getattr(self._library, name, None)
        return function is not None and function(self._handle, ctypes.byref(into)) == 0
