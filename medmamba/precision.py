"""How float32 is computed on a GPU: exactly, or through TF32, which keeps 10 of the 23 bits of a fraction.

torch computes convolutions through TF32 unless told otherwise. On an H200 six training steps then differed by 4e-4 from
run to run, and probabilities by 1.2e-3 from those of a CPU. The settings are the process's and do nothing on a CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

Precision = Literal["float32", "tf32", "bfloat16"]
"""float32: exact and reproducible. tf32: float32 in memory, products of convolutions and matrices through TF32.
bfloat16: those under torch's autocast, all else as torch has it."""


def set_precision(precision: Precision) -> None:
    """Sets for this process what `precision` asks of float32 products; a bfloat16 training keeps torch's defaults."""
    import torch  # not with the module: a recipe names a Precision, and most commands do without torch

    torch.backends.cudnn.allow_tf32 = precision != "float32"
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    # Without it cuDNN may take algorithms whose sums vary from run to run.
    torch.backends.cudnn.deterministic = precision == "float32"


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Float32 without TF32 inside the block, for predictions in a process whose own settings must stay as they are."""
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
    """(owner, attribute, its value without TF32), in torch's older interface unless the process uses the newer one.

    torch raises where one interface is read after the other was written.
    """
    import torch

    cudnn, cublas = torch.backends.cudnn, torch.backends.cuda.matmul
    try:
        _ = cudnn.allow_tf32, cublas.allow_tf32
    except RuntimeError:
        return [(cudnn.conv, "fp32_precision", "ieee"), (cublas, "fp32_precision", "ieee")]  # type: ignore[attr-defined]
    return [(cudnn, "allow_tf32", False), (cublas, "allow_tf32", False)]
