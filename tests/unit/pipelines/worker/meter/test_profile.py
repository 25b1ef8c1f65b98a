"""Which steps are profiled, how their time is divided, and how that is printed."""

import gzip
import json
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from pipelines.commands.summary import print_profile
from pipelines.flow.record import Record
from pipelines.flow.runner import StepState
from pipelines.worker.meter.profile import WAIT, StepProfiler, summarize
from pipelines.worker.meter.speed import Meter


@pytest.mark.parametrize(
    ("steps", "first", "active"), [(1, 1, 1), (2, 2, 1), (3, 2, 2), (6, 2, 5), (8, 4, 5), (25, 21, 5), (40, 21, 5)]
)
def test_five_steps_are_profiled_after_twenty_or_earlier(steps, first, active):
    kept, names = [], []

    def keep(summary, trace):
        kept.append(summary)
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        names.extend(event.get("name", "") for event in events)

    meter = Meter(8, profiler=StepProfiler(torch.device("cpu"), keep))
    weight = torch.randn(64, 64)
    for _ in range(2):
        meter.begin_epoch()
        for number in meter.fetched(range(steps), steps):
            for _ in range(number + 1):  # so that the calls say which steps they belong to
                weight @ weight
            meter.step()
        meter.end_training()
    (summary,) = kept
    assert (summary["first_step"], summary["steps"]) == (first, active)
    assert sum(name.startswith("ProfilerStep#") for name in names) == active
    assert names.count(WAIT) == active
    assert names.count("aten::mm") == sum(range(first, first + active))
    (mm,) = (row for row in summary["largest"] if row["name"] == "aten::mm")
    assert mm["calls"] * active == names.count("aten::mm")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_kernels_of_a_replayed_graph_are_seen():
    device, kept = torch.device("cuda", 0), []
    matrix = torch.randn(2048, 2048, device=device)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.mm(matrix, matrix)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(7):
            matrix @ matrix
    meter = Meter(8, profiler=StepProfiler(device, lambda summary, trace: kept.append(summary)))
    meter.begin_epoch()
    for _ in meter.fetched(range(30), 30):
        graph.replay()
        meter.step()
    (summary,) = kept
    assert (summary["device"], summary["first_step"], summary["steps"]) == ("cuda", 21, 5)
    assert summary["largest"][0]["calls"] == 7
    assert summary["busy_share"] > 0.3


def event(name: str, kind: DeviceType, start_us: float, end_us: float, *, is_mark: bool = False) -> SimpleNamespace:
    """What torch's profiler gives for one kernel, operator or mark."""
    span = SimpleNamespace(start=start_us, end=end_us)
    return SimpleNamespace(
        name=name, key=name, device_type=kind, time_range=span, is_user_annotation=is_mark, count=1,
        self_device_time_total=end_us - start_us, self_cpu_time_total=end_us - start_us,
    )  # fmt: skip


CPU, CUDA = DeviceType.CPU, DeviceType.CUDA
EVENTS = [
    event("ProfilerStep*", CPU, 0, 1000, is_mark=True),
    event("ProfilerStep*", CUDA, 0, 1000, is_mark=True),
    event(WAIT, CPU, 0, 300, is_mark=True),
    event("aten::empty", CPU, 50, 100),  # while the batch is made
    event("aten::mm", CPU, 400, 500),
    event("gemm", CUDA, 200, 500),
    event("scan", CUDA, 450, 700),  # on another stream
]


@pytest.mark.parametrize(
    ("device", "busy", "data", "largest"),
    [("cuda", 0.5, 0.2, ["gemm", "scan"]), ("cpu", 0.1, 0.3, ["aten::mm", "aten::empty"])],
)
def test_time_is_divided_into_busy_data_and_host(device, busy, data, largest):
    """A GPU that computes while the host waits loses nothing; a CPU that makes a batch makes no step."""
    traced = SimpleNamespace(events=lambda: EVENTS, key_averages=lambda: EVENTS)
    summary = summarize(traced, 2, 1e-3, device)
    assert (summary["busy_share"], summary["data_share"]) == (pytest.approx(busy), pytest.approx(data))
    assert summary["host_share"] == pytest.approx(1 - busy - data)
    assert [row["name"] for row in summary["largest"]] == largest
    assert (summary["step_ms"], summary["calls"]) == (pytest.approx(0.5), 1.0)


def test_the_tables_fit_80_columns_whatever_the_names_of_kernels(capsys):
    rows = [{"name": f"void cutlass::Kernel<{'Template, ' * 30}{n}>(Params)", "ms": 1.5, "calls": 2} for n in range(10)]
    profile = {
        "device": "cuda", "first_step": 21, "steps": 5, "step_ms": 41.5, "busy_share": 0.9, "data_share": 0.04,
        "host_share": 0.06, "calls": 12975.0, "largest": rows, "trace": "s3://bucket/runs/r/train/profile/trace.json.gz",
    }  # fmt: skip
    record = Record({"profile": profile}, {}, 1.0, "", "", {}, "", {})
    print_profile([StepState("train", "done", record)])
    told = capsys.readouterr().out
    *tables, trace = told.splitlines()
    assert max(map(len, tables)) <= 80
    assert trace == profile["trace"], "a path stays on one line"
    assert told.count("void cutlass::Kernel<Template,") == told.count(">(Params)") == 10, "no row is folded"
    assert tables[0].rstrip() == "Steps 21 to 25, 41.5 ms each"
    assert all(figure in told for figure in ("37.35", "90.0", "host: Python", "12,975"))


def test_a_profile_of_one_step_is_of_a_step(capsys):
    profile = {
        "device": "cpu", "first_step": 1, "steps": 1, "step_ms": 41.5, "busy_share": 0.9, "data_share": 0.04,
        "host_share": 0.06, "calls": 3.0, "largest": [{"name": "aten::mm", "ms": 1.5, "calls": 2}], "trace": "trace",
    }  # fmt: skip
    print_profile([StepState("train", "done", Record({"profile": profile}, {}, 1.0, "", "", {}, "", {}))])
    assert capsys.readouterr().out.splitlines()[0].rstrip() == "Step 1, 41.5 ms"


def test_without_a_profile_nothing_is_printed(capsys):
    print_profile([StepState("train", "done", Record({}, {}, 1.0, "", "", {}, "", {})), StepState("shard", "to do")])
    assert capsys.readouterr().out == ""
