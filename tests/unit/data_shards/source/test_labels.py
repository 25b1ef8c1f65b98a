"""Classes left out and renamed, groups by a pattern, and rows that are dropped: in every layout."""

import numpy as np
import pytest
from pydantic import ValidationError
from table_sets import labelled, names, opened, table_of, write

from data_shards.config import DataConfig
from data_shards.plan import config_digest
from data_shards.source import check_source
from data_shards.source.labels import check_settings


def folders(folder, found, **fields):
    write(folder, {f"{name}/p{i}_{name}.png": "" for name in found for i in range(2)})
    return opened(folder, layout="folders", **fields)


def npz(folder, num_classes, **fields):
    arrays = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = np.zeros((2 * num_classes, 8, 8), np.uint8)
        arrays[f"{split}_labels"] = np.repeat(np.arange(num_classes), 2)
    np.savez(folder / "a.npz", **arrays)
    return opened(folder / "a.npz", layout="npz", **fields)


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def sets(tmp_path, **fields):
    """The classes a, b, c in each layout."""
    for layout in ("table", "folders", "npz"):
        (tmp_path / layout).mkdir()
    yield labelled(tmp_path / "csv", list("aabbcc"), **fields)
    yield folders(tmp_path / "folders", "abc", **fields)
    yield npz(tmp_path / "npz", 3, **{"classes": tuple("abc"), **fields})


def test_a_class_is_left_out_in_every_layout_and_counted(tmp_path):
    for images in sets(tmp_path, drop_classes=("b",)):
        assert images.classes == ("a", "c")
        assert set(names(images)) == {("a",), ("c",)}
        assert "b (" in images.notes[-1]


def test_several_classes_become_one_in_the_place_of_the_first(tmp_path):
    for images in sets(tmp_path, class_map=("c=new", "b=new")):
        assert images.classes == ("a", "new")
        assert names(images).count(("new",)) == 2 * names(images).count(("a",))
        assert "-> new" in images.notes[-1]


@pytest.mark.parametrize(("pair", "classes"), [("c=a", ("a", "b")), ("a=c", ("b", "c"))])
def test_a_class_joins_one_that_is_there_in_its_place(tmp_path, pair, classes):
    for images in sets(tmp_path, class_map=(pair,)):
        assert images.classes == classes


@pytest.mark.parametrize("option", [{"drop_classes": ("x",)}, {"class_map": ("x=a",)}])
@pytest.mark.parametrize("layout", [0, 1, 2], ids=["csv", "folders", "npz"])
def test_an_unknown_class_is_an_error_that_lists_what_there_is(tmp_path, option, layout):
    make = (
        lambda: labelled(tmp_path, list("abc"), **option),
        lambda: folders(tmp_path, "abc", **option),
        lambda: npz(tmp_path, 3, classes=tuple("abc"), **option),
    )
    with pytest.raises(ValueError, match=r"names the class 'x', but .* has a, b, c"):
        make[layout]()


def test_named_classes_order_what_renaming_gives(tmp_path):
    named = {"classes": ("new", "a"), "class_map": ("b=new", "c=new")}
    assert labelled(tmp_path, list("abc"), **named).classes == ("new", "a")
    assert set(names(folders(tmp_path / "f", "abc", **named))) == {("new",), ("a",)}
    with pytest.raises(ValueError, match="renames a class to 'other', but the classes are a, b"):
        labelled(tmp_path, list("abc"), classes=("a", "b"), class_map=("c=other",))


def test_numbers_of_an_npz_and_a_table_are_renamed(tmp_path):
    fields = {"class_map": ("0=no", "1=yes", "2=yes")}
    for more in ({}, {"classes": ("no", "yes")}):
        for images in (npz(tmp_path, 3, **fields, **more), labelled(tmp_path, list("012"), **fields, **more)):
            assert images.classes == ("no", "yes")
            assert names(images)[-1] == ("yes",)


def test_a_left_out_label_of_several_leaves_the_image(tmp_path):
    images = labelled(tmp_path, ["a|b", "b", "a"], task="multilabel", drop_classes=("b",))
    assert names(images) == [("a",), (), ("a",)]
    assert "kept the images: b (2)" in images.notes[0]


def test_nothing_left_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"leaves no row of t\.csv"):
        labelled(tmp_path, ["a", "b"], drop_classes=("a", "b"))
    with pytest.raises(ValueError, match="drops all images"):
        folders(tmp_path / "f", "ab", drop_classes=("a", "b"))


def test_rows_that_are_left_out_decide_nothing(tmp_path):
    rows = [
        ("a.png", "x", "1", "train"),
        ("b.png", "y", "2", "val"),
        ("c.png", "z", "", "?"),
        ("gone.png", "nan", "", "?"),
    ]
    write(tmp_path, {f"{n}.png": "" for n in "abc"} | {"t.csv": table_of(rows, ("file", "label", "p", "s"))})
    fields = {"group_column": "p", "split_column": "s", "rows_without_file": "drop"}
    images = opened(tmp_path, **fields, drop_classes=("z",))
    assert [(row.where, row.group, row.split) for row in images.rows] == [
        ("a.png", "1", "train"),
        ("b.png", "2", "val"),
    ]
    assert images.classes == ("x", "y")
    assert any("no image is left of nan" in note for note in images.notes)


def test_a_class_without_rows_stays_only_if_it_is_named(tmp_path):
    rows = [("a.png", "x"), ("b.png", "y"), ("gone.png", "z")]
    write(tmp_path, {f"{n}.png": "" for n in "ab"} | {"t.csv": table_of(rows)})
    images = opened(tmp_path, rows_without_file="drop")
    assert images.classes == ("x", "y")
    assert "no image is left of z" in images.notes[-1]
    assert opened(tmp_path, rows_without_file="drop", classes=("z", "y", "x")).classes == ("z", "y", "x")


PATHS = ["s/patient_01_a.png", "s/patient_01_b.png", "s/patient_2_a.png"]


def test_groups_come_from_paths(tmp_path):
    write(
        tmp_path,
        {name: "" for name in PATHS} | {"t.csv": table_of([(name, "ab"[i % 2]) for i, name in enumerate(PATHS)])},
    )
    images = opened(tmp_path, group_pattern=r"patient_(\d+)_")
    assert [row.group for row in images.rows] == ["01", "01", "2"]
    images = folders(tmp_path / "f", "ab", group_pattern=r"/(p\d)_")
    assert [row.group for row in images.rows] == ["p0", "p1", "p0", "p1"]


@pytest.mark.parametrize("pattern", [r"patient_(0\d)_", r"s/(x)?patient", r"(x*)"])
def test_a_path_without_a_group_is_an_error(tmp_path, pattern):
    write(
        tmp_path,
        {name: "" for name in PATHS} | {"t.csv": table_of([(name, "ab"[i % 2]) for i, name in enumerate(PATHS)])},
    )
    with pytest.raises(ValueError, match=r"finds no group in the paths of . of 3 images \('s/patient_.*widen"):
        opened(tmp_path, group_pattern=pattern)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"group_pattern": "p(1"}, "not a regular expression"),
        ({"group_pattern": "p1"}, "has no group"),
        ({"group_pattern": "(p)", "group_column": "p"}, "both name the groups"),
        ({"class_map": ("a",)}, "it says old=new"),
        ({"class_map": ("a=",)}, "it says old=new"),
        ({"class_map": ("a=b", "a=c")}, "two new names"),
        ({"class_map": ("a=b", "b=c")}, "names are replaced once"),
        ({"class_map": ("a=b",), "drop_classes": ("b",)}, "left out or renamed"),
        ({"class_map": ("a=b",), "drop_classes": ("a",)}, "left out or renamed"),
        ({"no_finding": "n", "classes": ("n", "m")}, "named as a class"),
        ({"label_separator": ""}, "needs? something between"),
        ({"classes": ("\u00e9", "e\u0301")}, "one class twice"),
    ],
)
def test_contradicting_settings_are_refused_before_any_work(fields, message):
    with pytest.raises(ValidationError, match=message):
        DataConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"layout": "npz", "group_pattern": "(p)"},
        {"layout": "npz", "label_separator": ";"},
        {"layout": "folders", "no_finding": "n"},
        {"layout": "folders", "metadata_columns": ("age",)},
        {"layout": "table", "label_separator": ";"},
        {"dataset": "phantoms", "layout": "phantoms", "drop_classes": ("cyst",)},
    ],
)
def test_a_setting_unused_by_the_layout_is_refused_first(fields):
    with pytest.raises(ValueError, match=r"--data\.[a-z-]+ .* is for .*; (set|remove)"):
        check_source(DataConfig(**{"dataset": "mine", "source": "/nowhere", **fields}))


def test_new_settings_move_no_digest_of_sets_without_them():
    plain = DataConfig(dataset="mine", layout="table", source="x", task="multilabel")
    assert config_digest(plain) == config_digest(plain.model_copy(update={"label_separator": "|", "class_map": ()}))
    assert config_digest(plain) != config_digest(plain.model_copy(update={"label_separator": ";"}))


def test_a_split_word_that_drops_rows_is_for_folders_only(tmp_path):
    config = DataConfig(
        dataset="d", layout="table", source=str(tmp_path), split_column="s", split_values=("1=train", "other=drop")
    )
    with pytest.raises(ValueError, match=r"--data\.split-values .*other=drop.* is for split folders.*; remove"):
        check_settings(config)
