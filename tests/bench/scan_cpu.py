"""The CPU scans side by side: both compiled backends, the plain loop over positions, and the same in blocks.

    python tests/bench/scan_cpu.py [--rounds 3] [--side 56] [--json]

Every round runs each of them once, forward and backward, so that a machine that others use too slows all of them;
the median counts. No time is told of one that is not the definition in float64.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own habit)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from medmamba.ops.ss2d_scan import backends, reference, scan

BLOCK = 32
TOLERANCE = 1e-5


def in_blocks(u_BHWD, dt_BHWKR, B_BHWKN, C_BHWKN, dt_weight_KDR, dt_bias_KD, A_log_KDN, D_KD) -> Tensor:
    """reference.scan, a block of positions after the other: only the states between blocks are kept for backward."""
    height, width = u_BHWD.shape[1:3]
    u_BKLD = reference.in_four_orders(u_BHWD.unsqueeze(3).expand(-1, -1, -1, 4, -1))
    rows = [reference.in_four_orders(x) for x in (dt_BHWKR, B_BHWKN, C_BHWKN)]
    A_KDN = -A_log_KDN.exp()
    h_BKDN = u_BHWD.new_zeros(len(u_BHWD), *A_KDN.shape)
    blocks = []
    for block in zip(*(x.split(BLOCK, 2) for x in (u_BKLD, *rows)), strict=True):
        y_BKTD, h_BKDN = checkpoint(
            _block, h_BKDN, *block, dt_weight_KDR, dt_bias_KD, A_KDN, use_reentrant=False, preserve_rng_state=False
        )
        blocks.append(y_BKTD)
    y_BKLD = torch.cat(blocks, 2) + D_KD[:, None] * u_BKLD
    return reference.summed_in_pixel_order(y_BKLD, height, width)


def _block(h_BKDN, u_BKTD, dt_BKTR, B_BKTN, C_BKTN, dt_weight_KDR, dt_bias_KD, A_KDN) -> tuple[Tensor, Tensor]:
    delta_BKTD = F.softplus(dt_BKTR @ dt_weight_KDR.mT + dt_bias_KD[:, None])
    decay_BKTDN = (delta_BKTD[..., None] * A_KDN[:, None]).exp()
    input_BKTDN = (delta_BKTD * u_BKTD)[..., None] * B_BKTN[..., None, :]
    states = []
    for decay_BKDN, input_BKDN in zip(decay_BKTDN.unbind(2), input_BKTDN.unbind(2), strict=True):
        h_BKDN = torch.addcmul(input_BKDN, decay_BKDN, h_BKDN)
        states.append(h_BKDN)
    return (torch.stack(states, 2) @ C_BKTN[..., None]).squeeze(-1), h_BKDN


def operands(batch: int, side: int, channels: int, states: int) -> list[Tensor]:
    """Random inputs of the first stage's kind."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    rank = -(-channels // 32)
    rows = normal(batch, side, side, 4, rank + 2 * states).split((rank, states, states), -1)
    a_log = torch.arange(1, states + 1).log().expand(4, channels, states).clone()
    tensors = (normal(batch, side, side, channels), *rows, normal(4, channels, rank), normal(4, channels) - 3, a_log)
    return [x.requires_grad_() for x in (*tensors, normal(4, channels))]


def run(of: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """y and the gradients of all inputs."""
    y = of(*tensors)
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, tensors, weight)]


def error(of: Callable[..., Tensor]) -> float:
    """The largest of the result and all gradients against float64, relative to each tensor's largest value."""
    tensors = operands(2, 11, 24, 16)
    exact = run(reference.scan, [x.detach().double().requires_grad_() for x in tensors])
    pairs = zip(run(of, tensors), exact, strict=True)
    return max(((found - e).abs().max() / e.abs().max()).item() for found, e in pairs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("rounds", 3), ("batch", 8), ("side", 56), ("channels", 96), ("states", 16), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    runs: dict[str, Callable[..., Tensor]] = {"unbind loop": reference.scan, "in blocks": in_blocks}
    for name, reason in backends("cpu").items():
        if name in ("numba", "cpp"):
            if reason is None:
                runs[name] = lambda *x, name=name: scan(*x, backend=name)
            else:
                print(f"{name}: not measured: {reason}", file=sys.stderr)
    errors = {name: error(of) for name, of in runs.items()}
    if wrong := {name: e for name, e in errors.items() if not e <= TOLERANCE}:
        print(f"not the definition: {wrong}", file=sys.stderr)
        return 1
    tensors = operands(asked.batch, asked.side, asked.channels, asked.states)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(asked.rounds + 1):  # the first does not count
        for name, of in runs.items():
            if number == 0 and name == "unbind loop":
                continue  # seconds long: nothing to warm
            began = time.perf_counter()
            run(of, tensors)
            if number:
                taken[name].append(time.perf_counter() - began)
    ms = {name: 1e3 * statistics.median(times) for name, times in taken.items()}
    rows = {
        name: {"ms": ms[name], "error": errors[name], **{f"times {n}": ms[n] / ms[name] for n in list(runs)[:2]}}
        for name in runs
    }
    if asked.json:
        settings = {**vars(asked), "torch": torch.__version__, "cores": os.cpu_count()}
        print(json.dumps({**settings, "rows": rows, "all_ms": {n: [1e3 * t for t in x] for n, x in taken.items()}}))
        return 0
    print(f"forward and backward, B {asked.batch}, 4 x {asked.channels}, N {asked.states}, {asked.side} x {asked.side}")
    print(f"{'':12} {'ms':>9} {'of the loop':>12} {'of blocks':>10} {'error':>8}")
    for name, row in rows.items():
        loop, blocks = row["times unbind loop"], row["times in blocks"]
        print(f"{name:12} {row['ms']:9.1f} {loop:11.1f}x {blocks:9.1f}x {row['error']:8.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
