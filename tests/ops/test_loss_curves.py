"""Training with each backend of the scan: nano on real images, the same start and batches, one loss a step."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from medmamba.config import MedMambaConfig
from medmamba.model import build_model
from medmamba.ops.ss2d_scan import backends
from medmamba.preprocess import preprocess, resize_uint8

BATCH, SIDE = 16, 32
# Training amplifies rounding (Adam divides a gradient by its own size), so curves part whatever the scan does: the same
# backend on one CPU thread instead of two is 0.009 away within 10 steps, 0.29 within 200, and 0.028 in the mean of 20.
FIRST, FIRST_BAND = 10, 0.03  # each of the first steps, float32; numba against the reference 6e-7, see above for 0.009
MEAN_OF, MEAN_BAND = 20, 0.08  # mean of every 20 steps; measured 0.024 in float32 (numba), 0.043 in bfloat16
LEARNT = 0.6  # what is left of the loss, last 20 steps against the first 20, so that the bands are about training; 0.31


@pytest.fixture(scope="session")
def images(shared_dir):
    path = shared_dir / "data" / "pneumoniamnist.npz"
    if not path.is_file():
        pytest.skip(f"real images are not there: {path.name} is missing in {path.parent}")
    return path


@pytest.fixture
def same_arithmetic():
    """Nothing but the scan differs: no TF32 in convolutions, no choice of algorithm by time."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


@functools.cache
def batches(path: Path, steps: int):
    with np.load(path) as arrays:
        pixels, labels = arrays["train_images"], torch.from_numpy(arrays["train_labels"]).flatten().long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[: steps * BATCH]
    resized = torch.stack([torch.from_numpy(resize_uint8(pixels[i][..., None], SIDE).copy()) for i in order.tolist()])
    return list(zip(preprocess(resized).split(BATCH), labels[order].split(BATCH), strict=True))


@functools.cache
def losses(path: Path, backend: str, device: str, steps: int, dtype: torch.dtype = torch.float32):
    """The loss of each of `steps` AdamW steps, in float64 on the CPU."""
    torch.manual_seed(0)
    config = MedMambaConfig(variant="nano", num_classes=2, drop_path=0)
    model = build_model(config, scan=backend, device=device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for x, labels in batches(path, steps):
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(x.to(device)).float(), labels.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return torch.stack(found).double().cpu()


def check(path, backend, device, steps, dtype):
    if reason := backends(device)[backend]:
        pytest.skip(f"backend {backend}: {reason}")
    expected = losses(path, "reference", device, steps)
    found = losses(path, backend, device, steps, dtype)
    if dtype == torch.float32:
        assert (found - expected)[:FIRST].abs().max() <= FIRST_BAND
    means, expected_means = (x.unflatten(0, (-1, MEAN_OF)).mean(1) for x in (found, expected))
    assert (means - expected_means).abs().max() <= MEAN_BAND
    if len(means) > 1:
        assert means[-1] <= LEARNT * means[0]


CPU_BACKENDS = [name for name, reason in backends("cpu").items() if reason is None and name != "reference"]


@pytest.mark.parametrize(
    ("dtype", "steps"),
    [
        (torch.float32, 20),
        pytest.param(torch.float32, 200, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, 200, marks=pytest.mark.slow),  # of one call: test_ss2d_scan.py, half precision
    ],
    ids=["float32 20", "float32 200", "bfloat16 200"],
)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_cpu_backend_trains_along_the_definitions_curve(backend, dtype, steps, images, same_arithmetic):
    check(images, backend, "cpu", steps, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch sees no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["cuda", "mamba_ssm"])
def test_a_gpu_backend_trains_along_the_definitions_curve(backend, dtype, images, same_arithmetic):
    check(images, backend, "cuda", 200, dtype)
