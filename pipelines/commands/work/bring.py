"""Runs the steps of a run, prints the results and returns the exit code."""

from __future__ import annotations

import functools
import json
import os
import traceback
from collections.abc import Callable, Sequence

from data_shards.renamed import both_keys
from data_shards.store import Store
from data_shards.store.disk import require_temporary_folder
from data_shards.store.outage import listening
from pipelines.cluster.ray_session import RaySessionError
from pipelines.commands.class_table import completed
from pipelines.commands.study.stored import with_study
from pipelines.commands.summary import print_profile, print_summary
from pipelines.commands.work.begun import read_begun
from pipelines.commands.work.connect import open_context
from pipelines.commands.work.dry_run import dry_run
from pipelines.commands.work.options import Resolved, is_profiled
from pipelines.console.arguments import UsageError
from pipelines.console.command import open_named
from pipelines.console.terminal import Terminal
from pipelines.console.work_log import own_messages, work_log
from pipelines.faults import has_more
from pipelines.flow import Step, StepState, WorkflowError, plan_steps, run_steps
from pipelines.initial_weights import InitialWeights, weights_of_run
from pipelines.interrupt import interruptible
from pipelines.override import flatten
from pipelines.recipes import Recipe
from pipelines.scratch import remove_left_behind
from pipelines.steps.context import StepContext
from pipelines.tracking.leases import driver_lease
from pipelines.tracking.promoted import describe_promotion
from pipelines.workflows import WORKFLOWS, until

DONE, REFUSED = 0, 3
Plan = Callable[[], list[Step]]


def bring(work: Resolved, workflow: str, plan: Callable[[Recipe], list[Step]]) -> int:
    """Runs the steps of `plan(recipe)`; returns 0, or 3 if the gate rejects.

    `plan` is called again under the run's lease, because another driver may have changed its result.

    Raises:
        WorkflowError: a step failed.
        RaySessionError: Ray did not start.
        ValueError: the request cannot be carried out; UsageError if it is invalid.
    """
    init = _initial_weights(work)
    values = work.values.starting_from(init.digest) if init else work.values
    store = open_named(work.store, patience_s=work.placement.patience_s)
    if work.dry_run:
        dry_run(work, workflow, plan(values), store, init)
        return DONE
    require_temporary_folder()
    before = plan_steps(plan(values), store, work.run)
    if is_profiled(work) and any((state.name, state.state) == ("train", "done") for state in before):
        Terminal().say(
            f"the training of run {work.run} is finished, so there is nothing to profile; use --profile with another "
            "--run NAME"
        )
    states = _logged(work, workflow, lambda: plan(values), store, init=init)
    _print(work, states, store)
    return _verdict(states, {state.name for state in before if state.state == "done"}, work, store)


def steps_until(workflow: str, values: Recipe, last: str) -> list[Step]:
    """The steps of the workflow up to `last`, or all if that is empty; UsageError if it has no such step."""
    steps = WORKFLOWS[workflow](values)
    try:
        return until(steps, last) if last else steps
    except ValueError as error:
        raise UsageError(f"{workflow}: {error}") from None


def _initial_weights(work: Resolved) -> InitialWeights | None:
    """The weights that the run's trainings start from, resolved before any work; None if they are random."""
    if not work.values.train.init:
        return None
    begun = read_begun(work.store, work.run)
    source = flatten(begun["recipe"]).get("train.init", "") if begun else ""
    return weights_of_run(work.values, open_named(work.store), work.run, kept_source=source)


def _logged(work: Resolved, workflow: str, plan: Plan, store: Store, *, init: InitialWeights | None) -> list[StepState]:
    """`_brought` with the output of libraries in a log file; an error names the file if it has more details."""
    with work_log(through=os.environ.get("MEDMAMBA_WORKER_LOGS") == "1") as log:
        terminal = Terminal(log=log)
        try:
            with own_messages(terminal.say), listening(terminal.outage):
                return _brought(work, workflow, plan, store, terminal=terminal, init=init)
        except (WorkflowError, RaySessionError) as error:
            if isinstance(error, RaySessionError):
                terminal.trace("".join(traceback.format_exception(error)))
            elif not any(has_more(each) for each in error.failures.values()):
                raise
            error.args = (f"{error}{log.named()}",)
            raise
        finally:
            terminal.close()


def _brought(
    work: Resolved, workflow: str, plan: Plan, store: Store, *, terminal: Terminal, init: InitialWeights | None
) -> list[StepState]:
    """Runs the steps of `plan` under the run's lease, which is not needed if all are finished."""
    terminal.say(f"run {work.run} of workflow {workflow} in {store.uri}")
    if init is not None:
        terminal.say(init.summary)
    remove_left_behind()
    if all(state.state == "done" for state in plan_steps(plan(), store, work.run)):
        return run_steps(plan(), store, work.run, open_context=_not_needed, show=terminal)
    with interruptible(), driver_lease(store, work.run, wait_s=work.wait_s, say=terminal.say) as check:
        steps = plan()  # another driver may have added a forced promotion
        if init is not None:
            init.keep(store)
        opened = functools.partial(open_context, work, workflow, steps, store, terminal=terminal, check=check)
        return run_steps(steps, store, work.run, open_context=opened, show=terminal)


def _not_needed() -> StepContext:
    raise AssertionError("a finished step lost its record")


def _print(work: Resolved, states: Sequence[StepState], store: Store) -> None:
    if not work.json:
        print_summary(states, store, work.run)
        if is_profiled(work):
            print_profile(states)
        return
    facts = {state.name: state.record.facts for state in states if state.record}
    if "shard" in facts:
        facts["shard"] = both_keys(completed(facts["shard"], store))
    if "evaluate" in facts:
        facts["evaluate"] = with_study(store, facts["evaluate"])
    print(json.dumps(facts, indent=2))


def _verdict(states: Sequence[StepState], before: set[str], work: Resolved, store: Store) -> int:
    """The exit code: 3 if the last promotion was rejected, however often it is repeated, else 0.

    If it was accepted `before` this command, prints when it was decided and where the alias is now: another version may
    have been promoted since, which is not an error.
    """
    terminal = Terminal()
    last = next((state for state in reversed(states) if state.record and "verdict" in state.record.facts), None)
    if last is None or last.record is None:
        return DONE
    if last.record.facts["verdict"] == "no":
        terminal.say(f"not promoted: {last.record.facts['reason']}")
        return REFUSED
    if last.name in before and (said := describe_promotion(last.record, store, work.run)):
        terminal.say(said)
    return DONE
