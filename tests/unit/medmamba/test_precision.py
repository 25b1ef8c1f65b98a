"""What `precision` does to float32 products: flags on any machine, figures on a GPU."""

import subprocess
import sys

import pytest
import torch

from medmamba.config import MedMambaConfig
from medmamba.model import build_model
from medmamba.precision import exact_float32, set_precision


@pytest.fixture(autouse=True)
def _as_before():
    cudnn, cublas = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, cublas.allow_tf32, cudnn.deterministic
    yield
    cudnn.allow_tf32, cublas.allow_tf32, cudnn.deterministic = before


def flags():
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.deterministic


@pytest.mark.parametrize(
    ("precision", "expected"),
    [("float32", (False, False, True)), ("tf32", (True, True, False)), ("bfloat16", (True, False, False))],
)
def test_only_float32_is_exact_and_only_tf32_rounds(precision, expected):
    for before in ("float32", "tf32", "bfloat16"):  # a process may have trained something else before
        set_precision(before)
        set_precision(precision)
        assert flags() == expected


def test_a_prediction_leaves_its_processs_settings_alone():
    set_precision("tf32")
    with exact_float32():
        assert flags() == (False, False, True)
    assert flags() == (True, True, False)


def test_it_works_where_torchs_newer_interface_is_in_use():
    code = """
import torch
from medmamba.precision import exact_float32
conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
torch.backends.cudnn.allow_tf32 = True
conv.fp32_precision = matmul.fp32_precision = "ieee"  # now reading allow_tf32 raises
conv.fp32_precision = matmul.fp32_precision = "tf32"
with exact_float32():
    assert (conv.fp32_precision, matmul.fp32_precision) == ("ieee", "ieee")
assert (conv.fp32_precision, matmul.fp32_precision) == ("tf32", "tf32")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def trained(device, steps=6):
    """Weights of nano after some steps of SGD on fixed images."""
    torch.manual_seed(0)
    model = build_model(MedMambaConfig(variant="nano", num_classes=3), scan="auto", device=device).train()
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(steps):
        torch.manual_seed(2)  # drop-path
        images = torch.randn(16, 3, 64, 64, generator=generator).to(device)
        labels = torch.randint(3, (16,), generator=generator).to(device)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return {name: value.detach().cpu() for name, value in model.state_dict().items()}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch sees no CUDA device")
def test_six_float32_steps_on_a_gpu_give_the_same_weights_twice():
    set_precision("float32")
    first, again = trained("cuda"), trained("cuda")
    assert [name for name in first if not torch.equal(first[name], again[name])] == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch sees no CUDA device")
@pytest.mark.parametrize(("precision", "is_exact"), [("float32", True), ("tf32", False)])
def test_gpu_probabilities_equal_cpu_ones_unless_tf32(precision, is_exact):
    torch.manual_seed(0)
    model = build_model(MedMambaConfig(variant="nano", num_classes=3), scan="auto", device="cpu").eval()
    images = torch.randn(16, 3, 64, 64)
    on_gpu = build_model(MedMambaConfig(variant="nano", num_classes=3), scan="auto", device="cuda").eval()
    on_gpu.load_state_dict(model.state_dict())
    set_precision(precision)
    with torch.no_grad():
        expected, found = model(images).softmax(1), on_gpu(images.cuda()).softmax(1).cpu()
    assert (float((expected - found).abs().max()) < 1e-5) is is_exact
