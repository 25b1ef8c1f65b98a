"""What surrounds mamba-ssm's kernels, without a GPU: a loop in PyTorch stands for the compiled extension."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from test_ss2d_scan import NAMES, inputs, worst

from medmamba.ops.ss2d_scan import backends, mamba_ssm, scan


class Extension:
    """fwd and bwd as selective_scan_cuda has them: rows grouped by K over B and C, softplus, no gate."""

    @staticmethod
    def fwd(u, delta, a, b, c, skip, gate, bias, softplus):
        assert gate is None
        assert softplus
        assert all(x.is_contiguous() and x.dtype == torch.float32 for x in (u, delta, a, b, c, skip, bias))
        rows, states = a.shape
        b, c = (x.repeat_interleave(rows // x.shape[1], 1) for x in (b, c))
        delta = F.softplus(delta + bias[:, None])
        h, found = u.new_zeros(len(u), rows, states), []
        for i in range(u.shape[2]):
            h = (delta[..., i, None] * a).exp() * h + (delta * u)[..., i, None] * b[..., i]
            found.append((h * c[..., i]).sum(-1))
        return torch.stack(found, -1) + skip[:, None] * u, u.new_zeros(len(u), rows, 1, 2 * states)

    @staticmethod
    def bwd(u, delta, a, b, c, skip, gate, bias, dy, kept, out, dgate, softplus, recompute):
        assert kept.shape[2] == 1
        leaves = [x.detach().requires_grad_() for x in (u, delta, a, b, c, skip, bias)]
        with torch.enable_grad():
            y, _ = Extension.fwd(*leaves[:6], gate, leaves[6], softplus)
        return list(torch.autograd.grad(y, leaves, dy))


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(mamba_ssm, "_extension", lambda: Extension)
    with torch.library._scoped_library("medmamba", "IMPL") as library:
        library.impl("selective_scan", mamba_ssm._run_forward, "CPU")
        library.impl("selective_scan_backward", mamba_ssm._run_backward, "CPU")
        yield


def outputs(tensors, run):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    y = run(*leaves)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype))
    return {"y": y.detach()} | {f"grad of {n}": x.grad for n, x in zip(NAMES, leaves, strict=True)}


@pytest.mark.parametrize("shape", [(1, 1, 1, 8, 1, 16), (2, 3, 5, 13, 2, 7), (2, 6, 4, 16, 1, 16)], ids=str)
def test_orders_lift_and_sum_are_those_of_the_definition(on_cpu, shape):
    tensors = inputs(shape)
    expected = outputs([x.double() for x in tensors], lambda *x: scan(*x, backend="reference"))
    found = outputs(tensors, mamba_ssm.scan)
    assert {name: error for name, error in worst(found, expected).items() if error > 1e-5} == {}


def test_half_precision_comes_back_as_it_came(on_cpu):
    tensors = [
        x.detach().to(torch.bfloat16) if n in ("u", "dt", "B", "C") else x
        for n, x in zip(NAMES, inputs((2, 5, 6, 16, 1, 16)), strict=True)
    ]
    found = outputs(tensors, mamba_ssm.scan)
    assert found["y"].dtype == found["grad of u"].dtype == torch.bfloat16
    expected = outputs([x.double() for x in tensors], lambda *x: scan(*x, backend="reference"))
    assert {n: e for n, e in worst(found, expected).items() if e > 2e-2} == {}


def test_the_operator_passes_torchs_own_checks(on_cpu):
    u = torch.randn(2, 4 * 6, 10)
    rest = -torch.rand(4 * 6, 16), torch.randn(2, 4, 16, 10), torch.randn(2, 4, 16, 10), torch.randn(24), torch.rand(24)
    arguments = [x.requires_grad_() for x in (u, torch.randn_like(u), *rest)]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(mamba_ssm._forward, arguments, test_utils=tests)


def test_where_it_cannot_run_the_reason_is_told(monkeypatch):
    assert backends("cpu")["mamba_ssm"] == "it requires a CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert mamba_ssm.unusable("cuda") == "torch finds no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mamba_ssm, "_EXTENSION", "no_such_extension")
    mamba_ssm._extension.cache_clear()
    assert "cannot be imported (No module named 'no_such_extension')" in mamba_ssm.unusable("cuda")
