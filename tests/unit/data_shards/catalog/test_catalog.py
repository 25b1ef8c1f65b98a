"""The catalogue: seventeen cards, each whole, each with the counts that are published."""

import hashlib
import re
from pathlib import PurePosixPath

import numpy as np
import pytest

from data_shards import catalog
from data_shards.config import DataConfig
from data_shards.source import phantoms

PUBLISHED = {  # name: (classes, images)
    "pad-ufes-20": (6, 2298),
    "cervical-us": (4, 3392),
    "fetal-planes-db": (6, 12400),
    "cpn-x-ray": (3, 5228),
    "kvasir": (8, 4000),
    "otoscopy2024": (9, 22581),
    "pathmnist": (9, 107180),
    "dermamnist": (7, 10015),
    "octmnist": (4, 109309),
    "pneumoniamnist": (2, 5856),
    "retinamnist": (5, 1600),
    "breastmnist": (2, 780),
    "bloodmnist": (8, 17092),
    "organamnist": (11, 58830),
    "organcmnist": (11, 23583),
    "organsmnist": (11, 25211),
    "phantoms": (3, 0),
}


def test_the_catalog_holds_sixteen_datasets_and_the_phantoms():
    assert catalog.names() == sorted(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_card_is_whole(name):
    card = catalog.card(name)
    assert (len(card.classes), card.num_images) == PUBLISHED[name]
    assert len(set(card.classes)) == len(card.classes)
    assert card.licence
    assert card.source
    assert (card.layout == "npz") == (card.split_policy == "official")
    assert (card.layout == "table") == bool(card.label_column)
    assert (card.split_policy == "official test") == bool(card.split_column)
    assert DataConfig(split_values=card.split_values).split_values == card.split_values
    assert card.citation or name == "phantoms"


@pytest.mark.parametrize("name", PUBLISHED)
def test_card_files_have_plain_names_https_urls_and_checksums(name):
    card = catalog.card(name)
    assert bool(card.files) == (name not in ("phantoms", "cervical-us", "otoscopy2024"))
    assert set(card.fetch) <= set(card.files)
    for file, published in card.files.items():
        assert file == str(PurePosixPath(file))
        assert not PurePosixPath(file).is_absolute()
        assert ".." not in PurePosixPath(file).parts
        assert re.fullmatch(r"https://[a-z0-9.-]+/[^\s#]+", published.url)
        assert re.fullmatch("([0-9a-f]{32})?", published.md5)
        assert re.fullmatch("([0-9a-f]{64})?", published.sha256)
        assert published.size_bytes >= 0


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.endswith("mnist")])
def test_each_medmnist_set_has_four_sizes_with_md5(name):
    card = catalog.card(name)
    assert [*card.files] == [f"{name}{size}.npz" for size in ("", "_64", "_128", "_224")]
    assert all(file.md5 for file in card.files.values())
    assert card.fetch == (f"{name}.npz",)


def test_retinamnist_is_ordinal_and_no_other():
    assert [n for n in catalog.names() if catalog.card(n).task != "multiclass"] == ["retinamnist"]


def test_the_phantoms_have_the_classes_of_their_card():
    assert catalog.card("phantoms").classes == phantoms.CLASSES


@pytest.mark.parametrize("name", ["breastmnist", "pneumoniamnist"])
def test_real_files_have_the_checksum_and_counts_of_their_card(shared_dir, name):
    path = shared_dir / "data" / f"{name}.npz"
    card = catalog.card(name)
    assert hashlib.md5(path.read_bytes()).hexdigest() == card.files[path.name].md5
    assert path.stat().st_size == card.files[path.name].size_bytes
    with np.load(path) as arrays:
        assert sum(len(arrays[f"{split}_labels"]) for split in ("train", "val", "test")) == card.num_images


def test_an_unknown_dataset_lists_the_known_and_the_nearest():
    with pytest.raises(ValueError, match=r"'brestmnist' is not in the catalog \(did you mean 'breastmnist'\?\)"):
        catalog.card("brestmnist")
