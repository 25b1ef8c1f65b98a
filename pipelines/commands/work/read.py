"""Command line -> options, recipe and placement, all of them checked, for commands that work on a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from data_shards.catalog import card
from pipelines.commands.work.begun import RUN_NAME, read_begun
from pipelines.commands.work.options import Resolved, TrainWork
from pipelines.console.arguments import UsageError, of_kind, parse, peek, unchecked
from pipelines.console.command import Command, default_store
from pipelines.costs import read_prices
from pipelines.override import difference, override, validated
from pipelines.placement import PlacementConfig
from pipelines.recipes import RECIPES, Recipe, recipe


def read_work(command: Command, argv: Sequence[str]) -> Any:
    """Parses `argv` over the defaults of the recipe or run that it names; fills in run and store."""
    store = peek(argv, "store") or default_store()
    base = of_kind(_base(command.name, argv, store), argv)
    shown, where, kind = unchecked(base), unchecked(PlacementConfig()), command.arguments
    typed = kind[type(shown), type(where)]
    work = parse(typed, command.name, argv, default=kind(shown, where), description=command.description)
    # Recipes change only through validated dotted keys.
    changes = {key: new for key, (_, new) in difference(base.model_dump(), asdict(work.values)).items()}
    values = override(base, changes)
    placement = validated(PlacementConfig, asdict(work.placement), prefix="placement")
    found = replace(work, values=values, placement=placement, run=work.run or work.recipe, store=work.store or store)
    _check(found)
    return found


def _base(name: str, argv: Sequence[str], store: str) -> Recipe:
    """The recipe that `argv` starts from: the one it names, or the one its run was started with."""
    named, run = peek(argv, "recipe"), peek(argv, "run")
    if named:
        try:
            return recipe(named)
        except ValueError as error:
            raise UsageError(str(error)) from None
    if run and (begun := read_begun(store, run)):
        return validated(Recipe, begun["recipe"])
    if {"-h", "--help"} & set(argv):
        return Recipe()
    there = f"run {run!r} not found in {store}; " if run else ""
    raise UsageError(f"{name}: {there}give a recipe (--recipe {'|'.join(RECIPES)}) or an existing run (--run NAME)")


def _check(work: Resolved) -> None:
    """Raises UsageError if an option has an invalid value."""
    _check_scan(work.placement.scan)
    try:
        read_prices(work.placement.prices)  # reported now; the training reads them again at its end
        if work.values.data.layout == "catalog":
            card(work.values.data.dataset)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if not RUN_NAME.fullmatch(work.run):
        raise UsageError(
            f"--run {work.run!r}: not a valid name; use at most 100 letters, digits, '.', '_' and '-', starting with "
            f"a letter or digit"
        )
    if not 0 <= work.wait_s < math.inf:
        raise UsageError(f"--wait-s {work.wait_s:g}: give seconds, 0 or more")
    if isinstance(work, TrainWork) and not 0 <= work.max_minutes < math.inf:
        raise UsageError(f"--max-minutes {work.max_minutes:g}: give minutes above 0, or 0 to train to the end")


def _check_scan(name: str) -> None:
    if name != "auto":
        from medmamba.ops.ss2d_scan import backends  # imports torch, which most commands do not need

        if name not in backends():
            raise UsageError(f"--placement.scan {name}: unknown backend; available: auto, {', '.join(backends())}")
