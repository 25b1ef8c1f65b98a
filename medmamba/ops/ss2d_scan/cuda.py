"""The scan on NVIDIA GPUs: scan.cu, compiled on first use for each number of channels. Bit-identical between runs."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own habit)
from torch import Tensor

from medmamba.ops import nvrtc
from medmamba.ops.ss2d_scan.contract import Operands
from medmamba.ops.ss2d_scan.operator import register

SOURCE = Path(__file__).with_name("scan.cu")
_ACT = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_WAYS, _LANES, _QUADS = 4, 32, 4
# 12 warps of 168 registers fill a multiprocessor of an H100; with 9 the backward pass takes a third longer.
_RESIDENT_WARPS, _SHARED_BYTES, _RESERVED_BYTES = 12, 227 << 10, 1 << 10
_WARPS_TO_FILL = _RESIDENT_WARPS * 132  # with fewer warps a sequence is split into segments
_LEAST_TILES, _MOST_SEGMENTS = 4, 32  # least tiles per segment, and most segments


def unusable(device_type: str) -> str | None:
    """Why this backend cannot run on such a device; None if it can."""
    return nvrtc.unusable() if device_type in ("cuda", "meta") else "it requires a CUDA device"


def prepare(device_type: str) -> None:
    """Builds the kernels for one number of channels, to test that building works. Raises BuildError."""
    if device_type == "cuda":
        device = torch.device(device_type, torch.cuda.current_device())
        _plan(1, 14, 14, 96, 3, 16, torch.float32).kernels(device, vectors=True)


def build_ahead(sizes: Sequence[tuple[int, int, int]], dtype: torch.dtype) -> None:
    """Builds the kernels for scans of these (channels, rank, states) in parallel, into the cache."""
    device = torch.device("cuda", torch.cuda.current_device())
    plans = [_plan(1, 14, 14, width, rank, states + -states % _QUADS, dtype) for width, rank, states in sizes]
    with ThreadPoolExecutor() as pool:  # NVRTC releases the GIL
        list(pool.map(lambda plan: plan.kernels(device, vectors=True), plans))


def scan(*operands: Tensor) -> Tensor:
    """Returns y_BHWD in u's dtype, computed in float32 (see reference.py for the equation)."""
    given = Operands(*operands)
    dtype = given.u_BHWD.dtype if given.u_BHWD.dtype in _ACT else torch.float32
    inputs = [x.to(dtype) for x in (given.u_BHWD, given.dt_BHWKR, given.B_BHWKN, given.C_BHWKN)]
    parameters = [x.float() for x in (given.dt_weight_KDR, given.dt_bias_KD, given.A_log_KDN, given.D_KD)]
    lacking = -given.A_log_KDN.shape[2] % _QUADS
    if lacking:  # padding with zero states does not change any result
        inputs[2:] = [F.pad(x, (0, lacking)) for x in inputs[2:]]
        parameters[2] = F.pad(parameters[2], (0, lacking))
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, *parameters))
    # The operator takes and returns three dimensions. torch's compiler treats a four-dimensional tensor that is saved
    # for backward like an input of a convolution: it would save a copy of u with H innermost and copy it back. With T
    # and a batch of 128 on an H200 that costs 1.4 of 42.3 ms per step, and 0.3 GiB.
    y_BLD, _ = _forward(inputs[0].flatten(1, 2), *inputs[1:], *parameters, keep)
    return torch.unflatten(y_BLD, 1, given.u_BHWD.shape[1:3]).to(given.u_BHWD.dtype)


class _Small(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("image", ctypes.c_longlong),
        ("pixel", ctypes.c_int),
        ("way", ctypes.c_int),
    )


class _Shape(ctypes.Structure):
    _fields_ = (
        ("images", ctypes.c_int),
        ("height", ctypes.c_int),
        ("width", ctypes.c_int),
        ("length", ctypes.c_int),
        ("segments", ctypes.c_int),
        ("segment_tiles", ctypes.c_int),
        ("tiles", ctypes.c_int),
        ("by_height", ctypes.c_uint),
    )


@dataclass(frozen=True)
class _Plan:
    """How one problem is split; see scan.cu for `warps`, `tile`, `sub` and `unroll`."""

    images: int
    height: int
    width: int
    channels: int
    rank: int
    states: int
    act: int
    warps: int
    tile: int
    sub: int
    unroll: int = 2

    @property
    def wide(self) -> int:
        return self.warps * _LANES

    @property
    def groups(self) -> int:
        return -(-self.channels // self.wide)

    @property
    def blocks(self) -> int:
        return self.images * _WAYS * self.groups

    @property
    def tiles(self) -> int:
        return -(-self.height * self.width // self.tile)

    @property
    def segment_tiles(self) -> int:
        wanted = _WARPS_TO_FILL // (self.blocks * self.warps)
        return max(_LEAST_TILES, -(-self.tiles // min(wanted, _MOST_SEGMENTS))) if wanted > 1 else self.tiles

    @property
    def segments(self) -> int:
        """Parts of a sequence scanned in parallel; more than one costs a second pass, so only for few images."""
        return -(-self.tiles // self.segment_tiles)

    @property
    def resident(self) -> int:
        """Blocks of the backward pass that should run on one multiprocessor at the same time."""
        return max(1, _RESIDENT_WARPS // self.warps)

    @property
    def is_resident(self) -> bool:
        return (self.shared_bytes(backward=True) + _RESERVED_BYTES) * self.resident <= _SHARED_BYTES

    def shape(self) -> _Shape:
        by_height = -(-(1 << 32) // self.height) if self.height > 1 else 0
        length = self.height * self.width
        return _Shape(
            self.images, self.height, self.width, length, self.segments, self.segment_tiles, self.tiles, by_height
        )

    def shared_bytes(self, *, backward: bool) -> int:
        """Shared memory of a block in bytes, as laid out in scan.cu."""
        rank4 = -(-self.rank // 4) * 4
        floats = self.tile * (2 * self.states + rank4 + 1 + (3 if backward else 2) * self.wide)
        if not backward:
            return 4 * floats
        floats += 2 * rank4 * self.wide + self.tile * self.warps * 2 * self.states
        return 4 * floats + (4 if self.act == 0 else 2) * self.sub * self.states * self.wide

    def kernels(self, device: torch.device, *, vectors: bool) -> nvrtc.Kernels:
        settings = {
            "ACT": self.act, "CHANNELS": self.channels, "RANK": self.rank, "STATES": self.states,
            "WARPS": self.warps, "TILE": self.tile, "SUB": self.sub, "UNROLL": self.unroll,
            "VECTORS": int(vectors), "RESIDENT": self.resident,
        }  # fmt: skip
        return nvrtc.build(SOURCE, settings, device)


@functools.lru_cache(maxsize=256)
def _plan(images: int, height: int, width: int, channels: int, rank: int, states: int, dtype: torch.dtype) -> _Plan:
    """The plan with the longest tile (it keeps the fewest states) at which all warps of backward are resident.

    Raises ValueError if the map is too large for the kernel's division.
    """
    if height * height * width >= 1 << 32:
        raise ValueError(
            f"a map of {height} x {width} is too large for scan backend 'cuda': use reference, or smaller images"
        )
    warps = 3 if channels % (3 * _LANES) == 0 else min(4, -(-channels // _LANES))
    sub = 4 if dtype == torch.float32 else 8
    wider = [6] if channels % (6 * _LANES) == 0 else []
    cuts = [(w, tile) for tile in (16, 8) for w in (warps, *wider)]
    plans = [
        _Plan(images, height, width, channels, rank, states, _ACT[dtype], w, tile, min(sub, tile)) for w, tile in cuts
    ]
    return next((plan for plan in plans if plan.is_resident), plans[-len(wider) - 1])


def _plan_of(u: Tensor, dt: Tensor, a_log: Tensor) -> _Plan:
    images, height, width, _, rank = dt.shape
    return _plan(images, height, width, u.shape[2], rank, a_log.shape[2], u.dtype)


def _run_forward(
    u: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    weight: Tensor,
    bias: Tensor,
    a_log: Tensor,
    skip: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Returns (y_BLD, the states at each tile's start, empty unless `keep`)."""
    plan = _plan_of(u, dt, a_log)
    u = u.contiguous()
    dt, b, c = (_rows(x) for x in (dt, b, c))
    small = [_small(x) for x in (dt, b, c)]
    parameters = [x.contiguous() for x in (weight, bias, a_log, skip)]
    with torch.cuda.device(u.device):
        kernels = plan.kernels(u.device, vectors=_aligned(u, b, c))
        planes = u.new_empty((_WAYS, *u.shape))
        kept = _new_kept(u, plan, keep)
        ends, sums = _new_ends(u, plan)
        arguments = (u, *small, *parameters, planes, kept if keep else None, ends, sums, plan.shape())
        shared = plan.shared_bytes(backward=False)
        if plan.segments > 1:
            kernels("forward_carry", (plan.blocks, plan.segments - 1), plan.wide, shared, arguments)
        kernels("forward", (plan.blocks, plan.segments), plan.wide, shared, arguments)
        y = torch.empty_like(u)
        _merge(kernels, planes, y)
    return y, kept


def _shapes(
    u: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    weight: Tensor,
    bias: Tensor,
    a_log: Tensor,
    skip: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), _new_kept(u, _plan_of(u, dt, a_log), keep)


def _run_backward(
    dy: Tensor,
    u: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    weight: Tensor,
    bias: Tensor,
    a_log: Tensor,
    skip: Tensor,
    kept: Tensor,
) -> tuple[Tensor, ...]:
    """Returns the gradients of the eight inputs, in their order and shapes."""
    plan = _plan_of(u, dt, a_log)
    dy, u = dy.contiguous(), u.contiguous()
    dt, b, c = (_rows(x) for x in (dt, b, c))
    small = [_small(x) for x in (dt, b, c)]
    parameters = [x.contiguous() for x in (weight, bias, a_log, skip)]
    with torch.cuda.device(u.device):
        kernels = plan.kernels(u.device, vectors=_aligned(u, b, c))
        planes = u.new_empty((_WAYS, *u.shape))
        of_small = [u.new_empty(x.shape) for x in (dt, b, c)]
        parts_of_small = None
        if plan.groups > 1:
            sizes = [x.numel() for x in of_small]
            parts_of_small = u.new_empty((plan.groups, sum(sizes)), dtype=torch.float32)
        width = plan.states + plan.rank + 2
        parts = plan.images * plan.segments
        of_parameters = u.new_empty((parts, _WAYS, plan.channels, width), dtype=torch.float32)
        ends, sums = _new_ends(u, plan)
        if plan.segments > 1:
            carry = (dy, small[0], small[2], *parameters[:3], ends, sums, plan.shape())
            shared = plan.shared_bytes(backward=False)
            kernels("backward_carry", (plan.blocks, plan.segments - 1), plan.wide, shared, carry)
        left = of_small if parts_of_small is None else torch.split_with_sizes(parts_of_small[0], sizes)
        arguments = (dy, u, *small, *parameters, kept, planes, *left, of_parameters, ends, sums, plan.shape())
        shared = plan.shared_bytes(backward=True)
        kernels("backward", (plan.blocks, plan.segments), plan.wide, shared, arguments)
        du = torch.empty_like(u)
        _merge(kernels, planes, du)
        if parts_of_small is not None:
            blocks = -(-parts_of_small[0].numel() // (4 * 256))
            rows = ctypes.c_longlong(plan.images * _WAYS * plan.height * plan.width)
            kernels("sum_groups", (blocks, 1), 256, 0, (parts_of_small, *of_small, rows))
        found = [torch.empty_like(x) for x in (a_log, weight, bias, skip)]
        grid = (-(-of_parameters[0].numel() // 128), 1)
        kernels("sum_parameters", grid, 128, 0, (of_parameters, *found, ctypes.c_int(parts)))
    of_a_log, of_weight, of_bias, of_skip = found
    return du, *of_small, of_weight, of_bias, of_a_log, of_skip


# u is (B, H·W, D); the other operands are those of `scan`.
_forward = register(
    "ss2d_scan_cuda", backend="cuda", device="cuda", forward=_run_forward, shapes=_shapes, backward=_run_backward
)


def _rows(x: Tensor) -> Tensor:
    """dt, B or C in a layout that the kernel can read; copied unless its rows are dense and evenly spaced."""
    return x if x.stride(-1) == 1 and x.stride(1) == x.stride(2) * x.shape[2] else x.contiguous()


def _small(x: Tensor) -> _Small:
    return _Small(x.data_ptr(), x.stride(0), x.stride(2), x.stride(3))


def _aligned(u: Tensor, *rows: Tensor) -> bool:
    """Whether all rows can be read 16 bytes at a time."""
    vector = 16 // u.element_size()
    return all(
        x.data_ptr() % 16 == 0 and all(stride % vector == 0 for stride in x.stride()[:-1]) and x.shape[-1] % vector == 0
        for x in (u, *rows)
    )


def _new_kept(u: Tensor, plan: _Plan, keep: bool) -> Tensor:
    size = plan.blocks * plan.tiles * plan.wide * plan.states if keep else 0
    return u.new_empty(size, dtype=torch.float32 if plan.act == 0 else torch.bfloat16)


def _new_ends(u: Tensor, plan: _Plan) -> tuple[Tensor | None, Tensor | None]:
    """Buffers for the segments' last states and sums of delta."""
    if plan.segments == 1:
        return None, None
    rows = plan.segments * plan.blocks * plan.wide
    return u.new_empty(rows * plan.states, dtype=torch.float32), u.new_empty(rows, dtype=torch.float32)


def _merge(kernels: nvrtc.Kernels, planes: Tensor, to: Tensor) -> None:
    vector = 16 // to.element_size()
    blocks = -(-to.numel() // (vector * 256))
    kernels("merge", (blocks, 1), 256, 0, (planes, to, ctypes.c_longlong(to.numel())))
