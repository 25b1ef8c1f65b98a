"""`medmamba bench`: the speed of this project's networks, and of others, on this machine; as tables and JSON."""

from __future__ import annotations

import itertools
import json
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from medmamba.config import VARIANTS, MedMambaConfig
from pipelines.console.arguments import UsageError, parse
from pipelines.console.terminal import Terminal, console, table
from pipelines.provenance import git_commit, package_versions
from pipelines.worker.meter.bench_rows import remember

COSTED_SIDES = (112, 224, 384, 512)
_SHORT = {"float32": "fp32", "bfloat16": "bf16"}


@dataclass(frozen=True)
class BenchArguments:
    """Measure training and inference speed, single-image latency, memory and kernel launches, and compute the cost.

    Every scan backend is first checked against the float64 reference; a wrong one gets no speed.
    """

    networks: tuple[str, ...] = ()
    """T, S, B, nano; empty: T on a GPU, nano on a CPU."""
    batches: tuple[int, ...] = ()
    """Images per step; empty: 128 on a GPU, 16 on a CPU."""
    sides: tuple[int, ...] = ()
    """Height and width of an image; empty: 224 on a GPU, 64 on a CPU."""
    precisions: tuple[str, ...] = ()
    """float32, bfloat16; empty: bfloat16 on a GPU, float32 on a CPU."""
    backends: tuple[str, ...] = ()
    """Scan backends; empty: all that can run here, and on a GPU always mamba_ssm."""
    device: str = "auto"
    """cpu, cuda or auto."""
    compile: tyro.conf.FlagCreatePairsOff[bool] = False
    """Use torch.compile; the first step takes a minute."""
    combo: tyro.conf.FlagCreatePairsOff[bool] = False
    """Compile with Inductor's combo_kernels: fewer launches, for single images; implies --compile."""
    compare: tyro.conf.FlagCreatePairsOff[bool] = False
    """Also measure other networks (needs the extra compare)."""
    repeats: int = 10
    """Timed runs, of which the median counts."""
    out: str = ""
    """File for the figures as JSON, updated after each row."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print JSON instead of tables."""


def bench(argv: Sequence[str]) -> int:
    """Measure speed, memory and cost of the networks on this machine; `bench data` measures the loader."""
    if argv[:1] == ["data"]:
        from pipelines.bench.data import bench_data

        return bench_data(argv[1:])

    asked = parse(BenchArguments, "bench", argv)
    _check_values(asked)
    cases, terminal = _cases(asked), Terminal()
    if asked.out:
        _check_out(asked.out)
    figures = {**_machine(cases[0].device), "rows": [], "cost": _cost(asked.networks)}
    rows: list[Any] = []
    try:
        for row in _measure(cases, asked.repeats, terminal):
            rows.append(row)
            remember(row, figures["device"])
            _write(asked.out, rows, figures)
    except KeyboardInterrupt:
        terminal.say(f"bench: interrupted after {len(rows)} of {len(cases)} rows")
        _write(asked.out, rows, figures)
    if asked.json:
        print(json.dumps(figures, indent=2))
    else:
        _show(rows, figures)
    return 0 if len(rows) == len(cases) and not all(row.why_not for row in rows) else 1


def _write(out: str, rows: list[Any], figures: dict[str, Any]) -> None:
    figures["rows"] = [row.to_json() for row in rows]
    if out:
        Path(out).write_text(json.dumps(figures, indent=2) + "\n")


def _show(rows: list[Any], figures: dict[str, Any]) -> None:
    if any(row.train_images_per_s for row in rows):
        alike = [_how(rows[0].case)] if _are_alike(rows) else []
        table(f"Speed on {', '.join([figures['device'], 'torch ' + figures['torch'], *alike])}", *_speed_table(rows))
    for row in rows:
        if row.why_not:
            case = row.case
            line = f"{_named(case)}, batch {case.batch}, {case.side} px, {_how(case)}: not measured: {row.why_not}"
            console().print(line, soft_wrap=True)
    table("Cost of one image", ("network", "side", "GMAC with scan", "scan updates", "parameters"), _cost_rows(figures))


def _check_out(out: str) -> None:
    path = Path(out).absolute()
    if not path.parent.is_dir():
        raise UsageError(f"bench: --out {out}: its folder does not exist; create it first")
    try:
        path.open("a").close()  # fail now rather than after minutes of measuring
    except OSError as error:
        raise UsageError(f"bench: --out {out}: {error.strerror}; use a writable file") from None


def _check_values(asked: BenchArguments) -> None:
    from medmamba.model import MIN_SIDE
    from medmamba.ops.ss2d_scan import backends

    for name, known in (("networks", VARIANTS), ("precisions", _SHORT), ("backends", backends())):
        if unknown := [value for value in getattr(asked, name) if value not in known]:
            raise UsageError(f"bench: unknown --{name} {unknown[0]}; available: {', '.join(known)}")
    for name, least in (("batches", 1), ("sides", MIN_SIDE)):
        if wrong := [value for value in getattr(asked, name) if value < least]:
            raise UsageError(f"bench: --{name} {wrong[0]}: must be at least {least}")
    if asked.repeats < 1:
        raise UsageError(f"bench: --repeats {asked.repeats}: must be at least 1")


def _cases(asked: BenchArguments) -> list[Any]:
    import torch

    from medmamba.ops.ss2d_scan import backends
    from pipelines.bench.measure import COMPARED, Case

    device = asked.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise UsageError(f"bench: --device {device}: must be cpu, or cuda if torch finds a GPU")
    gpu = device == "cuda"
    names = asked.networks or (("T",) if gpu else ("nano",))
    precisions = asked.precisions or (("bfloat16",) if gpu else ("float32",))
    # The reference is not meant to be fast; it is measured only on request.
    scans = list(asked.backends) or [n for n, why in backends(device).items() if n != "reference" and why is None]
    if gpu and not asked.backends and "mamba_ssm" not in scans:
        scans.append("mamba_ssm")  # always compared with upstream, or with the reason why it is missing
    sizes = list(
        itertools.product(asked.batches or ((128,) if gpu else (16,)), asked.sides or ((224,) if gpu else (64,)))
    )
    cases = [
        Case(network, batch, side, precision, scan, device, asked.compile or asked.combo, asked.combo)
        for (batch, side), precision in itertools.product(sizes, precisions)
        for network, scan in [*itertools.product(names, scans), *((n, "") for n in COMPARED if asked.compare)]
    ]
    return list(dict.fromkeys(cases))


def _measure(cases: list[Any], repeats: int, terminal: Terminal) -> Iterator[Any]:
    from pipelines.bench.measure import measure_alone

    if cases[0].device == "cpu":
        # Silences two log lines of torch's profiler per row; on a GPU its messages about CUPTI matter.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    for case in cases:
        terminal.say(f"measuring {_named(case)}, batch {case.batch}, {case.side} px, {_how(case)}")
        row = measure_alone(case, repeats=repeats)
        terminal.say(f"  {_in_words(row)}")  # so that an interrupted run has shown its results
        yield row


def _in_words(row: Any) -> str:
    if row.why_not:
        return f"not measured: {row.why_not}"
    line = f"{row.train_images_per_s:,.0f} images/s in training, {row.infer_images_per_s:,.0f} in inference"
    line += f", one image {row.latency_ms:.2f} ms"
    return line + (f", peak {row.peak_gib:.2f} GiB" if row.peak_gib else "")


def _speed_table(rows: list[Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    # Two header lines, so that the table fits into 80 columns.
    columns = (
        *("network", "batch\nx px", "train\nimg/s", "train\nMpx/s"),
        *("infer\nimg/s", "1 img\nms", "peak\nGiB", "laun-\nches", "scan\n%"),
    )
    shown, alike = [], _are_alike(rows)
    for row in rows:
        case, digits = row.case, 0 if (row.train_images_per_s or 0) >= 100 else 1
        figures = (
            _figure(row.train_images_per_s, digits),
            _figure(row.train_megapixels_per_s, 2 if digits else 1),
            _figure(row.infer_images_per_s, digits),
            _figure(row.latency_ms, 2),
            _figure(row.peak_gib, 2),
            _figure(row.launches, 0),
            _figure(None if row.scan_share is None else 100 * row.scan_share, 0),
        )
        network = _named(case) if alike else f"{_named(case)} {_how(case)}"
        shown.append((network, f"{case.batch}x{case.side}", *figures))
    filled = [n for n in range(len(columns)) if any(row[n] != "" for row in shown)]  # e.g. a CPU has no launches
    return tuple(columns[n] for n in filled), [tuple(row[n] for n in filled) for row in shown]


def _are_alike(rows: list[Any]) -> bool:
    """Whether all rows ran the same way, so that the title can say how."""
    return len({_how(row.case) for row in rows}) == 1


def _named(case: Any) -> str:
    from pipelines.bench.measure import COMPARED

    return f"{COMPARED.get(case.network, case.network)} {case.backend}".rstrip()


def _how(case: Any) -> str:
    return _SHORT[case.precision] + (" compiled" if case.compiled else "") + (" combo" if case.combo else "")


def _figure(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _machine(device: str) -> dict[str, Any]:
    import torch

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{_cpu()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "git_commit": git_commit(),
        "packages": package_versions(),
    }


def _cpu() -> str:
    """The CPU's model name if Linux reports it, otherwise its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cost(networks: Sequence[str]) -> list[dict[str, Any]]:
    from medmamba.cost import macs, scan_updates
    from medmamba.model import build_model
    from pipelines.bench.measure import NUM_CLASSES

    found = []
    for network in networks or VARIANTS:
        config = MedMambaConfig.model_validate({"variant": network, "num_classes": NUM_CLASSES})
        parameters = sum(p.numel() for p in build_model(config, scan="reference", device="meta").parameters())
        for side in COSTED_SIDES:
            costs = {"macs": macs(config, side), "scan_updates": scan_updates(config, side), "parameters": parameters}
            found.append({"network": network, "side": side, **costs})
    return found


def _cost_rows(figures: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [
        (c["network"], c["side"], f"{c['macs'] / 1e9:.3f}", f"{c['scan_updates'] / 1e6:.1f} M", f"{c['parameters']:,}")
        for c in figures["cost"]
    ]
