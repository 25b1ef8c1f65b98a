"""Image set -> shards, index and manifest, one Ray task per shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from data_shards.config import DataConfig
from data_shards.convert import convert
from data_shards.manifest import MANIFEST
from data_shards.renamed import both_keys, old_words
from data_shards.source import check_folders, check_source
from data_shards.split import SPLITS
from data_shards.store import Store
from pipelines.faults import unwrapped
from pipelines.placement import Placement
from pipelines.steps.context import StepContext
from pipelines.wording import counted


def run(config: DataConfig, placement: Placement, out: Store, context: StepContext) -> dict:
    """Writes `datasets/<dataset>/<name>/` in the store; returns the facts of `convert`, with the folder as "data"."""
    data = f"datasets/{config.dataset}/{config.name}"

    def progress(done: int, total: int, unit: str) -> None:
        name = "shard" if unit == "shards" else "compare"
        context.show.progress(name, {"done": done, "total": total, "unit": unit})

    # Users of MLflow must not learn the salt.
    params = old_words(config.model_dump(exclude={"salt"}), config.PART)
    with context.tracking.running(out, run=context.run, step="shard", check=context.check, params=params) as run_id:
        _check_reachable(config, placement)
        facts = convert(config, context.store.at(data), run_tasks=ray_map, progress=progress)
        context.show.say(_classes_line(facts))
        context.tracking.log_metrics(run_id, logged(facts))
    return {**facts, "data": data, "max_side": config.max_side, "mlflow_run": run_id}


def check_images(config: DataConfig, store: Store) -> None:
    """Raises ValueError before any work if the image set is missing or its folders do not form classes.

    A finished dataset no longer needs its images.
    """
    if store.at("datasets", config.dataset, config.name).head(MANIFEST) is not None:
        return
    check_source(config)
    check_folders(config)


def logged(facts: dict) -> dict[str, int]:
    """The facts of a conversion that MLflow gets; `num_train` and so on count each image once."""
    counts = {f"num_{split}": num for split, num in facts["samples"].items()}
    duplicates = {
        f"{word} {what}": count for word in ("copies", "duplicates") for what, count in facts["leaks"].items()
    }
    sizes = {name: facts[name] for name in ("num_images", "num_shards", "quarantine", "bytes")}
    return both_keys(sizes) | counts | duplicates


def _classes_line(facts: dict) -> str:
    """One line with the counts of the classes, because a command that fails later prints no table."""
    counts = facts["counts"]
    classes = [f"{name} {'/'.join(str(counts[split][name]) for split in SPLITS)}" for name in counts["train"]]
    return f"{counted(len(classes), 'class', 'classes')} ({'/'.join(SPLITS)}): {', '.join(classes)}"


def ray_map(task: Callable, items: list) -> Iterator:
    """Runs `task(item)` for each item as Ray tasks of one CPU; yields the results as they come.

    The first task that fails ends the map with its exception; tasks that have not started are cancelled.
    """
    import ray

    # Ray retries a task whose node is lost, but not one that raised.
    remote = ray.remote(num_cpus=1, max_retries=3)(task)
    pending = [remote.remote(item) for item in items]
    try:
        while pending:
            (finished,), pending = ray.wait(pending, num_returns=1)
            with unwrapped():
                found = ray.get(finished)
            yield found
    finally:
        for reference in pending:
            ray.cancel(reference)


def _check_reachable(config: DataConfig, placement: Placement) -> None:
    if placement.nodes > 1 and config.source and not config.source.startswith("s3://"):
        raise ValueError(
            f"data.source {config.source} is a local path, which the {placement.nodes} nodes of this Ray do not "
            f"share; copy the image set to s3:// and give that address"
        )
