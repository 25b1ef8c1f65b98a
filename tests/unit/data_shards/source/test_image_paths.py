"""Paths in a table: every way that people write them is found, and never a wrong file."""

import pytest
from table_sets import opened, table_of, write

CHEXPERT = [
    "train/patient00001/study1/view1_frontal.jpg",
    "train/patient00002/study1/view1_frontal.jpg",
    "valid/patient00001/study1/view1_frontal.jpg",
]


def found(folder, written, files, *, table="t.csv", **fields):
    """The files that these paths are found as, relative to the folder."""
    rows = [(value.replace("{}", str(folder)), "ab"[i % 2]) for i, value in enumerate(written)]
    write(folder, {name: "" for name in files} | {table: table_of(rows)})
    images = opened(folder, table=table, **fields)
    base = (folder / table).parent
    return [(base / row.where).resolve().relative_to(folder.resolve()).as_posix() for row in images.rows], images.notes


@pytest.mark.parametrize(
    ("written", "files", "table"),
    [
        (["a/1.png", "a/2.png"], ["a/1.png", "a/2.png"], "t.csv"),
        (["1.png", "2.png"], ["a/1.png", "a/2.png"], "a/t.csv"),
        (["a/1.png", "a/2.png"], ["a/1.png", "a/2.png"], "meta/t.csv"),
        (["../a/1.png", "../a/2.png"], ["a/1.png", "a/2.png"], "meta/t.csv"),
        (["./a/1.png", "/a/2.png", "a//3.png"], ["a/1.png", "a/2.png", "a/3.png"], "t.csv"),
        (["a\\1.png", ".\\a\\2.png"], ["a/1.png", "a/2.png"], "t.csv"),
        (["{}/a/1.png", "{}/a/2.png"], ["a/1.png", "a/2.png"], "meta/t.csv"),
        (["file://{}/a/1.png", "a/2.png"], ["a/1.png", "a/2.png"], "t.csv"),
        (["my%20a/1%C3%A9.png", "2.png"], ["my a/1é.png", "2.png"], "t.csv"),
        (["50%/1%20.png", "2.png"], ["50%/1%20.png", "2.png"], "t.csv"),
        (["1", "2"], ["a/1.png", "b/2.png"], "t.csv"),
        (["a/1", "a/2"], ["a/1.png", "a/2.png"], "t.csv"),
        (["p/1.png", "q/1.png"], ["x/p/1.png", "y/q/1.png"], "t.csv"),
        (["A/1.PNG", "A/2.PNG"], ["a/1.png", "a/2.png"], "t.csv"),
        (["set/a/1.png", "set/a/2.png"], ["set/a/1.png", "set/a/2.png"], "set/t.csv"),
    ],
)
def test_paths_are_found_as_they_are_written(tmp_path, written, files, table):
    assert found(tmp_path, written, files, table=table) == (sorted(files), ())


@pytest.mark.parametrize(
    ("written", "files", "table", "front"),
    [
        ([f"CheXpert-v1.0-small/{p}" for p in CHEXPERT], CHEXPERT, "train.csv", "CheXpert-v1.0-small"),
        ([f"CheXpert-v1.0-small/{p}" for p in CHEXPERT], [f"x/{p}" for p in CHEXPERT], "x/train.csv", "CheXpert-v1"),
        ([f"CheXpert-v1.0-small/{p}" for p in CHEXPERT], [f"x/{p}" for p in CHEXPERT], "train.csv", "CheXpert-v1"),
        ([f"/data/a/set/{p}" for p in CHEXPERT], CHEXPERT, "train.csv", "/data/a/set"),
        (["D:" + f"\\a\\set\\{p}" for p in CHEXPERT], CHEXPERT, "train.csv", "/a/set"),
        ([f"https://a.org/set/{p}" for p in CHEXPERT], CHEXPERT, "train.csv", "/a.org/set"),
        (["S/a/1", "S/a/2"], ["a/1.png", "a/2.png"], "t.csv", "S"),
        (["S/a/1.PNG", "S/a/2.png"], ["a/1.png", "a/2.png"], "t.csv", "S"),
        (["images/1.png", "images/2.png"], ["1.png", "2.png"], "t.csv", "images"),
        (["/d1/set/a/1.png", "/d2/set/b/2.png"], ["a/1.png", "b/2.png"], "t.csv", "/d1/set"),
    ],
)
def test_leading_folders_that_the_set_lacks_are_dropped(tmp_path, written, files, table, front):
    places, notes = found(tmp_path, written, files, table=table)
    assert places == sorted(files)
    assert f"are read without '{front}" in notes[0]


def test_a_part_of_chexpert_is_read_with_its_own_table(tmp_path):
    written = [f"CheXpert-v1.0-small/{path}" for path in CHEXPERT]
    places, notes = found(tmp_path, written, CHEXPERT[:2], table="train.csv", rows_without_file="drop")
    assert places == CHEXPERT[:2]
    assert "1 of 3 rows" in notes[0]


@pytest.mark.parametrize(
    ("written", "files", "table", "missing"),
    [
        (["train/1.png", "train/2.png"], ["test/1.png", "train/2.png"], "t.csv", 1),
        (["train/1.png", "train/2.png"], ["test/1.png", "test/2.png"], "t.csv", 2),
        (["train/1.png", "train/2.png"], ["test/1.png", "test/2.png"], "test/t.csv", 2),
        (["train/1.png", "train/2.png"], ["1.png", "2.png"], "t.csv", 2),
        (["train/1.png", "test/2.png"], ["1.png", "2.png"], "t.csv", 2),
        (["train/a/1.png", "train/a/2.png"], ["test/a/1.png", "test/a/2.png"], "t.csv", 2),
        (["S/a/1.png", "S/a/2.png"], ["test/a/1.png", "test/a/2.png"], "t.csv", 2),
        (["x/a/1.png", "y/a/2.png"], ["y/a/1.png", "y/a/2.png"], "t.csv", 1),
        (["1.png", "2.png"], ["train/1.png", "test/2.png"], "train/t.csv", 1),
        (["1.png", "2.png"], ["test/1.png", "test/2.png"], "train/t.csv", 2),
        (["1.png", "2.png"], ["train/1.png", "test/2.png"], "train.csv", 1),
        (["1.png", "2.png"], ["a/1.png", "b/2.png"], "a/t.csv", 1),
        (["{}/a/1.png", "{}/a/2.png"], ["a/1.png", "2.png"], "t.csv", 1),
        (["a/1.png", "S/a/2.png"], ["a/1.png", "a/2.png"], "t.csv", 1),
        (["a/1.png", ""], ["a/1.png"], "t.csv", 1),
    ],
)
def test_a_file_of_another_folder_is_never_taken(tmp_path, written, files, table, missing):
    with pytest.raises(ValueError, match=rf"{missing} of 2 rows .* not there .*; looked relative to .*{tmp_path}"):
        found(tmp_path, written, files, table=table)


@pytest.mark.parametrize(
    ("written", "files", "message"),
    [
        (["1.png", "2.png"], ["a/1.png", "b/1.png", "2.png"], r"'1\.png' in line 2 .* any of a/1\.png, b/1\.png"),
        (["p/1.png", "2.png"], ["a/p/1.png", "b/p/1.png", "2.png"], r"any of a/p/1\.png, b/p/1\.png"),
        (["A.png", "2.png"], ["x/a.png", "x/a.PNG", "2.png"], r"any of x/a\.PNG, x/a\.png"),
        (["x/a/1.png", "y/a/2.png"], ["a/1.png", "a/2.png"], r"first folders, which differ: 'x' in front .* 'y'"),
        (["1.png", "./1.png"], ["1.png"], r"in line 2 of t\.csv and again in line 3"),
    ],
)
def test_what_may_be_two_files_is_an_error_that_shows_them(tmp_path, written, files, message):
    with pytest.raises(ValueError, match=message):
        found(tmp_path, written, files)


def test_a_full_name_is_preferred_to_one_without_its_ending(tmp_path):
    assert found(tmp_path, ["x.png", "y.png"], ["a/x.png", "b/x.png.bak", "a/y.png"])[0] == ["a/x.png", "a/y.png"]
