"""What the records say in words: data, training, limits, and the items of reporting guidelines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.evaluation.parts import Study
from pipelines.report.records import RunRecords
from pipelines.report.words import NOT_STATED, figure_name, number, plain, value_text, with_bounds
from pipelines.wording import counted, duration

INTENDED_USE = (
    "Research on the classification of images like those of the dataset into its classes. The records state no other "
    "use. It is not a medical device and was not validated for decisions about patients."
)
Facts = list[tuple[str, str]]


def verdict(run: RunRecords) -> str:
    """One sentence on the result, and what it is compared with."""
    found = run.study
    auc = found.macro["auc"]
    text = f"On {found.num_samples:,} {found.split} images the macro AUC is {with_bounds(auc)}"
    baselines = run.facts("evaluate").get("baselines", {})
    others = {name: each["auc"] for name, each in baselines.items() if each.get("auc") is not None}
    if others and auc.value is not None:
        best = max(others, key=lambda name: others[name])
        text += f"; the best baseline ({plain(best)}) has {number(others[best])}"
    promoted = run.facts("promote")
    if promoted:
        stated = "promoted" if promoted.get("verdict") == "yes" else "not promoted"
        text += f". The model was {stated}: {plain(promoted.get('reason', ''))}"
    return f"{text.rstrip('.')}."


def weakest(found: Study) -> str:
    """One sentence on the class that is found least; empty where no class has a sensitivity."""
    known = [(each.figures["sensitivity"], each) for each in found.by_class if each.figures["sensitivity"].value]
    zero = [each for each in found.by_class if each.figures["sensitivity"].value == 0]
    if zero:
        return f"No image of {', '.join(plain(each.name) for each in zero)} is found (sensitivity 0)."
    if not known:
        return ""
    lowest, each = min(known, key=lambda pair: pair[0].value or 0.0)
    return f"The class found least is {plain(each.name)}: sensitivity {with_bounds(lowest)} of {each.support:,} images."


def data(run: RunRecords) -> Facts:
    """Where the images come from and how they were divided."""
    facts, card, manifest = run.facts("shard"), run.dataset_card, run.manifest
    config: Mapping[str, Any] = run.configs.get("shard", {})
    source = config.get("source") or (card.source if card else "") or NOT_STATED
    layout = config.get("layout", NOT_STATED)
    licence = (manifest.licence if manifest else "") or (card.licence if card else "") or NOT_STATED
    found = [
        ("Dataset", plain(facts.get("dataset", NOT_STATED)) + (f": {card.title}" if card else "")),
        ("Modality", card.modality if card else NOT_STATED),
        ("Source", plain(source)),
        ("Layout", plain(card.layout if card and layout == "catalog" else layout)),
        ("Licence", plain(licence)),
        ("Citation", plain(card.citation) if card and card.citation else NOT_STATED),
        ("Task", run.study.task),
        ("Splits", splits(run)),
        ("Quarantined", f"{counted(facts.get('quarantine', 0), 'image')} could not be decoded"),
        ("Manifest", str(facts.get("digest", NOT_STATED))),
    ]
    return [*found, ("Notes", plain(card.notes))] if card and card.notes else found


def splits(run: RunRecords) -> str:
    """How the images were divided."""
    if run.dataset_card:
        return f"{run.dataset_card.split_policy} (policy of the catalog)"
    config = run.configs.get("shard", {})
    if config.get("split_column") or run.facts("shard").get("splits_from"):
        return "as the source says"
    grouped = run.study.num_groups != run.study.num_samples
    return "drawn by group, no group in two splits" if grouped else "drawn by image, groups are not known"


def duplicates(run: RunRecords) -> Facts:
    """What was found of images that occur more than once."""
    report = run.duplicates
    if report is None:
        return [("Duplicates", NOT_STATED)]
    counts = [(plain(what).capitalize(), f"{count:,}") for what, count in report.counts.items()]
    return [
        ("Compared", f"{report.images:,} images; near: at most {report.near} of 168 bits of a fingerprint differ"),
        ("Policy across splits", report.across),
        *counts,
        ("Left out", f"{len(report.dropped):,}"),
    ]


def training(run: RunRecords) -> Facts:
    """What was trained, how and at what cost."""
    facts = run.facts("train")
    usage: Mapping[str, Any] = facts.get("usage", {})
    placement = run.records["train"].placement
    gpus = ", ".join(plain(name) for name in usage.get("gpus", {}))
    hardware = gpus or ("CPU" if placement.get("device") == "cpu" else placement.get("device", NOT_STATED))
    workers = f", {counted(placement['workers'], 'worker')}" if placement.get("workers") else ""
    nodes = f" on {counted(placement['nodes'], 'machine')}" if placement.get("nodes") else ""
    cost = usage.get("price_usd")
    energy = usage.get("energy_kwh")
    initial = facts.get("init", {}).get("uri")
    return [
        ("Hardware", f"{hardware}{workers}{nodes}"),
        ("Time", _time(usage.get("total_s") or run.records["train"].seconds)),
        ("GPU-hours", f"{usage['gpu_hours']:.2f}" if usage.get("gpu_hours") else "none recorded"),
        ("Energy", f"{energy:.2f} kWh" if energy else NOT_STATED),
        ("Cost", f"about ${cost:.2f}" if cost is not None else NOT_STATED),
        ("Epochs", f"{facts.get('epochs', '–')}, the weights are of epoch {facts.get('best_epoch', '–')}"),
        ("Initial weights", plain(initial) if initial else "random"),
        ("Model digest", str(facts.get("digest", NOT_STATED))),
    ]


def hyperparameters(run: RunRecords) -> Facts:
    """The resolved configuration of the training, dotted key -> value."""
    return [(key, value_text(value)) for key, value in sorted(_dotted(run.facts("train").get("resolved", {})).items())]


def versions(run: RunRecords) -> Facts:
    """The code and libraries that evaluated the model."""
    record = run.records["evaluate"]
    return [
        ("Commit of the training", run.records["train"].git_commit),
        ("Commit of the evaluation", record.git_commit),
        ("Evaluated", f"{record.finished[:16].replace('T', ' ')} UTC"),
        *((name, version) for name, version in sorted(record.packages.items())),
    ]


def limits(run: RunRecords) -> list[str]:
    """What the evaluation cannot show."""
    found = run.study
    stated = [found.sample_size, "The test images are of the same dataset as the training images: no external data."]
    empty = [plain(each.name) for each in found.by_class if each.support == 0]
    if empty:
        stated.append(f"The test split has no image of {', '.join(empty)}.")
    if found.num_groups == found.num_samples:
        stated.append("Patients are not known: each image counts as a patient, so intervals may be too narrow.")
    unranked = sum(each.unranked is not None for each in found.subgroups)
    if unranked:
        stated.append(f"{counted(unranked, 'subgroup')} too small to be ranked.")
    if not found.subgroups:
        stated.append("No column divides the images into subgroups: differences between subgroups are unknown.")
    across = sum(n for what, n in run.duplicates.counts.items() if "across" in what) if run.duplicates else 0
    if across:
        stated.append(f"{counted(across, 'duplicate')} across splits was found before planning; see the duplicates.")
    return [*stated, *(f"{plain(part).capitalize()}: {plain(reason)}." for part, reason in found.absent.items())]


def answers(run: RunRecords) -> dict[str, str]:
    """Items of `checklist` that the records can fill."""
    found, card = run.study, run.dataset_card
    facts, manifest = run.facts("shard"), run.manifest
    shown = ", ".join(f"{figure_name(name)} {with_bounds(found.macro[name])}" for name in ("auc", "sensitivity"))
    counts = {name: split.samples for name, split in manifest.splits.items()} if manifest else facts.get("samples", {})
    grouped = found.num_groups != found.num_samples
    return {
        "title": f"{plain(run.run)}: {found.task} classification into {', '.join(map(plain, found.classes))}",
        "use": INTENDED_USE,
        "sources": dict(data(run))["Source"] if card or run.configs.get("shard", {}).get("source") else "",
        "preparation": f"decoded, stored losslessly, resized; pixels per side: {_image_size(run)}",
        "subsets": splits(run),
        "outcome": f"the labels of the dataset: {', '.join(map(plain, found.classes))}",
        "predictors": f"{card.modality if card else 'the'} image's pixels alone",
        "size": found.sample_size,
        "missing": f"{counted(facts.get('quarantine', 0), 'image')} that cannot be decoded left out",
        "partitions": splits(run) + "; " + ", ".join(f"{name} {n:,}" for name, n in counts.items()),
        "disjoint": "groups (patients)" if grouped else "images; patients are not known",
        "network": _network(run),
        "software": ", ".join(f"{k} {run.records['train'].packages.get(k, '?')}" for k in ("python", "torch")),
        "initial": dict(training(run))["Initial weights"],
        "training": f"{facts_text(run)}",
        "selection": f"best of {run.facts('train').get('epochs', '–')} epochs on validation",
        "ensemble": "none",
        "measures": ", ".join(map(figure_name, found.macro)),
        "uncertainty": "95 % intervals, clustered by group; method by figure (see evaluation.json)",
        "external": "none",
        "fairness": f"figures of {counted(len(found.subgroups), 'subgroup')}" if found.subgroups else "",
        "output": f"probability of each class; {counted(len(found.operating_points), 'operating point')}",
        "data_sharing": f"licence: {dict(data(run))['Licence']}",
        "code_sharing": f"commit {run.records['train'].git_commit}",
        "specification": f"weights and configuration, digest {found.model}",
        "performance": shown,
        "failures": weakest(found),
        "limitations": " ".join(limits(run)),
    }


def facts_text(run: RunRecords) -> str:
    """The hyperparameters that matter most, in one line."""
    chosen = dict(hyperparameters(run))
    wanted = ("train.batch_size", "train.optim.lr", "train.epochs", "train.image_size", "train.seed")
    return ", ".join(f"{key.removeprefix('train.')} {chosen[key]}" for key in wanted if key in chosen)


def _time(seconds: float) -> str:
    return duration(seconds) if seconds >= 120 else f"{seconds:.0f} s"


def _network(run: RunRecords) -> str:
    config = (run.model_card or {}).get("config") or run.facts("train").get("resolved", {}).get("model", {})
    return ", ".join(f"{key} {value_text(config[key])}" for key in ("kind", "variant") if key in config)


def _image_size(run: RunRecords) -> str:
    return value_text((run.model_card or {}).get("card", {}).get("image_size", NOT_STATED))


def _dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
