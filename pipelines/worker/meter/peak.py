"""The theoretical peak of a GPU from NVIDIA's datasheets, in images/s of a network."""

from __future__ import annotations

from medmamba.config import ConvNetConfig, MedMambaConfig
from medmamba.cost import macs
from medmamba.precision import Precision

# TFLOP/s from NVIDIA's datasheets; tensor core figures that include sparsity are halved.
_H100: dict[Precision, float] = {"float32": 67, "tf32": 494.5, "bfloat16": 989}
_A100: dict[Precision, float] = {"float32": 19.5, "tf32": 156, "bfloat16": 312}
_V100: dict[Precision, float] = {"float32": 15.7}  # no TF32 and no bfloat16
_PEAKS: dict[str, dict[Precision, float]] = {  # by torch.cuda.get_device_name()
    "NVIDIA H200": _H100,
    "NVIDIA H100 80GB HBM3": _H100,
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA L4": {"float32": 30.3, "tf32": 60, "bfloat16": 121},
    "Tesla V100-SXM2-16GB": _V100,
    "Tesla V100-SXM2-32GB": _V100,
}
PASSES = 3  # forward, and a backward pass with twice as many products
FLOPS_PER_MAC = 2


def peak_images_per_s(
    config: MedMambaConfig | ConvNetConfig, side: int, gpu: str, precision: Precision
) -> float | None:
    """Images/s of a training that used the full arithmetic peak of one GPU; None if GPU or network is unknown."""
    peak = _PEAKS.get(gpu, {}).get(precision)
    if peak is None or not isinstance(config, MedMambaConfig):
        return None
    return peak * 1e12 / (PASSES * FLOPS_PER_MAC * macs(config, side))
