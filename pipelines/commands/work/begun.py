"""The workflow and recipe that a run was started with, in its `workflow.json`."""

from __future__ import annotations

import json
import re
from typing import Any

from data_shards.renamed import stored_values
from data_shards.store import Store
from pipelines.commands.work.options import Resolved
from pipelines.console.command import open_named
from pipelines.workflows import WORKFLOWS

WORKFLOW_FILE = "workflow.json"
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def read_begun(store_uri: str, run: str) -> dict[str, Any] | None:
    """The "workflow" and the "recipe" that a run was started with; None if the run does not exist.

    Raises ValueError if the file is damaged.
    """
    if not RUN_NAME.fullmatch(run):
        return None
    folder = open_named(store_uri).at("runs", run)
    if folder.head(WORKFLOW_FILE) is None:
        return None
    try:
        begun = json.loads(folder.get(WORKFLOW_FILE))
        problem = "" if _is_complete(begun) else "it has no workflow or no recipe"
    except (ValueError, RecursionError) as error:
        problem = str(error)
    if problem:
        raise ValueError(
            f"{folder.uri}/{WORKFLOW_FILE} is damaged ({problem}): delete it, and give the workflow and the recipe "
            "(--recipe) again"
        )
    return begun


def write_begun(store: Store, work: Resolved, workflow: str) -> None:
    """Writes the workflow and the recipe that the run is started with."""
    begun = {"workflow": workflow, "recipe": stored_values(work.values)}
    store.at("runs", work.run).put(WORKFLOW_FILE, json.dumps(begun, indent=2, sort_keys=True).encode())


def workflow_of(work: Resolved, *, otherwise: str) -> str:
    """The workflow that was asked for, else the one that the run was started with, else `otherwise`."""
    asked = getattr(work, "workflow", "")
    if asked:
        return asked
    begun = read_begun(work.store, work.run)
    return begun["workflow"] if begun else otherwise


def _is_complete(begun: Any) -> bool:
    return isinstance(begun, dict) and begun.get("workflow") in [*WORKFLOWS] and isinstance(begun.get("recipe"), dict)
