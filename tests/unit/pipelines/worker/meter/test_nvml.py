"""The calls to NVML against a library of its interface, built here: what is read, and what is absent."""

import shutil
import subprocess
from pathlib import Path

import pytest

from pipelines.worker.meter.nvml import Nvml

SOURCE = """
#include <string.h>
typedef struct { unsigned int gpu, memory; } rates;
static int device;
int nvmlInit_v2(void) { return INIT; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
    *handle = &device;
    return strcmp(uuid, "GPU-1") ? 6 : 0;
}
int nvmlDeviceGetUtilizationRates(void *handle, rates *found) {
    if (handle != &device) return 2;
    found->gpu = 37; found->memory = 5;
    return SAID;
}
#ifdef HAS_ENERGY
int nvmlDeviceGetTotalEnergyConsumption(void *handle, unsigned long long *found) {
    if (handle != &device) return 2;
    *found = 5000000000500ULL;
    return SAID;
}
#endif
"""


@pytest.fixture
def library(tmp_path):
    """Builds a library with the given macros."""
    compiler = shutil.which("cc") or pytest.skip("needs a C compiler")

    def build(*macros: str) -> str:
        path = Path(tmp_path / "libnvml.so")
        command = [compiler, "-shared", "-fPIC", *macros, "-x", "c", "-", "-o", str(path)]
        subprocess.run(command, input=SOURCE, text=True, check=True)
        return str(path)

    return build


def test_utilization_and_energy_are_read_in_shares_and_joules(library):
    nvml = Nvml("GPU-1", library("-DINIT=0", "-DSAID=0", "-DHAS_ENERGY"))
    assert (nvml.utilization(), nvml.energy_j()) == (0.37, 5000000000.5)


def test_what_nvml_does_not_say_or_does_not_have_is_absent(library):
    nvml = Nvml("GPU-1", library("-DINIT=0", "-DSAID=3"))
    assert (nvml.utilization(), nvml.energy_j()) == (None, None)


@pytest.mark.parametrize(
    ("uuid", "macro"), [("GPU-2", "-DINIT=0"), ("GPU-1", "-DINIT=9")], ids=["unknown", "no driver"]
)
def test_a_gpu_that_cannot_be_asked_is_an_os_error(uuid, macro, library):
    with pytest.raises(OSError, match=f"does not know {uuid}"):
        Nvml(uuid, library(macro, "-DSAID=0"))


def test_a_machine_without_nvml_is_an_os_error(tmp_path):
    with pytest.raises(OSError):
        Nvml("GPU-1", str(tmp_path / "libnvidia-ml.so.1"))
