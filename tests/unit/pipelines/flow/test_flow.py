"""Steps on a real folder: done once, resumed, refused where they drifted, told together where they failed."""

import errno
import json
import os
import signal
import sys
from dataclasses import replace

import numpy as np
import pytest
from pydantic import BaseModel, ConfigDict

from data_shards.config import DataConfig
from data_shards.store import open_store
from pipelines.console.terminal import Terminal
from pipelines.flow import DriftError, Step, WorkflowError, plan_steps, run_steps
from pipelines.flow.runner import in_order
from pipelines.interrupt import interruptible
from pipelines.placement import Node, PlacementConfig, resolve
from pipelines.steps.context import StepContext

QUIET = Terminal(quiet=True)
RUN = "a-run"


class Inner(BaseModel):
    model_config = ConfigDict(frozen=True)
    rate: float = 0.1


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True)
    size: int = 1
    inner: Inner = Inner()


class Counted:
    """A step's work that counts its calls and keeps what it was given."""

    def __init__(self, digest: str = "d", error: BaseException | None = None) -> None:
        self.calls, self.digest, self.error = [], digest, error

    def __call__(self, config, placement, out, context, **inputs) -> dict:
        self.calls.append(inputs)
        assert out.head("config.json") is not None, "the configuration is written before the first byte"
        assert out.head("record.json") is None
        if self.error:
            out.put("half", b"done")
            raise self.error
        return {"digest": self.digest, "resumed": out.head("half") is not None, "size": config.size}


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "store"))


def bring(steps, store, show=QUIET):
    def open_context() -> StepContext:
        placement = resolve(PlacementConfig(), [Node(2)])
        return StepContext(store, RUN, placement, tracking=None, show=show)

    return run_steps(steps, store, RUN, open_context=open_context, show=show)


def states(steps, store) -> dict[str, str]:
    return {state.name: state.state for state in plan_steps(steps, store, RUN)}


def test_steps_run_after_their_inputs_and_are_handed_their_facts(store):
    first, second = Counted("one"), Counted("two")
    steps = [Step("second", second, Settings(), {"given": "first"}), Step("first", first, Settings(size=3))]
    done = bring(steps, store)
    assert [state.name for state in done] == ["first", "second"]
    assert second.calls == [{"given": {"digest": "one", "resumed": False, "size": 3}}]
    assert done[1].record.inputs == {"given": "one"}


def test_a_record_says_where_its_facts_come_from(store):
    (done,) = bring([Step("only", Counted(), Settings())], store)
    kept = json.loads(store.get(f"runs/{RUN}/only/record.json"))
    assert kept["facts"]["digest"] == "d"
    assert kept["placement"]["workers"] == 1
    assert kept["seconds"] >= 0
    assert kept["started"] <= kept["finished"]
    assert {"git_commit", "packages", "inputs"} <= kept.keys()
    assert kept["packages"]["python"]
    assert done.record.facts == kept["facts"]


def test_finished_steps_do_not_run_again_or_connect(store):
    work = Counted()
    steps = [Step("only", work, Settings())]
    bring(steps, store)

    def refuse() -> StepContext:
        raise AssertionError("a finished run needs no Ray")

    (state,) = run_steps(steps, store, RUN, open_context=refuse, show=QUIET)
    assert (len(work.calls), state.state) == (1, "done")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)], ids=["interrupted", "exited"])
def test_an_interrupted_step_is_resumed_in_its_own_folder(store, error):
    with pytest.raises(type(error)):
        bring([Step("before", Counted(), Settings()), Step("only", Counted(error=error), Settings())], store)
    work, before = Counted(), Counted()
    steps = [Step("before", before, Settings()), Step("only", work, Settings())]
    assert states(steps, store) == {"before": "done", "only": "interrupted"}
    assert bring(steps, store)[1].record.facts["resumed"]
    assert (len(before.calls), len(work.calls)) == (0, 1)
    assert states(steps, store) == {"before": "done", "only": "done"}


def test_what_a_signal_breaks_is_an_interruption_not_a_failure(store):
    def broken(*_, **__):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except SystemExit:
            raise RuntimeError("a process of Ray was ended by the same signal") from None

    with pytest.raises(SystemExit) as ended, interruptible():
        bring([Step("only", broken, Settings())], store)
    assert ended.value.code == 128 + signal.SIGTERM
    assert states([Step("only", broken, Settings())], store) == {"only": "interrupted"}
    with pytest.raises(WorkflowError), interruptible():  # an earlier signal says nothing of a later step
        bring([Step("only", Counted(error=RuntimeError("x")), Settings())], store)


def test_a_full_disks_recorded_reason_is_that_of_the_terminal(store):
    error = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(WorkflowError) as failed:
        bring([Step("only", Counted(error=error), Settings())], store)
    kept = json.loads(store.get(f"runs/{RUN}/only/failure.json"))["reason"]
    assert store.uri in kept
    assert failed.value.reasons == {"only": kept}


def test_planning_runs_and_writes_nothing(store):
    steps = [Step("a", Counted(), Settings()), Step("b", Counted(), Settings(), {"x": "a"})]
    assert states(steps, store) == {"a": "to do", "b": "to do"}
    assert list(store.list()) == []


def test_drift_names_each_field_with_old_new_and_remedy(store):
    bring([Step("only", Counted(), Settings(size=1, inner=Inner(rate=0.1)))], store)
    changed = [Step("only", Counted(), Settings(size=2, inner=Inner(rate=0.5)))]
    with pytest.raises(DriftError) as error:
        bring(changed, store)
    told = str(error.value)
    assert "step only of run 'a-run'" in told
    assert "inner.rate: 0.1 -> 0.5; size: 1 -> 2" in told
    assert "--run NAME" in told
    assert "old values" in told


def test_later_drift_is_reported_before_an_earlier_step_runs(store):
    later = [Step("b", Counted(error=KeyboardInterrupt()), Settings())]
    with pytest.raises(KeyboardInterrupt):
        bring(later, store)
    first = Counted()
    with pytest.raises(DriftError, match="step b"):
        bring([Step("a", first, Settings()), Step("b", Counted(), Settings(size=9))], store)
    assert first.calls == []


def test_an_input_of_another_content_is_drift(store):
    def steps(digest: str):
        return [Step("a", Counted(digest), Settings()), Step("b", Counted(), Settings(), {"x": "a"})]

    bring(steps("old"), store)
    store.delete(f"runs/{RUN}/a/record.json")
    with pytest.raises(WorkflowError, match=r'step b failed: .*inputs\.x: "old" -> "new"'):
        bring(steps("new"), store)


def test_an_input_that_joins_or_leaves_is_drift_at_once(store):
    alone = [Step("b", Counted(), Settings())]
    joined = [Step("a", Counted("made"), Settings()), Step("b", Counted(), Settings(), {"x": "a"})]
    bring(alone, store)
    with pytest.raises(DriftError, match=r'inputs\.x: null -> "still to run"'):
        bring(joined, store)
    assert joined[0].run.calls == []
    other = open_store(store.uri + "-2")
    bring(joined, other)
    with pytest.raises(DriftError, match=r'inputs\.x: "made" -> null'):
        plan_steps(alone, other, RUN)


def test_the_placement_is_no_part_of_a_steps_identity(store):
    bring([Step("only", Counted(), Settings())], store)
    assert "placement" not in json.loads(store.get(f"runs/{RUN}/only/config.json"))


def test_independent_branches_go_on_and_failures_come_together(store):
    other, needs = Counted(), Counted()
    steps = [
        Step("bad", Counted(error=ValueError("a is 3, must be 2; set 2")), Settings()),
        Step("worse", Counted(error=RuntimeError("broken")), Settings()),
        Step("needs", needs, Settings(), {"x": "bad"}),
        Step("far", Counted(), Settings(), {"x": "needs"}),
        Step("other", other, Settings()),
    ]
    with pytest.raises(WorkflowError) as error:
        bring(steps, store)
    told = str(error.value)
    assert "step bad failed: a is 3, must be 2; set 2" in told
    assert "step worse failed: unexpected RuntimeError: broken" in told
    assert "not run because of it: needs, far" in told
    assert (len(other.calls), len(needs.calls)) == (1, 0)
    expected = {"bad": "failed", "worse": "failed", "needs": "to do", "far": "to do", "other": "done"}
    assert states(steps, store) == expected


def test_only_unexpected_errors_show_a_traceback(store, capsys):
    steps = [
        Step("mistake", Counted(error=ValueError("yours")), Settings()),
        Step("defect", Counted(error=ZeroDivisionError("ours")), Settings()),
    ]
    with pytest.raises(WorkflowError):
        bring(steps, store, show=Terminal())
    told = capsys.readouterr().err
    assert "ZeroDivisionError: ours" in told
    assert "ValueError" not in told


def test_what_cannot_be_connected_to_is_no_failure_of_a_step(store):
    def unreachable() -> StepContext:
        raise ValueError("MLflow at http://x does not answer")

    steps = [Step("a", Counted(), Settings()), Step("b", Counted(), Settings())]
    with pytest.raises(ValueError, match=r"^MLflow at") as error:
        run_steps(steps, store, RUN, open_context=unreachable, show=QUIET)
    assert not isinstance(error.value, WorkflowError)
    assert list(store.list()) == []


@pytest.mark.parametrize("name", ["config.json", "record.json"])
@pytest.mark.parametrize("content", [b'{"facts": {"dig', b'{"other": 1}', b"\xff\xfe", b"[]"], ids=repr)
def test_a_damaged_record_is_named_with_a_remedy(store, name, content):
    steps = [Step("only", Counted(), Settings())]
    bring(steps, store)
    store.put(f"runs/{RUN}/only/{name}", content)
    with pytest.raises(ValueError, match=rf"only/{name} is not a valid step file .*restore it, or delete"):
        plan_steps(steps, store, RUN)


def test_numpy_facts_become_plain_numbers_and_others_refused(store):
    def numbers(config, placement, out, context) -> dict:
        return {"digest": "d", "auc": np.float32(0.5), "n": np.int64(3)}

    (done,) = bring([Step("only", numbers, Settings())], store)
    assert done.record.facts == {"digest": "d", "auc": 0.5, "n": 3}

    def objects(config, placement, out, context) -> dict:
        return {"digest": "d", "what": object()}

    with pytest.raises(WorkflowError, match="cannot be stored in a record"):
        bring([Step("other", objects, Settings())], store)


def test_duplicate_steps_and_unknown_inputs_are_our_mistakes():
    with pytest.raises(AssertionError, match="two steps"):
        in_order([Step("a", Counted(), Settings()), Step("a", Counted(), Settings())])
    with pytest.raises(AssertionError, match="needs b"):
        in_order([Step("a", Counted(), Settings(), {"x": "b"})])


def test_a_field_that_a_later_version_adds_is_no_drift(store):
    class Older(BaseModel):
        size: int = 1

    class Changed(BaseModel):
        size: int = 1
        inner: Inner = Inner(rate=0.7)

    bring([Step("only", Counted(), Older(size=3))], store)
    assert states([Step("only", Counted(), Settings(size=3))], store) == {"only": "done"}
    with pytest.raises(DriftError, match=r"\(size: 3 -> 4\)"):
        plan_steps([Step("only", Counted(), Settings(size=4))], store, RUN)
    with pytest.raises(DriftError, match=r"\(inner\.rate: 0\.7 -> 0\.1\)"):
        plan_steps([Step("only", Counted(), Changed(size=3, inner=Inner()))], store, RUN)


def test_a_step_that_takes_ctrl_c_for_itself_gives_it_back(store):
    before = signal.getsignal(signal.SIGINT)

    def takes_it(config, placement, out, context) -> dict:
        signal.signal(signal.SIGINT, lambda *args: sys.exit(0))
        return {"digest": "d"}

    bring([Step("only", takes_it, Settings())], store)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_failure_is_recorded_until_the_step_runs_again(store):
    reason = "a is 3, must be 2; set 2"
    with pytest.raises(WorkflowError):
        bring([Step("only", Counted(error=ValueError(reason)), Settings())], store)
    steps = [Step("only", Counted(error=KeyboardInterrupt()), Settings())]
    (state,) = plan_steps(steps, store, RUN)
    assert (state.state, state.reason) == ("failed", reason)
    with pytest.raises(KeyboardInterrupt):
        bring(steps, store)
    (state,) = plan_steps(steps, store, RUN)
    assert (state.state, state.reason) == ("interrupted", "")
    bring([Step("only", Counted(), Settings())], store)
    assert sorted(store.list(f"runs/{RUN}/only/")) == [
        f"runs/{RUN}/only/{n}" for n in ("config.json", "half", "record.json")
    ]


@pytest.mark.parametrize("content", [b"", b"{", b'{"other": 1}', b"[]", b"\xff"], ids=repr)
def test_a_damaged_reason_leaves_the_step_failed(store, content):
    with pytest.raises(WorkflowError):
        bring([Step("only", Counted(error=ValueError("x")), Settings())], store)
    store.put(f"runs/{RUN}/only/failure.json", content)
    assert states([Step("only", Counted(), Settings())], store) == {"only": "failed"}


def test_a_refusal_does_not_bind_the_run_where_the_step_says_so(store):
    """The remedy in the message of a refused conversion is another setting: it must work under the same name."""
    refused = Counted(error=ValueError("size is 1, must be 2; set 2"))
    for name, binds in (("binds", True), ("does-not", False)):
        step = Step(name, refused, Settings(size=1), binds_on_refusal=binds)
        with pytest.raises(WorkflowError, match="must be 2"):
            bring([step], store)
        (state,) = plan_steps([step], store, RUN)
        assert (state.state, state.reason) == ("failed", "size is 1, must be 2; set 2")
    (state,) = bring([Step("does-not", Counted(), Settings(size=2), binds_on_refusal=False)], store)
    assert (state.state, state.reason) == ("done", "")
    with pytest.raises(DriftError):
        plan_steps([Step("binds", Counted(), Settings(size=2))], store, RUN)


def test_an_unexpected_error_binds_the_run_all_the_same(store):
    broken = Counted(error=RuntimeError("broken"))
    with pytest.raises(WorkflowError):
        bring([Step("only", broken, Settings(size=1), binds_on_refusal=False)], store)
    with pytest.raises(DriftError):
        plan_steps([Step("only", broken, Settings(size=2), binds_on_refusal=False)], store, RUN)


def test_a_run_stands_for_one_source_too(store):
    config = DataConfig(dataset="own", layout="folders", source="/old")
    step = Step("shard", lambda *given: {"digest": "d"}, config)
    bring([step], store)
    with pytest.raises(DriftError, match=r'source: "/old" -> "/new".*--run NAME'):
        plan_steps([replace(step, config=config.model_copy(update={"source": "/new"}))], store, RUN)
