"""Measures how fast a network trains and predicts on this machine, for `medmamba bench`.

A scan backend only gets a speed if its values and gradients match the reference (ss2d_scan/reference.py in float64) in
the same process. A row that cannot be measured gives the reason.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own habit)
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from medmamba.config import MedMambaConfig
from medmamba.model import NUM_DIRECTIONS, build_model
from medmamba.ops.ss2d_scan import backends, resolve_backend, scan

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}  # error against float64, relative to the largest value
COMPARED = {
    "resnet50": "ResNet-50",
    "convnext_tiny": "ConvNeXt-T",
    "swin_tiny_patch4_window7_224": "Swin-T",
    "vit_small_patch16_224": "ViT-S",
}
NUM_CLASSES = 6
_WARM_UP_S = 0.5  # an idle GPU runs at a fraction of its clock


class NotMeasured(Exception):  # noqa: N818 - the reason of a row, not an error
    """Why a row has no figures."""


@dataclass(frozen=True)
class Case:
    """One row to measure.

    `network`: T, S, B, nano or one of COMPARED. `combo`: compile with Inductor's combo_kernels, which merges
    independent small kernels: fewer launches, faster for single images (ops/NOTES.md).
    """

    network: str
    batch: int
    side: int
    precision: str
    backend: str
    device: str
    compiled: bool
    combo: bool = False


@dataclass
class Row:
    """The figures of a case, or `why_not`.

    Megapixels/s make sides comparable; `launches` and `scan_share` (0 to 1) are of one training step.
    """

    case: Case
    train_images_per_s: float | None = None
    train_megapixels_per_s: float | None = None
    infer_images_per_s: float | None = None
    latency_ms: float | None = None
    peak_gib: float | None = None
    launches: int | None = None
    scan_share: float | None = None
    first_step_s: float | None = None
    graphed: bool = False
    why_not: str = ""
    errors: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As JSON values; figures that were not measured are None."""
        return asdict(self)


def measure(case: Case, *, repeats: int = 10) -> Row:
    """Measures a case. Errors of torch or the network go into the row, so that other cases are still measured.

    On a GPU a process should measure only one case: see `measure_alone`.
    """
    row = Row(case)
    try:
        if case.network not in COMPARED:
            row.errors = checked(case.backend, case.device, case.precision)
        step = _measure_training(case, row, repeats)
        _measure_inference(case, row, repeats)
        # Last, because the profiler permanently slows CUDA graphs of many small kernels (ops/NOTES.md).
        row.launches = _launches(case, step)
        row.scan_share = _scan_share(case, step)
    except NotMeasured as reason:
        row.why_not = str(reason)
    except torch.cuda.OutOfMemoryError:
        row.why_not = "out of memory"
    except (ValueError, RuntimeError) as error:  # e.g. image too small, no compiler for Inductor, no memory on a CPU
        first = next((line for line in str(error).splitlines() if line.strip()), "without a message")
        row.why_not = f"{type(error).__name__}: {first.strip()}"
    gc.collect()
    if case.device == "cuda":
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    return row


def measure_alone(case: Case, *, repeats: int = 10) -> Row:
    """`measure`, on a GPU in a separate process because earlier cases would slow it down. A crash goes into the row."""
    if case.device != "cuda":
        return measure(case, repeats=repeats)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(measure, case, repeats=repeats).result()
        except BrokenProcessPool:
            return Row(case, why_not="its process died (killed, or crashed in the driver or a kernel)")


@functools.cache
def checked(backend: str, device: str, precision: str) -> dict[str, float]:
    """Relative errors of the operator against float64, by tensor name.

    Raises NotMeasured if one exceeds TOLERANCE or the backend cannot run here.
    """
    reason = backends(device).get(backend, f"unknown; available: {', '.join(backends(device))}")
    if reason:
        raise NotMeasured(f"backend {backend}: {reason}")
    try:
        resolve_backend(backend, device)  # builds it
    except ValueError as error:
        raise NotMeasured(str(error)) from None
    tensors = _operands(device, getattr(torch, precision))
    found = _outputs(tensors, backend)
    expected = _outputs([x.double() for x in tensors], "reference")
    errors = {name: _error(found[name], expected[name]) for name in expected}
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE[precision]}
    if wrong:
        raise NotMeasured(f"backend {backend} differs from the reference in {precision}: {wrong}")
    return errors


def _operands(device: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    batch, height, width, channels, rank, states = 2, 13, 11, 48, 3, 16

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    dt, b, c = normal(batch, height, width, NUM_DIRECTIONS, rank + 2 * states).split((rank, states, states), -1)
    # The same layout as in model.py: the cuda backend has other kernels for unaligned rows, and the kernels that are
    # timed must be the ones that are checked.
    rows = F.pad(torch.cat((b, c, dt), -1), (0, -(rank + 2 * states) % 8)).to(dtype).to(device)
    b, c, dt, _ = rows.split((states, states, rank, -(rank + 2 * states) % 8), -1)
    u = normal(batch, height, width, channels).to(dtype).to(device)
    a_log = torch.arange(1, states + 1).log() + 0.1 * normal(NUM_DIRECTIONS, channels, states)
    shapes = (NUM_DIRECTIONS, channels, rank), (NUM_DIRECTIONS, channels), (NUM_DIRECTIONS, channels)
    weight, bias, skip = (normal(*shape) for shape in shapes)
    return [u, dt, b, c, *(x.to(device) for x in (weight, bias - 3, a_log, skip))]


def _outputs(tensors: list[Tensor], backend: str) -> dict[str, Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    y = scan(*leaves, backend=backend)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(tensors[0].device)
    # Both precisions must use the same weights, so they are rounded to the coarser one.
    coarse = weight.to(torch.bfloat16).to(y.dtype)
    grads = torch.autograd.grad(y, leaves, coarse)
    names = ("u", "dt", "B", "C", "dt_weight", "dt_bias", "A_log", "D")
    return {"y": y.detach()} | dict(zip(names, grads, strict=True))


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def _network(case: Case) -> nn.Module:
    if case.network not in COMPARED:
        config = MedMambaConfig(variant=case.network, num_classes=NUM_CLASSES)  # type: ignore[arg-type]
        return build_model(config, scan=case.backend, device=case.device)
    try:
        from pipelines.bench.peers.networks import create_network
    except ModuleNotFoundError:  # `submit` does not ship peers/
        raise NotMeasured("the networks of other projects are not shipped to a cluster") from None
    try:
        model = create_network(case.network, case.side, NUM_CLASSES)
    except ValueError as error:
        raise NotMeasured(str(error)) from None
    # MedMamba converts its maps to channels-last itself; these networks follow their weights.
    return model.to(case.device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _autocast(case: Case) -> contextlib.AbstractContextManager[object]:
    if case.precision == "float32":
        return contextlib.nullcontext()
    # Its cache of cast weights ends with each step, so a captured graph includes the casts.
    return torch.autocast(case.device, torch.bfloat16)


def _images(case: Case, batch: int) -> Tensor:
    images = torch.randn(batch, 3, case.side, case.side, device=case.device)
    return images.contiguous(memory_format=torch.channels_last)


def _compiled(model: nn.Module, case: Case) -> Callable[[Tensor], Tensor]:
    if not case.compiled:
        return model
    return torch.compile(model, dynamic=False, options={"combo_kernels": True} if case.combo else None)


def _measure_training(case: Case, row: Row, repeats: int) -> Callable[[], None]:
    """Fills in the row's training figures; returns a function that runs one training step."""
    torch.manual_seed(0)
    if case.device == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.cuda.reset_peak_memory_stats()
    model = _network(case).train()
    forward = _compiled(model, case)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True, capturable=case.device == "cuda")
    images, labels = _images(case, case.batch), torch.randint(NUM_CLASSES, (case.batch,), device=case.device)

    def step() -> None:
        with _autocast(case):
            loss = F.cross_entropy(forward(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    began = time.monotonic()
    step()
    _wait(case)
    row.first_step_s = time.monotonic() - began
    run, row.graphed = _graphed(case, step)
    row.train_images_per_s = case.batch / _seconds(case, run, repeats)
    row.train_megapixels_per_s = row.train_images_per_s * case.side**2 / 1e6
    if case.device == "cuda":
        row.peak_gib = torch.cuda.max_memory_allocated() / 2**30
    return step


def _measure_inference(case: Case, row: Row, repeats: int) -> None:
    model = _network(case).eval()
    forward = _compiled(model, case)
    for batch in dict.fromkeys((case.batch, 1)):
        images = _images(case, batch)

        def infer(images: Tensor = images) -> None:
            with torch.no_grad(), _autocast(case):
                forward(images)

        run, _ = _graphed(case, infer)
        seconds = _seconds(case, run, repeats)
        if batch == case.batch:
            row.infer_images_per_s = batch / seconds
        if batch == 1:
            row.latency_ms = 1e3 * seconds


def _graphed(case: Case, run: Callable[[], None]) -> tuple[Callable[[], None], bool]:
    """`run` as one CUDA graph if possible, so that launches do not wait for Python; and whether it is one."""
    if case.device != "cuda":
        return run, False
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:  # some libraries cannot be captured; measure without a graph
        torch.cuda.synchronize()
        return run, False
    return graph.replay, True


def _launches(case: Case, step: Callable[[], None]) -> int | None:
    """Number of kernels, copies and fills that one step launches on the device; None on a CPU."""
    if case.device != "cuda":
        return None
    step()
    with profile(activities=[ProfilerActivity.CUDA]) as traced:
        step()
        torch.cuda.synchronize()
    return sum(event.count for event in traced.key_averages() if event.self_device_time_total > 0)


def _scan_share(case: Case, step: Callable[[], None]) -> float | None:
    """Share of a step's time (on a GPU: of its kernels' time) in forward and backward scans.

    None if no scan operator is visible: the reference is not one, and a compiled step hides them.
    """
    step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if case.device == "cuda" else [])]
    with profile(activities=activities) as traced:
        began = time.perf_counter()
        step()
        _wait(case)
        step_us = 1e6 * (time.perf_counter() - began)
    events = traced.key_averages()
    if case.device == "cuda":
        kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
        step_us = sum(event.self_device_time_total for event in kernels if not event.is_user_annotation)
        # Self time, because forward kernels also count for autograd's wrapper and totals would count them twice.
        scan_us = sum(event.self_device_time_total for event in events if "ss2d_scan" in event.key)
    else:
        scan_us = sum(event.cpu_time_total for event in events if event.key.startswith("medmamba::ss2d_scan"))
    return scan_us / step_us if scan_us else None


def _seconds(case: Case, run: Callable[[], None], repeats: int) -> float:
    """Median seconds of `repeats` runs, after two warm-up runs and on a GPU at least _WARM_UP_S."""
    began = time.perf_counter()
    for done in itertools.count(1):
        run()
        _wait(case)
        if done >= 2 and (case.device != "cuda" or time.perf_counter() - began > _WARM_UP_S):
            break
    taken = []
    for _ in range(repeats):
        if case.device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            run()
            taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def _wait(case: Case) -> None:
    if case.device == "cuda":
        torch.cuda.synchronize()
