"""Assigns folders to splits, by name or by the configuration."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from data_shards.config import DataConfig
from data_shards.options import quoted
from data_shards.source.folders.tree import composed, loose
from data_shards.split import SPLITS, split_word

DROP = "drop"
_MAX_TYPED = 20  # names in a suggested command
# A number next to one of these words is not a part number: train_v1 and train_v2 are versions, train_fold1 is a fold.
_NOT_PARTS = frozenset({
    "v", "ver", "version", "r", "rev", "revision", "release", "update", "fold", "cv", "split", "run", "seed", "trial",
    "copy", "aug", "x", "px", "pix", "pixel", "pixels", "res", "resolution", "size", "scale", "level", "zoom", "mag",
    "mm", "um", "k", "bit", "bits", "fps", "shot", "percent", "pct",
})  # fmt: skip


def given(config: DataConfig) -> dict[str, str]:
    """`data.split_values` by folder name: under its exact and its loose form."""
    pairs = [value.rpartition("=") for value in config.split_values]
    return {loose(name): split for name, _, split in pairs} | {composed(name): split for name, _, split in pairs}


def said(folder: str, config: DataConfig) -> str:
    """The entry of `data.split_values` for a folder, or ""; an exact name has precedence over a similar one."""
    values = given(config)
    return values.get(composed(folder)) or values.get(loose(folder), "")


def split_of_each(
    folders: Sequence[str], config: DataConfig, *, siblings: Sequence[Sequence[str]] = ()
) -> dict[str, str]:
    """The split of each folder; "" if split folders are ignored. ValueError if one is unknown or a split is missing.

    `siblings` lists the folders by their parent folder, if they have several.
    """
    splits = {name: meaning(name, config) for name in folders}
    unknown = [name for name in folders if not splits[name]]
    ignored = config.split_folders == "ignore"
    if unknown and not (ignored and len(unknown) == len(folders)):
        raise ValueError(_unknown(folders, unknown, config))
    if ignored:
        return dict.fromkeys(folders, "")
    splits = _without_doubt(splits, config)
    for split in SPLITS:
        _check_one_of_each([name for name in folders if splits[name] == split], split, config)
        for together in siblings or [folders]:
            _check_parts([name for name in together if splits[name] == split], split, config)
    there = [split for split in SPLITS if split in splits.values()]
    missing = [split for split in ("train", "test") if split not in there]
    if len(there) > 1 and missing:
        instead = next(name for name in folders if splits[name] == "val")
        raise ValueError(
            f"{config.source} has the split folders {listed(folders)}, but none for {missing[0]}; add it, use another "
            f"one with --data.split-values {typed([f'{instead}={missing[0]}'])} (missing validation is drawn from "
            "train), or have all splits drawn with --data.split-folders ignore"
        )
    return splits


def _unknown(folders: Sequence[str], unknown: Sequence[str], config: DataConfig) -> str:
    if len(unknown) == len(folders):
        return (
            f"the names of the folders {listed(folders)} of {config.source} do not show which splits they are; "
            f"{say_which(folders)}"
        )
    known = [name for name in folders if name not in unknown]
    return (
        f"{config.source} has {listed(unknown)} next to the split folders {listed(known)}; exclude folders that are "
        f"not splits with --data.split-values {typed(f'{name}=drop' for name in unknown)}, or set their split "
        f"(=train, =val, =test); if all of them are classes, name them with --data.classes {typed(folders)}"
    )


def _without_doubt(splits: dict[str, str], config: DataConfig) -> dict[str, str]:
    """Resolves `dev` and `eval` to the split that the other folders leave free. ValueError if ambiguous."""
    settled = dict(splits)
    for word, may_be in (("dev", ("val",)), ("eval", ("val", "test"))):
        names = [name for name, split in settled.items() if split == word]
        there = set(settled.values())
        free = [split for split in may_be if split not in there]
        if names and ("train" not in there or len(free) != 1):
            raise ValueError(
                f"folder {names[0]!r} of {config.source} could be validation, test or training images; set its split "
                f"with --data.split-values {typed([f'{names[0]}=val'])}, or =test, =train"
            )
        settled |= {name: free[0] for name in names}  # noqa: C420  # without names, free may be empty too
    return settled


def _check_one_of_each(names: Sequence[str], split: str, config: DataConfig) -> None:
    """ValueError if folders of one split have names that differ in more than a number: are all of them meant?"""
    by_name = [name for name in names if not said(name, config)]
    plainest = min((split_word(name)[1] for name in by_name), key=len, default=())
    others = [name for name in by_name if split_word(name)[1] != plainest]
    if others:
        raise ValueError(
            f"the folders {listed(names)} of {config.source} all look like the {split} split; set the meaning of "
            f"{listed(others)} with --data.split-values {typed(f'{name}={split}' for name in others)} (to read all of "
            "them), or =drop (to exclude them)"
        )


def _check_parts(names: Sequence[str], split: str, config: DataConfig) -> None:
    """ValueError if sibling folders of one split are not its numbered parts.

    They may be the same images in two resolutions or versions, which would count twice.
    """
    by_name = sorted((name for name in names if not said(name, config)), key=lambda name: (len(name), name))
    if len(by_name) < 2 or _are_parts(by_name):
        return
    kept, *others = by_name
    # Similar names are distinguished only if each of them is given exactly.
    same = [kept] if loose(kept) in map(loose, others) else []
    pairs = [*(f"{name}={split}" for name in same), *(f"{name}=drop" for name in others)]
    raise ValueError(
        f"the folders {listed(by_name)} of {config.source} all look like the {split} split, and may be the same images "
        f"in two versions; exclude copies with --data.split-values {typed(pairs)}, or read all of them as parts of one "
        f"split with ={split} instead of =drop"
    )


def _are_parts(names: Sequence[str]) -> bool:
    """Whether names differ only in one number that counts up from 0 or 1, such as train_1 and train_2."""
    pieces = [re.split(r"(\d+)", loose(name)) for name in names]
    if len({len(each) for each in pieces}) > 1:
        return False
    differing = [column for column in zip(*pieces, strict=True) if len(set(column)) > 1]
    if len(differing) != 1 or not all(number.isdecimal() for number in differing[0]):
        return False
    numbers = sorted(map(int, differing[0]))
    words = set(re.findall(r"[^\W\d_]+", loose(names[0])))
    return (
        numbers[0] in (0, 1) and numbers == list(range(numbers[0], numbers[0] + len(names))) and not words & _NOT_PARTS
    )


def meaning(folder: str, config: DataConfig) -> str:
    """The meaning of a folder: a split, "drop", "dev", "eval", or "" if unknown."""
    return said(folder, config) or split_word(folder)[0]


def origin(splits: Mapping[str, str], where: str = "") -> str:
    """Origin of the splits, such as `train and test from the folders Training and Testing`."""
    there = [split for split in SPLITS if split in splits.values()]
    names = [name for split in there for name in splits if splits[name] == split]
    drawn = "" if "val" in there else "; val drawn from train"
    return f"{listed(there)} from the folders {listed(names)}{where}{drawn}"


def say_which(folders: Sequence[str]) -> str:
    """The options that set the split of each folder, with dots where its name does not show it."""
    said = {name: split_word(name)[0] for name in folders}
    pairs = [f"{name}={said[name] if said[name] in SPLITS else '...'}" for name in folders]
    return (
        f"set them with --data.split-values {typed(pairs)} (train, val or test instead of the dots; FOLDER=drop "
        "excludes one), or combine all with --data.split-folders ignore"
    )


def listed(names: Iterable[str], most: int = 8) -> str:
    """Names as text: a, b and c."""
    shown = list(names)
    if len(shown) > most:
        shown = [*shown[:most], f"{len(shown) - most} more"]
    return f"{', '.join(shown[:-1])} and {shown[-1]}" if len(shown) > 1 else "".join(shown)


def typed(names: Iterable[str]) -> str:
    """Names quoted for a shell."""
    words = [quoted(name) for name in names]
    return " ".join([*words[:_MAX_TYPED], *["..."][: len(words) > _MAX_TYPED]])
