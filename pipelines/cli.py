"""The command `medmamba`: verbs, their arguments (tyro over recipes), exit codes. The work itself lies elsewhere.

Exit codes: 0 done, 2 wrong use, 3 a gate said no, 1 anything else.
"""

import difflib
import functools
import importlib
import json
import logging
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import tyro
from pydantic import ValidationError

from data_shards.catalog import card
from data_shards.store import Store, StoreError, open_store
from data_shards.store.disk import require_temporary_folder
from data_shards.store.outage import PATIENCE_S, listening
from medmamba.config import MedMambaConfig
from pipelines.bench.networks import bench
from pipelines.cluster.background import beside
from pipelines.cluster.ray_session import RaySessionError
from pipelines.cluster.stops import Paused
from pipelines.commands.arguments import HelpShown, UsageError, of_kind, parse, peek, unchecked
from pipelines.commands.bytecode import keep_bytecode
from pipelines.commands.class_table import completed
from pipelines.commands.datasets import datasets
from pipelines.commands.summary import print_plan, print_profile, print_summary
from pipelines.commands.terminal import Terminal, console, show_log_visibly, table, visible
from pipelines.commands.work_log import own_messages, work_log
from pipelines.costs import read_prices
from pipelines.demand import RunDemand
from pipelines.faults import fault_line, has_more, lost_ray
from pipelines.flow import DriftError, Record, Step, StepContext, StepState, WorkflowError, plan_steps, run_steps
from pipelines.flow.record import read_record
from pipelines.flow.runner import step_folder
from pipelines.initial_weights import InitialWeights, pinned, weights_of_run
from pipelines.interrupt import HAS_TOLD, INTERRUPTED, interruptible, is_interrupted
from pipelines.override import ConfigError, difference, explain, flatten, override, validated
from pipelines.placement import Placement, PlacementConfig
from pipelines.recipes import RECIPES, Recipe, recipe
from pipelines.scratch import remove_left_behind
from pipelines.steps.shard import check_images
from pipelines.tracking.leases import RUN_WAIT_S, driver_lease
from pipelines.workflows import WORKFLOWS, until

DONE, FAILED, WRONG_USE, REFUSED = 0, 1, 2, 3
# A signal to all processes of a group reaches them one after the other. What an interrupted command holds is given back
# within seconds, also where Ray is gone.
SIGNALS_WITHIN_S, ENDING_S = 1.0, 20.0
DEFAULT_STORE = "./medmamba-store"
_BEGAN = time.monotonic()
WORKFLOW_FILE = "workflow.json"
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
Flag = tyro.conf.FlagCreatePairsOff[bool]
# What a step's driver needs of the slow ones.
LIBRARIES = {
    "shard": (),
    "tune": ("ray.tune", "optuna"),
    "train": ("ray.train", "pipelines.worker.group.process_group"),
}
Values = TypeVar("Values")
Where = TypeVar("Where")


def _default_store() -> str:
    store = os.environ.get("MEDMAMBA_STORE")
    if not store and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise UsageError(
            "this runs as a Ray job, whose folder is deleted with it, and no store is named; "
            "give --store, or set MEDMAMBA_STORE before submitting"
        )
    return store or DEFAULT_STORE


@dataclass(frozen=True)
class Work(Generic[Values, Where]):
    """What every verb that brings steps to done takes: a recipe's values, a placement, and where it goes."""

    values: Annotated[Values, tyro.conf.arg(name="")]
    placement: Where
    """How and where; never part of what is made."""
    recipe: str = ""
    """Recipe to start from; its values are the defaults below. Empty: what the run was begun with."""
    run: str = ""
    """Name of the run: it stands for one configuration, and asking again goes on with it. Empty: the recipe's name."""
    store: str = ""
    """Where everything lies: a folder or s3://bucket/prefix. Empty: $MEDMAMBA_STORE, else ./medmamba-store."""
    wait_s: float = RUN_WAIT_S
    """Seconds to wait for another driver of this run that is alive; one that died is replaced without being asked."""
    dry_run: Flag = False
    """Print the resolved configuration and placement and the state of each step, and look for the images; run
    nothing."""
    json: Flag = False
    """Print the result as JSON on standard output."""


@dataclass(frozen=True)
class ProfiledWork(Work[Values, Where]):
    """What every verb takes that may train."""

    profile: Flag = False
    """Look into a few steps of the training: print the largest kernels and the shares of GPU, host and data, and keep
    a trace in the step's folder. The weights are the same; the epoch is slower."""


@dataclass(frozen=True)
class RunWork(ProfiledWork[Values, Where]):
    """Bring a whole workflow to done: finished steps are skipped, an interrupted one resumes."""

    workflow: Annotated[
        tyro.conf.Positional[Literal["", "release", "direct"]], tyro.conf.arg(metavar="{release,direct}")
    ] = ""
    """release: shard, tune, train, evaluate, register, promote. direct: the same without the sweep.
    Empty: the run's; for a new run release."""
    until: Annotated[
        Literal["", "shard", "tune", "train", "evaluate", "register", "promote"],
        tyro.conf.arg(metavar="{shard,tune,train,evaluate,register,promote}"),
    ] = ""
    """Stop after this step. Empty: go on to the end."""


@dataclass(frozen=True)
class StepWork(Work[Values, Where]):
    """Bring one step, and whatever it needs, to done."""

    workflow: Annotated[Literal["", "release", "direct"], tyro.conf.arg(metavar="{release,direct}")] = ""
    """Which workflow the step belongs to. Empty: the run's; for a new run direct, or release for tune."""


@dataclass(frozen=True)
class TrainWork(StepWork[Values, Where], ProfiledWork[Values, Where]):
    """Bring the training, and whatever it needs, to done."""

    max_minutes: float = 0.0
    """End at a checkpoint after so many minutes, counted from the start of the command, with exit code 0; the same
    command resumes. 0: train to the end."""


@dataclass(frozen=True)
class PromoteWork(StepWork[Values, Where]):
    """Move the alias to this run's version, if the gate says yes (exit code 3 if it says no)."""

    force: Flag = False
    """Move the alias although the gate said no, each time it has gone elsewhere. Kept on the version, and as a step of
    its own: promote-forced, promote-forced-2, ..."""


Resolved = Work[Recipe, PlacementConfig]
BEHAVIOUR = " What it needs is brought to done first: finished steps are skipped, an interrupted one resumes."

# ---------------------------------------------------------------------------------------------- verbs that do work


def run(argv: Sequence[str]) -> int:
    """Bring a workflow to done: images in, a promoted model out."""
    return _run("run", argv)


def quickstart(argv: Sequence[str]) -> int:
    """Try the whole chain on synthetic images, on this machine, in minutes."""
    return _run("quickstart", ["release", "--recipe", "quickstart", *argv])


def _run(verb: str, argv: Sequence[str]) -> int:
    work = _parse(RunWork, verb, argv, (VERBS[verb].__doc__ or "") + BEHAVIOUR)
    workflow = work.workflow or _kept_workflow(work) or "release"
    init = _initial_weights(work)
    steps = _steps(workflow, pinned(work.values, init), work.until)
    return _work(work, workflow, lambda: steps, init)


def _step_verb(name: str, text: str) -> Callable[[Sequence[str]], int]:
    def verb(argv: Sequence[str]) -> int:
        kind = {"promote": PromoteWork, "train": TrainWork}.get(name, StepWork)
        work = _parse(kind, name, argv, text + BEHAVIOUR)
        workflow = work.workflow or _kept_workflow(work) or ("release" if name == "tune" else "direct")
        init = _initial_weights(work)
        values = pinned(work.values, init)
        if isinstance(work, PromoteWork) and work.force:
            return _work(work, workflow, lambda: _forced(WORKFLOWS[workflow](values), work), init)
        steps = _steps(workflow, values, name)
        return _work(work, workflow, lambda: steps, init)

    verb.__doc__ = text
    return verb


def _steps(workflow: str, values: Recipe, last: str) -> list[Step]:
    """The steps of the workflow up to `last`, all where that is empty; UsageError where it has no such step."""
    steps = WORKFLOWS[workflow](values)
    try:
        return until(steps, last) if last else steps
    except ValueError as error:
        raise UsageError(f"{workflow}: {error}") from None


def _forced(steps: list[Step], work: Resolved) -> list[Step]:
    """What a promotion needs that does not ask the gate, and it; the gate's own verdict stays as it was recorded.

    Forcing is an act: where the alias has gone elsewhere since the last one, there is another (promote-forced-2, ...).
    """
    gate = next(step for step in steps if step.name == "promote")
    store, name = _open(work.store), "promote-forced"
    made: list[tuple[str, Record]] = []
    while record := read_record(step_folder(store, work.run, name)):
        made.append((name, record))
        name = f"promote-forced-{len(made) + 1}"
    if made and _holds(store, made[-1][1].facts):
        name = made[-1][0]
    forced = replace(gate, name=name, config=override(gate.config, {"force": True}))
    return until([*steps, forced], name)


def _holds(store: Store, promoted: dict[str, Any]) -> bool:
    """Whether the alias still points to the version that a finished promotion gave it to."""
    from pipelines.tracking import open_tracking
    from pipelines.tracking.registry import by_alias

    now = by_alias(open_tracking(store), promoted["model"], promoted["alias"])
    return now is not None and now.number == promoted["version"]


def _initial_weights(work: Resolved) -> InitialWeights | None:
    """The weights that the run's trainings start from, found before any work; None where they are random."""
    if not work.values.train.init:
        return None
    kept = _kept(work.store, work.run)
    source = flatten(kept["recipe"]).get("train.init", "") if kept else ""
    return weights_of_run(work.values, _open(work.store), work.run, kept_source=source)


def _work(work: Resolved, workflow: str, plan: Callable[[], list[Step]], init: InitialWeights | None) -> int:
    store = _open(work.store, patience_s=work.placement.patience_s)
    if work.dry_run:
        return _dry_run(work, workflow, plan(), store, init=init)
    require_temporary_folder()
    before = plan_steps(plan(), store, work.run)
    if _is_profiled(work) and any((state.name, state.state) == ("train", "done") for state in before):
        Terminal().say(
            f"the training of run {work.run} is finished, so nothing is left to profile; give --profile with another "
            "--run NAME"
        )
    with work_log(through=os.environ.get("MEDMAMBA_WORKER_LOGS") == "1") as log:
        terminal = Terminal(log=log)
        try:
            with own_messages(terminal.say), listening(terminal.outage):
                states = _brought(work, workflow, plan, store, terminal=terminal, init=init)
        except (WorkflowError, RaySessionError) as error:
            if isinstance(error, RaySessionError):
                terminal.trace("".join(traceback.format_exception(error)))
            elif not any(has_more(each) for each in error.failures.values()):
                raise
            error.args = (f"{error}{log.named()}",)
            raise
        finally:
            terminal.close()
    if work.json:
        facts = {state.name: state.record.facts for state in states if state.record}
        if "shard" in facts:
            facts["shard"] = completed(facts["shard"], store)
        print(json.dumps(facts, indent=2))
    else:
        print_summary(states, store, work.run)
        if _is_profiled(work):
            print_profile(states)
    return _verdict(states, {state.name for state in before if state.state == "done"}, work, store, Terminal())


def _brought(
    work: Resolved,
    workflow: str,
    plan: Callable[[], list[Step]],
    store: Store,
    *,
    terminal: Terminal,
    init: InitialWeights | None,
) -> list[StepState]:
    """The steps of `plan`, brought to done under the lease of the run, which finished ones do not need."""
    terminal.say(f"run {work.run} of workflow {workflow} in {store.uri}")
    if init is not None:
        terminal.say(init.summary)
    remove_left_behind()
    if all(state.state == "done" for state in plan_steps(plan(), store, work.run)):
        return run_steps(plan(), store, work.run, open_context=_not_needed, show=terminal)
    with interruptible(), driver_lease(store, work.run, wait_s=work.wait_s, say=terminal.say) as check:
        steps = plan()  # what another driver has done meanwhile decides which forced promotion this is
        if init is not None:
            init.keep(store)
        opened = functools.partial(_open_context, work, workflow, steps, store, terminal=terminal, check=check)
        return run_steps(steps, store, work.run, open_context=opened, show=terminal)


def _is_profiled(work: Resolved) -> bool:
    return isinstance(work, ProfiledWork) and work.profile


def _not_needed() -> StepContext:
    raise AssertionError("a finished step lost its record")


def _verdict(states: list[StepState], before: set[str], work: Resolved, store: Store, terminal: Terminal) -> int:
    """A recorded "no" is exit code 3 each time it is asked, a recorded "yes" 0; the last gate that was asked counts.

    Of a yes that was recorded `before` this command it says when it was decided and where the alias is now: another
    version may have been promoted since, which is as it should be, and no error.
    """
    last = next((state for state in reversed(states) if state.record and "verdict" in state.record.facts), None)
    if last is None or last.record is None:
        return DONE
    if last.record.facts["verdict"] == "no":
        terminal.say(f"not promoted: {last.record.facts['reason']}")
        return REFUSED
    if last.name in before:
        from pipelines.tracking.promoted import describe_promotion

        if said := describe_promotion(last.record, store, work.run):
            terminal.say(said)
    return DONE


def _open_context(
    work: Resolved,
    workflow: str,
    steps: Sequence[Step],
    store: Store,
    *,
    terminal: Terminal,
    check: Callable[[], None],
) -> StepContext:
    """Connects to everything that the steps still to do need; whatever cannot be reached is named before any work."""
    states = plan_steps(steps, store, work.run)
    to_do = {state.name for state in states if state.state != "done"}
    _check_source(work, states, store)  # before anything is written under the run's name
    store.check()
    from pipelines.tracking import check_tracking, open_tracking

    check_tracking(store)
    on_ray = any(step.is_spread for step in steps if step.name in to_do)
    opened = beside(functools.partial(open_tracking, store))  # importing MLflow takes as long as starting Ray
    try:
        placement = _place(work, states, store, terminal, after=opened) if on_ray else None
    except BaseException:
        wait([opened], timeout=ENDING_S)  # a new database that is left amid its migrations can never be opened
        raise
    if not opened.done():
        terminal.begin("opening MLflow")
    tracking = replace(opened.result(), patience_s=work.placement.patience_s)
    tracking.close_killed(store.at("runs", work.run))
    terminal.ready()
    kept = {"workflow": workflow, "recipe": work.values.model_dump(mode="json")}
    store.at("runs", work.run).put(WORKFLOW_FILE, json.dumps(kept, indent=2, sort_keys=True).encode())
    return StepContext(
        store, work.run, placement, tracking, terminal, check, profile=_is_profiled(work), until=_until(work)
    )


def _until(work: Resolved) -> float:
    """When the command's time is up, on the monotonic clock; 0: never."""
    minutes = work.max_minutes if isinstance(work, TrainWork) else 0.0
    if not 0 <= minutes < math.inf:
        raise ValueError(f"--max-minutes {minutes:g}: give minutes above 0, or 0 to train to the end")
    return _BEGAN + 60 * minutes if minutes > 0 else 0.0


def _preload(to_do: Collection[str], after: Future[Any]) -> None:
    """Imports what the first of Ray's steps to do imports, once MLflow is there: Ray takes longer to start."""
    wait([after])
    first = next((name for name in LIBRARIES if name in to_do), None)
    for module in LIBRARIES[first] if first else ():
        importlib.import_module(module)


def _place(
    work: Resolved, states: Sequence[StepState], store: Store, terminal: Terminal, *, after: Future[Any]
) -> Placement:
    """Connects to Ray and resolves the placement on it; imports what the first step needs once `after` is done."""
    from pipelines.cluster import ray_session

    ray_session.prepare()
    beside(functools.partial(_preload, [state.name for state in states if state.state != "done"], after))
    address = os.environ.get("RAY_ADDRESS")
    terminal.begin(f"connecting to the Ray at {address}" if address else "starting Ray on this machine")
    choice = ray_session.begin_choice(work.placement, *_scans(work, states))
    ray_session.connect(lost=functools.partial(_end_without_ray, terminal))
    terminal.ready()
    demand = RunDemand(work.values, states, store, work.run)
    terminal.begin("looking for CPUs, GPUs and a backend of the scan")
    placement = ray_session.place(work.placement, store, demand.for_placement(), say=terminal.say, choice=choice)
    terminal.ready()
    terminal.say(f"placement: {placement.summary}")
    demand.check(placement)
    return placement


def _scans(work: Resolved, states: Sequence[StepState]) -> tuple[Sequence[tuple[int, int, int]], list[str]]:
    """Sizes of the scans that the steps still to do will run, and their types."""
    to_do, values = {state.name for state in states if state.state != "done"}, work.values
    trained = "bfloat16" if values.train.precision == "bfloat16" else "float32"
    dtypes = {trained} if to_do & {"tune", "train"} else set()
    if "evaluate" in to_do:
        dtypes.add("float32")
    sizes = values.model.scan_sizes if isinstance(values.model, MedMambaConfig) else ()
    return sizes, sorted(dtypes, key=lambda dtype: dtype != trained)


def _end_without_ray(terminal: Terminal, server: str) -> None:
    """Ends this process: what waits for a Ray that is gone would wait for minutes, or for ever.

    At once, unless a signal that ended Ray as well ends this process already: it is left some time to give back what it
    holds.
    """
    try:
        if not is_interrupted(wait_s=SIGNALS_WITHIN_S):
            terminal.close()
            terminal.say(f"medmamba: {lost_ray(server)}{terminal.details()}")
        elif not HAS_TOLD.wait(ENDING_S):
            terminal.close()
            terminal.say(f"medmamba: {INTERRUPTED}")
    finally:  # standard error may be closed
        os._exit(FAILED)


def _dry_run(work: Resolved, workflow: str, steps: list[Step], store: Store, *, init: InitialWeights | None) -> int:
    states = plan_steps(steps, store, work.run)
    recipe_values = work.values.model_dump(mode="json")
    resolved: dict[str, Any] = {"run": work.run, "store": store.uri, "workflow": workflow, "recipe": recipe_values}
    _check_source(work, states, store)
    notes = [init.summary] if init is not None else []
    placement = _preview(work, steps, states, store, say=notes.append)
    where = f"the Ray at {os.environ['RAY_ADDRESS']}" if os.environ.get("RAY_ADDRESS") else "this machine"
    if work.json:
        resolved["placement"] = placement.model_dump(mode="json") if placement else None
        resolved |= {"placed_on": where if placement else None, "notes": notes}
        print(json.dumps({**resolved, "steps": {state.name: state.state for state in states}}, indent=2))
    else:
        print(json.dumps(resolved, indent=2))
        print_plan(states)
        for line in [f"placement on {where}: {placement.summary}", *notes] if placement else notes:
            print(line)
    return DONE


def _preview(
    work: Resolved, steps: Sequence[Step], states: Sequence[StepState], store: Store, *, say: Callable[[str], None]
) -> Placement | None:
    """The placement that the work would get; None where nothing is left that needs a Ray."""
    spread = {step.name for step in steps if step.is_spread}
    if all(state.state == "done" for state in states if state.name in spread):
        return None
    from pipelines.cluster import ray_session

    demand = RunDemand(work.values, states, store, work.run)
    placement = ray_session.preview(work.placement, store, demand.for_placement(), say=say)
    demand.check(placement)
    return placement


def _check_source(work: Resolved, states: Sequence[StepState], store: Store) -> None:
    """Raises ValueError where the images are still to be converted and are not there."""
    if any(state.name == "shard" and state.state != "done" for state in states):
        check_images(work.values.data, store)


# ------------------------------------------------------------------------------------------------ verbs that look


def shards(argv: Sequence[str]) -> int:
    """Look at a dataset: verify, show, duplicates, quarantine, file names."""
    from pipelines.commands.shards import shards

    return shards(argv, open_at=lambda uri: _open(uri or _default_store()))


def status(argv: Sequence[str]) -> int:
    """List the runs in the store and where their steps stand."""

    def arguments(run: tyro.conf.Positional[str] = "", store: str = "", json: Flag = False) -> tuple[str, str, bool]:
        """List the runs in the store and where their steps stand.

        Args:
            run: Run to show; empty lists all.
            store: Folder or s3://bucket/prefix; empty: $MEDMAMBA_STORE, else ./medmamba-store.
            json: Print JSON.
        """
        return run, store, json

    wanted, uri, as_json = parse(arguments, "status", argv)
    from pipelines.commands.status import read_status

    store = _open(uri or _default_store())
    rows = read_status(store, wanted)
    if wanted and not rows:
        raise UsageError(f"there is no run {wanted!r} in {store.uri}; `medmamba status` lists the ones there are")
    if as_json:
        print(json.dumps(rows, indent=2))
    elif not rows:
        console().print(f"no runs in {store.uri} yet; `medmamba quickstart` makes one")
    else:
        shown = [(r["run"], r["step"], r["state"], (r["finished"] or "")[:19], r["told"]) for r in rows]
        table(f"Runs in {store.uri}", ("run", "step", "state", "finished", "facts"), shown)
    return DONE


def predict(argv: Sequence[str]) -> int:
    """Classify images with the champion."""

    def arguments(
        images: tyro.conf.Positional[tuple[str, ...]],
        model: str = "",
        alias: str = "champion",
        store: str = "",
        json: Flag = False,
    ) -> tuple[tuple[str, ...], str, str, str, bool]:
        """Classify images with a registered model and print the probability of each class.

        Args:
            images: Image files.
            model: Registered model; empty: the only one that has the alias.
            alias: Which of its versions.
            store: Folder or s3://bucket/prefix; empty: $MEDMAMBA_STORE, else ./medmamba-store.
            json: Print JSON.
        """
        return images, model, alias, store, json

    paths, model, alias, uri, as_json = parse(arguments, "predict", argv)
    if not paths:
        raise UsageError("predict: name at least one image file")
    from pipelines.commands.predict import predict as classify

    rows = classify([Path(path) for path in paths], store=_open(uri or _default_store()), model=model, alias=alias)
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        _print_predictions(rows)
    return DONE


def submit(argv: Sequence[str]) -> int:
    """Run any of these commands as a job on a Ray cluster."""
    own, dashes, command = _split_at_dashes(argv)
    nothing = UsageError("submit: nothing to run; put the command after --, as in `medmamba submit -- run release`")
    if not dashes and set(own) & set(VERBS):
        raise nothing

    def arguments(address: str = "", wait: bool = True) -> tuple[str, bool]:
        """Run a medmamba command as a Ray job: `medmamba submit --address URL -- run release --recipe quickstart`.

        The three packages travel, the endpoint and address variables too; keys never do. Follows the job's log and
        returns its exit code.

        Args:
            address: Address of the cluster's dashboard, http://HOST:8265; empty: $RAY_API_SERVER_ADDRESS.
            wait: Follow the log until the job ends; --no-wait prints its id and returns.
        """
        return address, wait

    address, wait = parse(arguments, "submit", own)
    command = command[1:] if command[:1] == ["medmamba"] else command
    if not command:
        raise nothing
    if command[0] not in VERBS:  # the cluster would find out too, minutes later
        raise UsageError(_no_such_verb(command[0]))
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS", "")
    if not address.startswith(("http://", "https://")):
        raise UsageError(
            f"submit: {f'--address {address} is no address' if address else 'no address'} of a Ray dashboard; give "
            "--address http://HOST:8265, or set RAY_API_SERVER_ADDRESS"
        )
    from pipelines.cluster.job import submit as submit_job

    return submit_job(address, command, wait=wait)


# ---------------------------------------------------------------------------------------------------- arguments

VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "quickstart": quickstart,
    "run": run,
    "shard": _step_verb("shard", "Convert an image set into shards, an index and a manifest."),
    "tune": _step_verb("tune", "Search hyperparameters with Ray Tune."),
    "train": _step_verb("train", "Train with Ray Train and DeepSpeed."),
    "evaluate": _step_verb("evaluate", "Judge the trained model on the test split."),
    "register": _step_verb("register", "Register the trained model in MLflow."),
    "promote": _step_verb("promote", "Give the version the alias champion, if the gate says yes."),
    "predict": predict,
    "status": status,
    "datasets": datasets,
    "shards": shards,
    "submit": submit,
    "bench": bench,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit code; a person's mistake is told in one line, without a traceback."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        _print_help()
        return DONE if argv else WRONG_USE
    verb = VERBS.get(argv[0])
    keep_bytecode()
    show_log_visibly()
    logging.raiseExceptions = False  # a library that logs while the process ends would print after the last line
    try:
        if verb is None:
            raise UsageError(_no_such_verb(argv[0]))
        return _flushed(verb(argv[1:]))
    except ValidationError as error:
        return _tell(explain(error), WRONG_USE)
    except (UsageError, ConfigError, DriftError) as error:
        return _tell(error, WRONG_USE)
    except (ValueError, WorkflowError) as error:
        return _tell(error, FAILED)
    except BrokenPipeError:
        return _nobody_reads()
    except HelpShown:
        return _flushed(DONE)
    except Paused as paused:
        return _tell(paused, DONE)
    except (KeyboardInterrupt, SystemExit):  # ray.init turns SIGTERM into SystemExit, Ray Train a Ctrl-C
        return _tell(INTERRUPTED, FAILED)
    except Exception as error:  # the last boundary: the traceback is kept, the user gets a line
        return _unexpected(error)


def _parse(kind: Any, verb: str, argv: Sequence[str], description: str) -> Any:
    """`argv` over the defaults of the recipe it names, or of the run it names, with run and store filled in."""
    store = peek(argv, "store") or _default_store()
    base = of_kind(_base(verb, argv, store), argv)
    shown, where = unchecked(base), unchecked(PlacementConfig())
    work = parse(kind[type(shown), type(where)], verb, argv, default=kind(shown, where), description=description)
    # A recipe changes in one way only: by validated dotted keys.
    changes = {key: new for key, (_, new) in difference(base.model_dump(), asdict(work.values)).items()}
    values = override(base, changes)
    placement = validated(PlacementConfig, asdict(work.placement), prefix="placement")
    _check_scan(placement.scan)
    _check_prices(placement.prices)
    if values.data.layout == "catalog":
        _check_dataset(values.data.dataset)
    run_name = work.run or work.recipe
    if not RUN_NAME.fullmatch(run_name):
        raise UsageError(
            f"--run {run_name!r}: a run's name is a folder: at most 100 letters, digits, '.', '_', '-', the first of "
            f"them a letter or digit"
        )
    return replace(work, values=values, placement=placement, run=run_name, store=work.store or store)


def _base(verb: str, argv: Sequence[str], store: str) -> Recipe:
    """The recipe that `argv` starts from: the one it names, or the one its run was begun with."""
    name, run_name = peek(argv, "recipe"), peek(argv, "run")
    if name:
        try:
            return recipe(name)
        except ValueError as error:
            raise UsageError(str(error)) from None
    if run_name and (kept := _kept(store, run_name)):
        return validated(Recipe, kept["recipe"])
    if {"-h", "--help"} & set(argv):
        return Recipe()
    there = f"there is no run {run_name!r} in {store} to go on with; " if run_name else ""
    raise UsageError(f"{verb}: {there}name a recipe (--recipe {'|'.join(RECIPES)}) or a run begun before (--run NAME)")


def _check_dataset(name: str) -> None:
    try:
        card(name)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _check_prices(path: str) -> None:
    try:
        read_prices(path)  # before the training, which reads them again for its last line
    except ValueError as error:
        raise UsageError(str(error)) from None


def _check_scan(name: str) -> None:
    if name != "auto":
        from medmamba.ops.ss2d_scan import backends  # imports torch, which most commands do without

        if name not in backends():
            raise UsageError(f"--placement.scan {name}: there are auto, {', '.join(backends())}")


def _kept(store: str, run_name: str) -> dict | None:
    """The workflow and the recipe that a run was begun with, None where there is no such run."""
    if not RUN_NAME.fullmatch(run_name):
        return None
    folder = _open(store).at("runs", run_name)
    if folder.head(WORKFLOW_FILE) is None:
        return None
    try:
        kept = json.loads(folder.get(WORKFLOW_FILE))
        problem = "" if _is_kept(kept) else "it does not hold a workflow and a recipe"
    except (ValueError, RecursionError) as error:
        problem = str(error)
    if problem:
        raise ValueError(
            f"{folder.uri}/{WORKFLOW_FILE} is not whole JSON ({problem}): delete it, and name the workflow and the "
            "recipe (--recipe) instead"
        )
    return kept


def _is_kept(kept: Any) -> bool:
    return isinstance(kept, dict) and kept.get("workflow") in [*WORKFLOWS] and isinstance(kept.get("recipe"), dict)


def _kept_workflow(work: Resolved) -> str:
    kept = _kept(work.store, work.run)
    return kept["workflow"] if kept else ""


def _open(uri: str, *, patience_s: float = PATIENCE_S) -> Store:
    try:
        store = open_store(uri, patience_s=patience_s)
    except StoreError as error:  # nothing was reached for yet: the address itself cannot be meant
        raise UsageError(f"--store: {error}") from None
    store.reach()  # once it has answered, a step waits for it with more patience
    return store


def _split_at_dashes(argv: Sequence[str]) -> tuple[list[str], str, list[str]]:
    argv = list(argv)
    if "--" not in argv:
        return argv, "", []
    at = argv.index("--")
    return argv[:at], "--", argv[at + 1 :]


def _no_such_verb(verb: str) -> str:
    near = difflib.get_close_matches(verb, VERBS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"there is no verb {verb}; {hint}there are {', '.join(VERBS)}"


def _print_help() -> None:
    print("medmamba: medical images in, a promoted model out\n")
    print("usage: medmamba VERB [options]     (medmamba VERB --help explains each)\n")
    for name, verb in VERBS.items():
        print(f"  {name:<11} {(verb.__doc__ or '').splitlines()[0]}")
    print(f"\nrecipes: {', '.join(RECIPES)}")
    print("exit codes: 0 done, 2 wrong use, 3 a gate said no, 1 anything else")


def _print_predictions(rows: list[dict]) -> None:
    shown = []
    for row in rows:
        best = sorted(row["scores"].items(), key=lambda pair: -pair[1])
        shown.append((row["image"], row["class"], "  ".join(f"{name} {value:.3f}" for name, value in best)))
    table(f"{rows[0]['model']} version {rows[0]['version']}", ("image", "class", "probabilities"), shown)


def _flushed(code: int) -> int:
    """`code`, once standard output has taken what was printed: after a help text nothing else would ask."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return _nobody_reads()
    return code


def _nobody_reads() -> int:
    # `medmamba ... | head`: whoever read has enough. Python would complain once more when it flushes at the end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return FAILED


def _unexpected(error: Exception) -> int:
    with work_log(through=True) as log:
        log.write("".join(traceback.format_exception(error)))
        return _tell(f"{fault_line(error)}{log.named()}", FAILED)


def _tell(error: object, code: int) -> int:
    print(f"medmamba: {visible(str(error))}", file=sys.stderr, flush=True)
    HAS_TOLD.set()
    return code
