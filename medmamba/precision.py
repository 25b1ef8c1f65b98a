"""Float32 arithmetic on a GPU: exact, or TF32, which keeps 10 of the fraction's 23 bits.

By default torch computes convolutions in TF32. On an H200 six training steps then differed by 4e-4 between runs, and
probabilities by 1.2e-3 from those of a CPU. The settings apply to the process and have no effect on a CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

Precision = Literal["float32", "tf32", "bfloat16"]
"""float32: exact and reproducible. tf32: float32 in memory, convolutions and matrix products in TF32. bfloat16: those
under torch's autocast, everything else with torch's defaults."""


def set_precision(precision: Precision) -> None:
    """Applies `precision` to the float32 products of this process; "bfloat16" keeps torch's defaults."""
    import torch  # lazy: recipes import this module, and most commands do not need torch

    torch.backends.cudnn.allow_tf32 = precision != "float32"
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    # By default cuDNN may choose algorithms whose sums vary between runs.
    torch.backends.cudnn.deterministic = precision == "float32"


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Disables TF32 inside the block and restores the process's settings, for predictions in a process of others."""
    import torch

    settings = [*_tf32_settings(), (torch.backends.cudnn, "deterministic", True)]
    before = [getattr(owner, name) for owner, name, _ in settings]
    for owner, name, exact in settings:
        setattr(owner, name, exact)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(settings, before, strict=True):
            setattr(owner, name, value)


def _tf32_settings() -> list[tuple[Any, str, Any]]:
    """(owner, attribute, value without TF32), in torch's older interface unless the process uses the newer one.

    torch raises if one interface is read after the other was written.
    """
    import torch

    cudnn, cublas = torch.backends.cudnn, torch.backends.cuda.matmul
    try:
        _ = cudnn.allow_tf32, cublas.allow_tf32
    except RuntimeError:
        return [(cudnn.conv, "fp32_precision", "ieee"), (cublas, "fp32_precision", "ieee")]  # type: ignore[attr-defined]
    return [(cudnn, "allow_tf32", False), (cublas, "allow_tf32", False)]
