"""The rules of conversion that a dataset was made by, and what the current rules would do differently.

A finished dataset stays valid when the rules change: its version is the digest of its manifest. But an unfinished one
must not mix shards of two rules, so the number of the rules is part of what identifies a shard and a fingerprint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RULES_KEY = "rules"
# Rules -> what they changed for image sets that the earlier rules converted too. Datasets of the first rules have no
# number.
CHANGES: dict[int, tuple[str, ...]] = {
    2: (
        "labels of a table that may be several in one cell, two spellings of one class or a missing value are refused "
        "until an option says what they are",
        "groups of a table that are words for a missing value (nan, N/A, Unknown) are refused",
        "class names and groups of a table that differ only in how Unicode codes an accent are one, in the form NFC",
        "classes of a table that are all numbers are ordered by value, fractions and signs too",
        "in a set of folders, folders named after splits (train, test, ...) are splits, not classes, also inside of "
        "class folders",
        "names of class folders are in Unicode's composed form (NFC) and without spaces around them, and folders that "
        "differ in nothing else are one class",
        "where validation is drawn from an official train split, duplicates of an image are kept together",
        "links in archives are followed, and links that lead to a folder that they are in are not",
        "litter of other systems is left out in any case",
        "DICOM objects that are not images (doses, segmentations, maps) are quarantined",
        "damaged images that lost pixels are quarantined, and JPEGs that only lack their end marker are kept",
    ),
    3: (
        "in a set of folders, several folders of one split that are not its numbered parts (train_224 and train_512) "
        "are refused until an option says what they are",
        "backups, temporary files and unfinished downloads (.bak, .tmp, .part, .crdownload) are left out",
        "class names that look alike (letters of other alphabets, full-width or invisible ones, dots and underscores "
        "around the name) are refused until an option says what they are",
        "DICOM files that are images by their class, but segmentations, doses or reports by their modality, are "
        "quarantined, and so are labels, overviews and thumbnails of slides",
    ),
}
RULES = max(CHANGES)
# Kept in the same file: where the splits of the dataset came from, in a clause.
SPLITS_KEY = "splits_from"


def changes_since(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """What a new conversion would do differently, a clause each, from the kept with a dataset."""
    made_by = settings.get(RULES_KEY, 1)
    made_by = made_by if isinstance(made_by, int) else 1
    return tuple(change for rules, changes in sorted(CHANGES.items()) if rules > made_by for change in changes)
