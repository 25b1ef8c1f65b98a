"""Labels of a table that are not what they seem: each is refused with an option that works, or noticed, or right."""

import re
import shlex

import pytest
from table_sets import labelled, names, opened, write

from data_shards.options import option

NFC, NFD = "\u00e9", "e\u0301"


def remedy(message, option):
    """The values that a message says to give the option."""
    words = shlex.split(re.search(rf"--data\.{option} (.*?)(?:, or, if|; if |, or, |$)", message)[1])
    return tuple(words)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["Benign", "benign", "Benign", "x"], ("Benign", "x")),
        (["1", "1.0", "01", "1", "2"], ("1", "2")),
        (["-1", "-1.0", "0", "-1"], ("-1", "0")),
        (["basal cell", "basal  cell", "basal cell", "x"], ("basal cell", "x")),
        (["basal cell", "basal\u00a0cell", "basal cell", "x"], ("basal cell", "x")),
        (["x", "\u200bx", "x", "y"], ("x", "y")),
        (["True", "1", "True", "0", "False", "False"], ("False", "True")),
        (["yes", "Yes", "yes", "no"], ("no", "yes")),
        (["ｎｖ", "nv", "nv", "mel"], ("mel", "nv")),
        (["Beniga", "Benig\u0430", "Beniga", "x"], ("Beniga", "x")),
        (["benign.", "Benign", "Benign", "x"], ("Benign", "x")),
        (["n\u03bd", "nv", "nv", "\u039eV", "mel"], ("mel", "nv", "\u039eV")),
    ],
)
def test_two_spellings_of_a_class_are_refused_with_a_class_map(tmp_path, labels, classes):
    with pytest.raises(ValueError, match="seem to be one class") as caught:
        labelled(tmp_path, labels)
    images = labelled(tmp_path, labels, class_map=remedy(str(caught.value), "class-map"))
    assert images.classes == classes
    assert len(images.rows) == len(labels)


def test_a_letter_of_another_alphabet_in_a_label_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"with CYRILLIC SMALL LETTER A\).* seem to be one class"):
        labelled(tmp_path, ["Beniga", "Benig\u0430", "x"])
    with pytest.raises(ValueError, match=r"with CYRILLIC SMALL LETTER A\) .*--data.class-map"):
        labelled(tmp_path, ["Benig\u0430", "x"], classes=("Beniga", "x"))
    russian = ["\u043d\u043e\u0440\u043c\u0430", "\u0440\u0430\u043a", "x"]
    assert len(labelled(tmp_path, russian).classes) == 3


def test_all_pairs_of_spellings_are_in_one_message(tmp_path):
    labels = ["A", "a", "A", "B", "b", "B"]
    with pytest.raises(ValueError, match="seem to be one class") as caught:
        labelled(tmp_path, labels)
    assert remedy(str(caught.value), "class-map") == ("a=A", "b=B")


def test_classes_that_are_named_are_meant_as_they_are(tmp_path):
    assert labelled(tmp_path, ["Benign", "benign", "1", "1.0", "A|B", "nan"], classes=(
        "Benign", "benign", "1", "1.0", "A|B", "nan")).classes[4] == "A|B"  # fmt: skip


def test_a_name_in_two_unicode_forms_is_one_class_with_a_notice(tmp_path):
    images = labelled(tmp_path, [NFC, NFD, "b"])
    assert images.classes == ("b", NFC)
    assert any("2 ways" in note for note in images.notes)


@pytest.mark.parametrize("named", [NFC, NFD])
@pytest.mark.parametrize("written", [NFC, NFD])
def test_a_named_class_is_found_however_the_table_codes_it(tmp_path, named, written):
    images = labelled(tmp_path, [written, "b"], classes=("b", named))
    assert (images.classes, [row.labels for row in images.rows]) == (("b", named), [(1,), (0,)])


@pytest.mark.parametrize(
    "labels",
    [
        ["A", "B", "A|B"],
        ["A|B", "B|C"],
        ["A;B", "C", "C"],
        ["A", "B", "A, B"],
        ["A,B", "B,A", "C"],
        ["A, B", "B, C", "A, C"],
        ["A", "B", "A/B"],
        ["A", "B", "A + B"],
        ["0", "1", "0,1"],
        ["A;", "B;"],
    ],
)
def test_several_labels_in_a_cell_are_not_taken_for_a_class(tmp_path, labels):
    with pytest.raises(ValueError, match=r"seems to be several labels in one cell.*--data\.task multilabel") as caught:
        labelled(tmp_path, labels)
    (separator,) = remedy(str(caught.value), "label-separator")
    images = labelled(tmp_path, labels, task="multilabel", label_separator=separator)
    assert all(name in "ABC01" for name in images.classes)


def test_labels_on_two_lines_of_a_cell_are_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="several labels in one cell") as caught:
        labelled(tmp_path, ["A", "B", "A\nB"])
    assert r"--data.label-separator $'\n';" in str(caught.value)
    assert str(caught.value).endswith(r"--data.class-map $'A\nB=A\nB'")


def test_names_with_a_comma_are_classes_and_most_are_noticed(tmp_path):
    few = labelled(tmp_path, ["Nevus, atypical", "Melanoma", "Melanoma"])
    assert (few.classes, few.notes) == (("Melanoma", "Nevus, atypical"), ())
    most = labelled(tmp_path, ["Nevus, atypical", "Nevus, common", "Melanoma"])
    assert len(most.classes) == 3
    assert "'Nevus, atypical' (line 2 of t.csv; 2 rows" in most.notes[0]


def test_decimal_commas_are_numbers(tmp_path):
    assert labelled(tmp_path, ["10,5", "2,5", "2,5", "1,5"]).classes == ("1,5", "2,5", "10,5")


@pytest.mark.parametrize("labels", [["A, B", "B", "A"], ["A;B", "B", "A"], ["A|B", "A,B", "B"], ["A, B", "C", ""]])
def test_another_separator_in_a_multilabel_table_is_refused(tmp_path, labels):
    with pytest.raises(ValueError, match=r"several labels in one cell.*--data\.label-separator"):
        labelled(tmp_path, labels, task="multilabel")


def test_a_separator_is_taken_and_a_comma_within_names_stays(tmp_path):
    images = labelled(tmp_path, ["a; b", "", "b", "a;;"], task="multilabel", label_separator=";")
    assert names(images) == [("a", "b"), (), ("b",), ("a",)]
    images = labelled(tmp_path, ["Nevus, atypical|B", "B"], task="multilabel")
    assert images.classes == ("B", "Nevus, atypical")


def test_a_word_for_none_is_noticed_and_named(tmp_path):
    labels = ["A|B", "No Finding", "B", ""]
    images = labelled(tmp_path, labels, task="multilabel")
    assert images.classes == ("A", "B", "No Finding")
    assert "--data.no-finding 'No Finding'" in images.notes[0]
    for classes in ((), ("B", "A")):
        images = labelled(tmp_path, labels, task="multilabel", no_finding="No Finding", classes=classes)
        assert (sorted(images.classes), images.notes) == (["A", "B"], ())
        assert [len(row.labels) for row in images.rows] == [2, 0, 1, 0]
    with pytest.raises(ValueError, match=r"one of A, B; --data\.no-finding 'No Finding' if it means none"):
        labelled(tmp_path, labels, task="multilabel", classes=("A", "B"))


def test_several_words_for_none_become_one(tmp_path):
    images = labelled(
        tmp_path, ["A", "Normal", "None", "A|B"], task="multilabel", no_finding="None", class_map=("Normal=None",)
    )
    assert names(images) == [("A",), (), (), ("A", "B")]


@pytest.mark.parametrize(
    ("labels", "fields", "message"),
    [
        (["A", "None|A"], {}, r"line 3 of t\.csv has 'None', which means none .* together with 'A'"),
        (["A", "B"], {}, r"no row of t\.csv has this label \(there are A, B\)"),
        (["A", "None"], {"task": "multiclass"}, "is for multilabel tables"),
    ],
)
def test_a_word_for_none_that_cannot_be_is_refused(tmp_path, labels, fields, message):
    with pytest.raises(ValueError, match=message):
        labelled(tmp_path, labels, **{"task": "multilabel", "no_finding": "None", **fields})


@pytest.mark.parametrize("word", ["nan", "NaN", "NA", "N/A", "<NA>", "null", "#N/A", "#VALUE!"])
def test_a_missing_value_word_is_a_class_only_on_request(tmp_path, word):
    labels = ["A", "B", word]
    with pytest.raises(ValueError, match="missing value") as caught:
        labelled(tmp_path, labels)
    left = labelled(tmp_path, labels, drop_classes=remedy(str(caught.value), "drop-classes"))
    assert (left.classes, len(left.rows)) == (("A", "B"), 2)
    kept = labelled(tmp_path, labels, class_map=remedy(str(caught.value), "class-map"))
    assert set(kept.classes) == {"A", "B", word}


@pytest.mark.parametrize("word", ["None", "unknown", "?", "-"])
def test_words_that_may_mean_that_nothing_is_known_are_noticed(tmp_path, word):
    images = labelled(tmp_path, ["A", "B", word])
    assert word in images.classes
    assert f"--data.drop-classes {shlex.quote(word)}" in images.notes[0]


def test_rows_without_a_label_are_refused_left_out_or_named(tmp_path):
    labels = ["A", "B", ""]
    for classes in ((), ("A", "B")):
        with pytest.raises(ValueError, match=r"1 rows have no label \(line 4 of t\.csv\).*--data\.drop-classes ''"):
            labelled(tmp_path, labels, classes=classes)
    assert names(labelled(tmp_path, labels, drop_classes=("",))) == [("A",), ("B",)]
    assert names(labelled(tmp_path, labels, class_map=("=other",))) == [("A",), ("B",), ("other",)]


def test_lists_in_cells_are_refused(tmp_path):
    with pytest.raises(ValueError, match="looks like a list"):
        labelled(tmp_path, ["['A']", "['A', 'B']"], task="multilabel")


def test_class_indices_may_be_floats_and_a_notice_explains_them(tmp_path):
    images = labelled(tmp_path, ["0", "1.0", "01", "b"], classes=("a", "b"))
    assert [row.labels for row in images.rows] == [(0,), (1,), (1,), (1,)]
    assert "0 is a, 1.0 is b" in images.notes[0].replace("01 is b, ", "")
    with pytest.raises(ValueError, match=r"label '2' in line 3"):
        labelled(tmp_path, ["0", "2"], classes=("a", "b"))


def test_numbers_are_in_order_of_value(tmp_path):
    assert labelled(tmp_path, ["10.0", "2.0", "-1", "0"]).classes == ("-1", "0", "2.0", "10.0")


def test_grades_in_words_are_noticed_if_nobody_ordered_them(tmp_path):
    assert "mild, severe" in labelled(tmp_path, ["severe", "mild"], task="ordinal").notes[0]
    assert labelled(tmp_path, ["severe", "mild"], task="ordinal", classes=("mild", "severe")).notes == ()


def test_names_that_differ_in_punctuation_are_noticed(tmp_path):
    images = labelled(tmp_path, ["basal_cell", "basal cell", "HER2+", "HER2-"])
    assert len(images.classes) == 4
    assert len(images.notes) == 1
    assert "'basal cell=basal_cell'" in images.notes[0]


@pytest.mark.parametrize(
    "rows",
    ["a.png,1,0\nb.png,0,1\n", "a.png,1.0,\nb.png,-1.0,1.0\nc.png,0,0\n", "a.png,True,False\nb.png,False,True\n"],
)
def test_one_column_per_class_is_named_with_what_to_do(tmp_path, rows):
    write(tmp_path, {f"{n}.png": "" for n in "abc"} | {"t.csv": f"file,Edema,Mass\n{rows}"})
    with pytest.raises(ValueError, match=r"2 columns of 0 and 1 \(Edema, Mass\).*--data\.label-column"):
        opened(tmp_path)


@pytest.mark.parametrize("other", ["no finding", "NO FINDING", "No  Finding"])
def test_another_spelling_of_the_label_for_none_is_not_a_class(tmp_path, other):
    fields = {"task": "multilabel", "no_finding": "No Finding"}
    labels = ["Mass", other, other, "No Finding"]
    with pytest.raises(ValueError, match="seem to be one class") as caught:
        labelled(tmp_path, labels, **fields)
    assert remedy(str(caught.value), "class-map") == (f"{other}=No Finding",)
    images = labelled(tmp_path, labels, **fields, class_map=(f"{other}=No Finding",))
    assert (images.classes, names(images)) == (("Mass",), [("Mass",), (), (), ()])
    meant = labelled(tmp_path, labels, **fields, classes=("Mass", other))
    assert names(meant) == [("Mass",), (other,), (other,), ()]


@pytest.mark.parametrize("other", ["Normal", "No_Finding", "healthy"])
def test_naming_a_none_label_keeps_the_notice_about_another(tmp_path, other):
    fields = {"task": "multilabel", "no_finding": "No Finding"}
    labels = ["Mass", other, "No Finding"]
    images = labelled(tmp_path, labels, **fields)
    assert images.classes == tuple(sorted(["Mass", other]))
    assert any(f"--data.class-map '{other}=No Finding'" in note for note in images.notes)
    joined = labelled(tmp_path, labels, **fields, class_map=(f"{other}=No Finding",))
    assert joined.classes == ("Mass",)
    assert not any("None" in note or "class of its own" in note for note in joined.notes)


@pytest.mark.parametrize(
    ("labels", "separator"),
    [
        (["A", "B", "A B"], " "),
        (["A B", "B A"], " "),
        (["A", "B", "A\tB"], "\t"),
        (["A\tB", "B\tA"], "\t"),
        (["A", "B", "A and B"], " and "),
        (["A and B", "B and A", "lung mass", "liver mass"], " and "),
    ],
)
def test_words_between_labels_separate_if_other_labels_show_it(tmp_path, labels, separator):
    with pytest.raises(ValueError, match="several labels in one cell") as caught:
        labelled(tmp_path, labels)
    assert option("label-separator", separator) in str(caught.value)
    images = labelled(tmp_path, labels, task="multilabel", label_separator=separator)
    assert {"A", "B"} <= set(images.classes)
    doubtful = [label for label in labels if separator in label and "mass" not in label]
    assert remedy(str(caught.value).replace("\\t", ""), "class-map") or "\t" in separator
    kept = labelled(tmp_path, labels, class_map=[f"{label}={label}" for label in doubtful])
    assert kept.classes == tuple(sorted(labels))


@pytest.mark.parametrize(
    "labels",
    [
        ["basal cell", "squamous cell", "benign nevus", "malignant nevus"],
        ["basal cell", "cell"],
        ["nevus", "benign nevus", "malignant nevus"],
        ["mass and cyst", "mass", "scars"],
        ["grade 1", "grade 2"],
    ],
)
def test_names_of_several_words_are_classes_without_a_notice(tmp_path, labels):
    images = labelled(tmp_path, labels)
    assert (images.classes, images.notes) == (tuple(sorted(labels)), ())
