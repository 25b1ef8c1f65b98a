"""Which split each of several folders is, by its name or by the configuration."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from data_shards.config import DataConfig
from data_shards.options import quoted
from data_shards.source.folders.tree import composed, loose
from data_shards.split import SPLITS, split_word

DROP = "drop"
_MOST = 20  # names in a remedy; more are for a table
# A number beside one of these words does not count parts: train_v1 and train_v2 are versions, train_fold1 a draw.
_NOT_PARTS = frozenset({
    "v", "ver", "version", "r", "rev", "revision", "release", "update", "fold", "cv", "split", "run", "seed", "trial",
    "copy", "aug", "x", "px", "pix", "pixel", "pixels", "res", "resolution", "size", "scale", "level", "zoom", "mag",
    "mm", "um", "k", "bit", "bits", "fps", "shot", "percent", "pct",
})  # fmt: skip


def given(config: DataConfig) -> dict[str, str]:
    """What `data.split_values` says, by the name of the folder: as it is written, and loosely."""
    pairs = [value.rpartition("=") for value in config.split_values]
    return {loose(name): split for name, _, split in pairs} | {composed(name): split for name, _, split in pairs}


def said(folder: str, config: DataConfig) -> str:
    """What `data.split_values` says of a folder, "" where nothing; its exact name goes before a similar one."""
    values = given(config)
    return values.get(composed(folder)) or values.get(loose(folder), "")


def split_of_each(
    folders: Sequence[str], config: DataConfig, *, beside: Sequence[Sequence[str]] = ()
) -> dict[str, str]:
    """The split of each folder, "" where it does not matter. ValueError where it is not known, or one is missing.

    `beside` are the folders that are in one folder together, where not all of them are.
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
        for together in beside or [folders]:
            _check_parts([name for name in together if splits[name] == split], split, config)
    there = [split for split in SPLITS if split in splits.values()]
    missing = [split for split in ("train", "test") if split not in there]
    if len(there) > 1 and missing:
        instead = next(name for name in folders if splits[name] == "val")
        raise ValueError(
            f"{config.source} has the split folders {listed(folders)}, and none for {missing[0]}: add it, say that "
            f"another serves as it with --data.split-values {typed([f'{instead}={missing[0]}'])} (where validation is "
            "missing it is drawn from train), or have all splits drawn with --data.split-folders ignore"
        )
    return splits


def _unknown(folders: Sequence[str], unknown: Sequence[str], config: DataConfig) -> str:
    if len(unknown) == len(folders):
        return (
            f"which splits the folders {listed(folders)} of {config.source} are is not clear from their names: "
            f"{say_which(folders)}"
        )
    known = [name for name in folders if name not in unknown]
    return (
        f"{config.source} has {listed(unknown)} beside the split folders {listed(known)}: leave out what is not a "
        f"split with --data.split-values {typed(f'{name}=drop' for name in unknown)}, or say which split it is "
        f"(=train, =val, =test); if all of them are classes, name them with --data.classes {typed(folders)}"
    )


def _without_doubt(splits: dict[str, str], config: DataConfig) -> dict[str, str]:
    """`dev` and `eval` as what the other folders leave for them to be. ValueError where they could be two things."""
    settled = dict(splits)
    for word, may_be in (("dev", ("val",)), ("eval", ("val", "test"))):
        names = [name for name, split in settled.items() if split == word]
        there = set(settled.values())
        free = [split for split in may_be if split not in there]
        if names and ("train" not in there or len(free) != 1):
            raise ValueError(
                f"folder {names[0]!r} of {config.source} could be validation, test or training images: say which with "
                f"--data.split-values {typed([f'{names[0]}=val'])}, or =test, =train"
            )
        settled |= {name: free[0] for name in names}
    return settled


def _check_one_of_each(names: Sequence[str], split: str, config: DataConfig) -> None:
    """ValueError where folders of one split have names that differ in more than a number: are both of them meant?"""
    by_name = [name for name in names if not said(name, config)]
    plainest = min((split_word(name)[1] for name in by_name), key=len, default=())
    others = [name for name in by_name if split_word(name)[1] != plainest]
    if others:
        raise ValueError(
            f"the folders {listed(names)} of {config.source} all look like the {split} split: say what "
            f"{listed(others)} is with --data.split-values {typed(f'{name}={split}' for name in others)} (all of them "
            "are read), or =drop (left out)"
        )


def _check_parts(names: Sequence[str], split: str, config: DataConfig) -> None:
    """ValueError where folders of one split beside each other are not its numbered parts.

    They may be the same images in two resolutions or versions, which would count twice.
    """
    by_name = sorted((name for name in names if not said(name, config)), key=lambda name: (len(name), name))
    if len(by_name) < 2 or _are_parts(by_name):
        return
    kept, *others = by_name
    # Names that match loosely are separate only where each of them is named.
    same = [kept] if loose(kept) in map(loose, others) else []
    pairs = [*(f"{name}={split}" for name in same), *(f"{name}=drop" for name in others)]
    raise ValueError(
        f"the folders {listed(by_name)} of {config.source} all look like the {split} split, and may be the same images "
        f"in two versions: leave out what is a copy with --data.split-values {typed(pairs)}, or read all of them as "
        f"parts of one split with ={split} instead of =drop"
    )


def _are_parts(names: Sequence[str]) -> bool:
    """Whether names differ in nothing but one number that counts them from 0 or 1, as train_1 and train_2 do."""
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
    """What a folder is: a split, "drop", "dev", "eval", or "" where that is not known."""
    return said(folder, config) or split_word(folder)[0]


def origin(splits: Mapping[str, str], where: str = "") -> str:
    """Where the splits come from, as `train and test from the folders Training and Testing`."""
    there = [split for split in SPLITS if split in splits.values()]
    names = [name for split in there for name in splits if splits[name] == split]
    drawn = "" if "val" in there else "; val drawn from train"
    return f"{listed(there)} from the folders {listed(names)}{where}{drawn}"


def say_which(folders: Sequence[str]) -> str:
    """The options that say which split each folder is. A split that its name does not say is left open."""
    said = {name: split_word(name)[0] for name in folders}
    pairs = [f"{name}={said[name] if said[name] in SPLITS else '...'}" for name in folders]
    return (
        f"say which with --data.split-values {typed(pairs)} (train, val or test in place of the dots; FOLDER=drop "
        "leaves one out), or take all together with --data.split-folders ignore"
    )


def listed(names: Iterable[str], most: int = 8) -> str:
    """Names as one says them: a, b and c."""
    shown = list(names)
    if len(shown) > most:
        shown = [*shown[:most], f"{len(shown) - most} more"]
    return f"{', '.join(shown[:-1])} and {shown[-1]}" if len(shown) > 1 else "".join(shown)


def typed(names: Iterable[str]) -> str:
    """Names as one types them in a shell."""
    words = [quoted(name) for name in names]
    return " ".join([*words[:_MOST], *["..."][: len(words) > _MOST]])
