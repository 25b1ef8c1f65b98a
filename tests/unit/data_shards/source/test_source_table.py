"""Split and group columns of a table: what is not certain is refused, with a remedy that works as it is typed."""

import re
import subprocess

import pytest
from table_sets import opened, table_of, write

from data_shards.options import option
from data_shards.split import split_of_cell


def of_column(folder, cells, **fields):
    """A set whose images have these cells in column `c`."""
    rows = [(f"{i}.png", "ab"[i % 2], cell) for i, cell in enumerate(cells)]
    write(folder, {name: "" for name, *_ in rows} | {"t.csv": table_of(rows, ("file", "label", "c"))})
    return opened(folder, **fields)


def by_shell(words):
    """The words as a shell hands them on."""
    shown = subprocess.run(["bash", "-c", f"printf '%s\\0' {words}"], capture_output=True, check=True)
    return tuple(shown.stdout.decode().split("\0")[:-1])


@pytest.mark.parametrize("unknown", [[""], ["Set (A)", "Set (B)"], ["0", "1"], ["it's"], ["A\nB"], ["a=b"], ["\u00e9"]])
def test_the_remedy_for_unknown_splits_names_all_and_works(tmp_path, unknown):
    cells = ["train", "val", "test", *unknown]
    with pytest.raises(ValueError, match=r"line [56] of t\.csv") as caught:
        of_column(tmp_path, cells, split_column="c")
    message = str(caught.value)
    assert "\n" not in message
    words = by_shell(re.search(r"--data\.split-values (.*) \(train, val or test in", message)[1])
    assert words == tuple(f"{word}=..." for word in unknown)
    values = tuple(word.replace("=...", "=test") for word in words)
    images = of_column(tmp_path, cells, split_column="c", split_values=values)
    assert [row.split for row in images.rows] == ["train", "val", "test", *["test"] * len(unknown)]


def test_the_remedy_for_unknown_splits_keeps_what_was_given(tmp_path):
    with pytest.raises(ValueError, match=r"--data\.split-values 1=train 0=\.\.\. \("):
        of_column(tmp_path, ["1", "0"], split_column="c", split_values=("1=train",))


@pytest.mark.parametrize(
    ("cell", "split"),
    [
        ("Train", "train"), ("Testing", "test"), ("Train (80%)", "train"), ("Test set", "test"), ("train_set", "train"),
        ("validation 15 %", "val"), ("hold-out", "test"),
        ("not test", ""), ("train 0", ""), ("train=0", ""), ("train/val", ""), ("trainval", ""), ("test?", ""),
        ("-test", ""), ("dev", ""), ("eval", ""), ("tests", ""), ("", ""), ("80%", ""), ("train 1, 80%", ""),
    ],
)  # fmt: skip
def test_a_cell_is_a_split_where_it_certainly_names_one(cell, split):
    assert split_of_cell(cell) == split


def test_what_the_user_says_of_a_word_counts_more_than_the_word(tmp_path):
    images = of_column(tmp_path, ["train", "Test set"], split_column="c", split_values=("Test set=val",))
    assert [row.split for row in images.rows] == ["train", "val"]


@pytest.mark.parametrize(
    "value", ["A\nB", "\t", "it's\n\\n", "\u2028", "a\x01b", "\r\nf", "\x85", "plain", "$HOME (x)"]
)
def test_a_value_in_a_remedy_is_one_line_and_survives_a_shell(value):
    typed = option("class-map", value)
    assert len(typed.splitlines()) == 1
    assert by_shell(typed) == ("--data.class-map", value)


@pytest.mark.parametrize("word", ["nan", "N/A", "Unknown", "None", "?", "-", "NULL", "missing"])
def test_a_word_for_a_missing_value_is_not_a_group(tmp_path, word):
    with pytest.raises(ValueError, match=r"in line 4 of t\.csv \(2 rows .* fill it in"):
        of_column(tmp_path, ["p1", "p2", word, word], group_column="c")


@pytest.mark.parametrize("one", [("p1", "P1"), ("1", "1.0"), ("01", "1"), ("p  1", "p 1"), ("A1", "A1.")])
def test_groups_differing_in_spelling_are_noticed_with_rows(tmp_path, one):
    images = of_column(tmp_path, [*one, one[1], "other"], group_column="c")
    assert [row.group for row in images.rows] == [*one, one[1], "other"]
    (note,) = images.notes
    assert f"{one[0]!r} (1 rows)" in note
    assert f"{one[1]!r} (2 rows)" in note


def test_a_group_with_a_letter_of_another_alphabet_is_noticed(tmp_path):
    (note,) = of_column(tmp_path, ["A1", "\u04101", "B1"], group_column="c").notes
    assert "CYRILLIC CAPITAL LETTER A" in note


@pytest.mark.parametrize("groups", [["1", "10", "1.5", "-1"], ["12345678901234567890", "12345678901234567891"]])
def test_groups_that_differ_are_not_noticed(tmp_path, groups):
    images = of_column(tmp_path, groups, group_column="c")
    assert images.notes == ()
