"""The gate: a registered version that is not worse than the champion replaces it, others are rejected with a reason."""

from __future__ import annotations

import hashlib
import json
import math
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from data_shards.store import Store, StoreKeyError
from data_shards.store.fenced_lease import FencedLease, LostLeaseError
from pipelines.placement import Placement
from pipelines.steps.baselines import BASELINES
from pipelines.steps.context import StepContext
from pipelines.tracking.leases import bind_model, model_lease
from pipelines.tracking.promotions import Promotion, Promotions
from pipelines.tracking.registry import AliasMovedError, Version, by_number, tag_version

DECISION = "decision.json"
BELOW_BASELINE = 0.01  # how far below the network may be: one image of a small test split makes as much
TRIES = 5


class GateConfig(BaseModel):
    """What a version must reach to be promoted (`recipe.gate`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    alias: str = Field("champion", pattern=r"^[A-Za-z0-9_-]+$", max_length=100)
    """Alias for the promoted version; `latest` and `v1`, `v2`, ... are reserved by MLflow."""
    metric: Literal["auc", "accuracy", "balanced_accuracy", "f1", "sensitivity", "specificity"] = "auc"
    """Test metric to compare with the champion's on the same manifest."""
    minimum: float = Field(0.0, ge=0, le=1)
    """Lowest acceptable value of the metric, with or without a champion."""
    beats_baseline: bool = True
    """The metric must not be more than 0.01 below that of the best baseline (chance, logistic regression on pixels, on
    width and height) on the same images. If no baseline exists, the verdict says so."""
    force: bool = False
    """Promote regardless of the comparison. Recorded in the step and on the version."""

    @field_validator("alias")
    @classmethod
    def _free(cls, alias: str) -> str:
        if alias == "latest" or re.fullmatch(r"v\d+", alias):
            raise ValueError(f"alias {alias!r} is reserved by MLflow; choose another alias")
        return alias


def run(config: GateConfig, placement: Placement | None, out: Store, context: StepContext, *, register: dict) -> dict:
    """Decides, moves the alias if the verdict is "yes", and returns the verdict ("yes" or "no") with its reason.

    A "no" is a result, not an error; the command exits with 3. Decision, move and check happen under the lease of the
    registered model; `promotions` says what that guarantees. The decision is written before the alias moves, so that an
    interrupted step carries out its decision instead of comparing the new champion with itself. If the alias points to
    another version by then, it decides again.

    Raises:
        LeaseError: another process holds the model for longer than this one waits.
        OtherStoreError: the model belongs to another store.
        ValueError: the registered version is no longer in MLflow, or is another model.
    """
    begun: list[Promotion] = []  # moves that this process began before it lost the lease
    step = out.uri.rpartition("/")[2]  # a forced promotion has its own step
    for left in reversed(range(TRIES)):
        with model_lease(context, register["model"]) as held:
            try:
                with context.tracking.running(
                    out, run=context.run, step=step, check=context.check, params=config.model_dump()
                ) as run_id:
                    held.note(mlflow_run=run_id)
                    decision = _promoted(config, out, context, held, register=register, begun=begun)
                    _tag_mlflow(context, register, decision, run_id)
            except (LostLeaseError, AliasMovedError) as error:
                if not left:
                    raise
                context.show.say(f"{error}; deciding again")
                continue
        break
    digest = hashlib.sha256(json.dumps(decision, sort_keys=True).encode()).hexdigest()
    return {"digest": digest, **decision, "model": register["model"], "mlflow_run": run_id}


def _promoted(
    config: GateConfig,
    out: Store,
    context: StepContext,
    held: FencedLease,
    *,
    register: dict,
    begun: list[Promotion],
) -> dict[str, Any]:
    """The decision, carried out under the lease `held`."""
    tracking, model = context.tracking, register["model"]
    candidate = _candidate(context, register)
    created = bind_model(tracking, model, context.store)
    assert created is not None, "a model with a version exists"
    promotions = Promotions(context, held, model=model, alias=config.alias, created=created)
    champion = promotions.champion(begun=begun)
    carried_out = promotions.carried_out(candidate.number, out.uri)
    decision = _kept(out, config, champion, candidate, carried_out) or decide(config, candidate, champion)
    out.put(DECISION, json.dumps(decision, indent=2).encode() + b"\n")
    if decision["verdict"] == "yes" and (champion is None or champion.number != candidate.number):
        bind_model(tracking, model, context.store)  # another store may have bound an older model in the meantime
        promotions.move(candidate, decision, out.uri, begun=begun)
    return decision


def _candidate(context: StepContext, register: dict) -> Version:
    tracking, model, number = context.tracking, register["model"], register["version"]
    candidate = by_number(tracking, model, number)
    if candidate is None:
        raise ValueError(
            f"version {number} of {model} is no longer in MLflow at {tracking.address}; set "
            "MLFLOW_TRACKING_URI to where it was registered, or delete the register step's folder"
        )
    if candidate.status != "READY":
        raise ValueError(
            f"version {number} of {model} in MLflow at {tracking.address} is {candidate.status}, not READY; delete the "
            "folders of the steps register and promote to register it again"
        )
    # Version numbers restart at 1 after a model is deleted and registered again under its name.
    ours = register.get("model_digest", "")  # records of earlier releases do not have it
    theirs = candidate.tags.get("medmamba.digest", ours)
    if candidate.tags.get("medmamba.run", context.run) != context.run or (ours and theirs != ours):
        raise ValueError(
            f"version {number} of {model} in MLflow at {tracking.address} is not the model that this run registered "
            f"(it has run {candidate.tags.get('medmamba.run')!r}, digest {theirs[:12]}); delete the folders of the "
            "steps register and promote to register it again"
        )
    return candidate


def _tag_mlflow(context: StepContext, register: dict, decision: dict[str, Any], run_id: str) -> None:
    """Stores the decision as tags of the version and of the step's MLflow run."""
    tracking = context.tracking
    candidate = by_number(tracking, register["model"], register["version"])
    tags = {"medmamba.verdict": f"{decision['verdict']}: {decision['reason']}"}
    if decision["verdict"] == "yes":
        previous = "" if decision["previous"] is None else str(decision["previous"])
        tags |= {"medmamba.promoted_over": previous, "medmamba.forced": str(decision["forced"]).lower()}
    if candidate is not None:
        tag_version(tracking, candidate, tags)
    tracking.set_tags(run_id, {"medmamba.verdict": decision["verdict"], "medmamba.reason": decision["reason"]})


def decide(config: GateConfig, candidate: Version, champion: Version | None) -> dict[str, Any]:
    """The verdict on `candidate` with its reason, as a JSON mapping; does not move the alias."""
    verdict, reason = _compare(config, candidate, champion)
    forced = config.force and verdict == "no"
    return {
        "verdict": "yes" if forced else verdict,
        "reason": f"forced, although {reason}" if forced else reason,
        "forced": forced,
        "alias": config.alias,
        "version": candidate.number,
        "previous": champion.number if champion and champion.number != candidate.number else None,
        "metric": config.metric,
    }


def _compare(config: GateConfig, candidate: Version, champion: Version | None) -> tuple[Literal["yes", "no"], str]:
    ours = _measured(candidate, config.metric)
    if ours is None:
        return "no", f"version {candidate.number} has no test {config.metric}"
    said = f"test {config.metric} {ours:.4f} of version {candidate.number}"
    if ours < config.minimum:
        return "no", f"{said} is below the minimum of {config.minimum:g} (gate.minimum)"
    baseline, note = _best_baseline(config, candidate)
    if baseline is not None and baseline[1] - ours > BELOW_BASELINE + 1e-9:
        name, best = baseline
        return "no", (
            f"{said} is more than {BELOW_BASELINE:g} below the baseline's {best:.4f} ({BASELINES[name]}; "
            "gate.beats_baseline)"
        )
    if champion is None:
        return "yes", f"{said}, and there is no {config.alias} yet{note}"
    if champion.number == candidate.number:
        return "yes", f"version {candidate.number} is already the {config.alias}{note}"
    theirs, manifest = _measured(champion, config.metric), candidate.tags.get("medmamba.manifest")
    if theirs is None or manifest is None or champion.tags.get("medmamba.manifest") != manifest:
        return "no", (
            f"the {config.alias}, version {champion.number}, was not evaluated on this manifest "
            f"({(manifest or 'unknown')[:12]}), so they cannot be compared; evaluate it there, or run "
            f"`medmamba promote --run {candidate.tags.get('medmamba.run', 'NAME')} --force`"
        )
    bar = f"the {config.alias}'s {theirs:.4f} (version {champion.number})"
    return ("yes", f"{said} is not below {bar}{note}") if ours >= theirs else ("no", f"{said} is below {bar}")


def _best_baseline(config: GateConfig, candidate: Version) -> tuple[tuple[str, float] | None, str]:
    """The best baseline on the same images with its metric, if any, and a note for the reason about missing ones."""
    if not config.beats_baseline:
        return None, ""
    known = {name: _measured(candidate, config.metric, of=f"baseline_{name}") for name in BASELINES}
    found = {name: value for name, value in known.items() if value is not None}
    absent = {name: candidate.tags.get(f"baseline_{name}_absent") for name in ("all", *BASELINES)}
    notes = [f"baseline {name}: {reason}" for name, reason in absent.items() if reason and name not in found]
    if not found:
        return None, f" (not compared with a baseline: {'; '.join(notes) or f'no {config.metric} of one was recorded'})"
    best = max(found, key=lambda name: found[name])
    return (best, found[best]), f" (absent {'; '.join(notes)})" if notes else ""


def _measured(version: Version, metric: str, *, of: str = "test") -> float | None:
    try:
        value = float(version.tags[f"{of}_{metric}"])
    except (KeyError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _kept(
    out: Store, config: GateConfig, champion: Version | None, candidate: Version, carried_out: dict[str, Any] | None
) -> dict[str, Any] | None:
    """The decision of an interrupted run of this step, unless the alias has moved elsewhere since.

    `carried_out` is the decision in the record of promotions; it replaces a file that is damaged.
    """
    try:
        decision = json.loads(out.get(DECISION))
    except StoreKeyError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        decision = None
    if not _is_decision(decision, config, candidate):
        decision = carried_out
    now = champion.number if champion else None
    return decision if decision and now in (decision["previous"], candidate.number) else None


def _is_decision(found: Any, config: GateConfig, candidate: Version) -> bool:
    """Whether `found` is a complete decision of this step about this version."""
    expected = {"verdict": str, "reason": str, "forced": bool, "previous": int | None}
    return (
        isinstance(found, dict)
        and all(key in found and isinstance(found[key], kind) for key, kind in expected.items())
        and found["verdict"] in ("yes", "no")
        and (found.get("alias"), found.get("metric")) == (config.alias, config.metric)
        and found.get("version") == candidate.number
    )
