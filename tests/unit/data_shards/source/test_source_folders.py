"""Folders as classes and as splits: what is read how, what is refused, and that each remedy works."""

import io
import json
import os
import re
import shlex
import tarfile
from collections import Counter

import numpy as np
import pytest
from dicom_files import dicom_file
from original_layouts import zip_of
from tiny_sets import coded, pixels

from data_shards.config import DataConfig
from data_shards.convert import convert
from data_shards.plan import config_digest
from data_shards.source import open_source
from data_shards.split import LeakError, assign_splits, split_word
from data_shards.store import open_store

NEW_KEYS = ("rules", "splits_from", "split_folders")  # in the settings that are stored beside a dataset
DRAWN, TRAIN, VAL, TEST = None, "train", "val", "test"


def config(source, **fields):
    return DataConfig(dataset="mine", layout="folders", source=str(source), **fields)


def paths(outer, inner="glioma normal", num=2, before=""):
    """`outer/inner/*.jpg` for each pair."""
    return [f"{before}{o}/{i}/{n}.jpg" for o in outer for i in inner.split() for n in range(num)]


def make(folder, names):
    """The files below a new folder; a name that ends in "/" is an empty folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = folder / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_bytes(b"x")
    return folder


def read(tmp_path, names, **fields):
    return open_source(config(make(tmp_path / "set", names), **fields))


def found(images):
    """{(class, split): number of images}"""
    return Counter((images.classes[row.labels[0]], row.split) for row in images.rows)


def refusal(tmp_path, names, **fields):
    with pytest.raises(ValueError) as caught:
        read(tmp_path, names, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def remedies(message):
    """Each run of options that a message names, as fields of DataConfig: typed as they stand there."""
    options = [each.partition(" (")[0] for each in re.findall(r"--data\.([^;:)]+(?: \()?)", message)]
    fields = []
    for option in options:
        name, *values = shlex.split(
            option.rstrip(" ,.").partition(" --data")[0].partition(", ")[0].partition(" or ")[0]
        )
        fields.append((name.replace("-", "_"), tuple(values)))
    return fields


# ------------------------------------------------------------------------------------------------------- what names say


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *(
            (name, TRAIN)
            for name in ("train", "Training", "TRAIN", "train_set", "Train (70%)", "01_train", "xray_train")
        ),
        *(
            (name, TRAIN)
            for name in ("trainingSet", "TrainImages", "trainset", "trainval", "train_val", "training data")
        ),
        *((name, VAL) for name in ("val", "Valid", "validation_set", "VALIDATION", "val (10%)", "02-val")),
        *(
            (name, TEST)
            for name in ("test", "Testing", "test-images", "TEST_SIMPLE", "hold-out", "holdout", "Held Out")
        ),
        *((name, "") for name in ("invalid", "detest", "pretraining", "glioma", "train_test", "contest", "40X", "")),
    ],
)
def test_a_folders_name_says_which_split_it_is(name, split):
    assert split_word(name)[0] == split


# ------------------------------------------------------------------------------------------------ splits around classes


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        (["Training", "Testing"], [TRAIN, TEST]),
        (["Train", "Val", "Test"], [TRAIN, VAL, TEST]),
        (["TRAIN", "VALID", "TEST"], [TRAIN, VAL, TEST]),
        (["train_set", "validation_set", "test-images"], [TRAIN, VAL, TEST]),
        (["Train (70%)", "Validation (10%)", "Test (20%)"], [TRAIN, VAL, TEST]),
        (["01_train", "02_test"], [TRAIN, TEST]),
        (["brain_train", "brain_test"], [TRAIN, TEST]),
        (["trainingSet", "testSet"], [TRAIN, TEST]),
        (["trainval", "test"], [TRAIN, TEST]),
        (["train_1", "train_2", "test"], [TRAIN, TRAIN, TEST]),
        (["train", "dev", "test"], [TRAIN, VAL, TEST]),
        (["train", "val", "eval"], [TRAIN, VAL, TEST]),
        (["train", "eval", "test"], [TRAIN, VAL, TEST]),
        (["train", "holdout"], [TRAIN, TEST]),
        (["seg_train/seg_train", "seg_test/seg_test"], [TRAIN, TEST]),
        (["train/images", "test/images"], [TRAIN, TEST]),
    ],
    ids=" ".join,
)
def test_split_folders_around_class_folders_are_the_splits(tmp_path, folders, splits):
    images = read(tmp_path, paths(folders))
    assert images.classes == ("glioma", "normal")
    assert found(images) == Counter({(c, s): 2 * splits.count(s) for c in images.classes for s in set(splits)})
    for row in images.rows:
        assert row.split == splits[[row.where.startswith(f"{folder}/") for folder in folders].index(True)]
    assert ("val drawn from train" in images.splits_from) == (VAL not in splits)


def test_the_official_split_is_kept_and_val_drawn_from_train(tmp_path):
    images = read(tmp_path, [*paths(["Training"], num=20), *paths(["Testing"], num=5)])
    splits = assign_splits(images.rows, num_classes=2, val_fraction=0.15, test_fraction=0.2, seed=0)
    assert Counter(splits) == {"train": 34, "val": 6, "test": 10}
    for row, split in zip(images.rows, splits, strict=True):
        assert row.where.startswith("Testing/") == (split == "test")
    assert images.splits_from == "train and test from the folders Training and Testing; val drawn from train"


@pytest.mark.parametrize("before", ["", "archive/Brain MRI/", "images/"])
@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_a_wrapped_or_packed_set_has_the_same_rows_amid_litter(tmp_path, kind, before):
    names = [f"{before}{name}" for name in paths(["Training", "Testing"])]
    beside = ["README.md", "archive/notes.txt", "labels/train/a.txt", f"{before}docs/paper.pdf"]
    litter = [
        f"{before}.ipynb_checkpoints/a.jpg",
        f"{before}Training/.ipynb_checkpoints/glioma/0.jpg",
        "__MACOSX/x/._a",
    ]
    files = dict.fromkeys([*names, *beside, *litter], b"x")
    if kind == "folder":
        source = make(tmp_path / "set", files)
    elif kind == "zip":
        source = tmp_path / "set.zip"
        source.write_bytes(zip_of(files))
    else:
        source = tmp_path / "set.tar"
        with tarfile.open(source, "w") as tar:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    images = open_source(config(source))
    assert images.rows == read(tmp_path / "plain", paths(["Training", "Testing"])).rows
    assert any("without images" in note and "docs" in note for note in images.notes)


def test_the_set_is_read_alike_from_s3(tmp_path, s3):
    names = paths(["Training", "Testing"])
    for name in names:
        open_store(s3).put(f"brain/{name}", b"x")
    assert open_source(config(f"{s3}/brain")).rows == read(tmp_path, names).rows


def test_zips_named_after_splits_are_not_poured_together(tmp_path):
    for inside in ("", "{}/"):
        folder = tmp_path / f"set{len(inside)}"
        folder.mkdir()
        for split, start in (("train", 0), ("test", 5)):
            names = [f"{inside.format(split)}{c}/{start + i}.jpg" for c in ("glioma", "normal") for i in range(2)]
            (folder / f"{split}.zip").write_bytes(zip_of(dict.fromkeys(names, b"x")))
    assert found(open_source(config(tmp_path / "set3"))) == {
        (c, s): 2 for c in ("glioma", "normal") for s in (TRAIN, TEST)
    }
    with pytest.raises(ValueError, match=r"test.zip, train.zip, which look like splits.*--data.split-folders ignore"):
        open_source(config(tmp_path / "set0"))
    assert len(open_source(config(tmp_path / "set0", split_folders="ignore")).rows) == 8


def test_folders_of_patients_inside_of_a_class_belong_to_it(tmp_path):
    names = [
        f"{s}/{c}/{s}-{c}-{p}/{i}.jpg" for s in ("train", "test") for c in "ab" for p in range(3) for i in range(2)
    ]
    assert found(read(tmp_path, names)) == {(c, s): 6 for c in "ab" for s in (TRAIN, TEST)}


def test_a_single_split_folder_leaves_all_splits_to_be_drawn(tmp_path):
    images = read(tmp_path, paths(["archive/train"]))
    assert found(images) == {("glioma", DRAWN): 2, ("normal", DRAWN): 2}
    assert images.splits_from == "all drawn from the folder train, as there is no other split"


@pytest.mark.parametrize("option", [{"split_folders": "ignore"}, {"split_column": "-"}], ids=str)
def test_the_official_split_can_be_declined(tmp_path, option):
    images = read(tmp_path, paths(["Training", "Testing"]), **option)
    assert found(images) == {("glioma", DRAWN): 4, ("normal", DRAWN): 4}
    assert "ignored" in images.splits_from


def test_named_classes_keep_their_order_in_every_split(tmp_path):
    images = read(tmp_path, paths(["Training", "Testing"]), classes=("normal", "glioma"))
    assert images.classes == ("normal", "glioma")
    assert {(row.where.split("/")[1], row.labels) for row in images.rows} == {("normal", (0,)), ("glioma", (1,))}


def test_naming_the_split_folders_as_classes_makes_them_classes(tmp_path):
    images = read(tmp_path, paths(["Training", "Testing"]), classes=("Training", "Testing"))
    assert found(images) == {("Training", DRAWN): 4, ("Testing", DRAWN): 4}


def test_what_belongs_to_no_class_is_left_out_and_reported(tmp_path):
    images = read(
        tmp_path, [*paths(["Training", "Testing"]), "Training/a.jpg", "Training/b.jpg", "overview.png", "empty/"]
    )
    assert len(images.rows) == 8
    assert "ignored 2 files of Training outside its class folders" in images.notes
    assert "ignored 1 file outside the class folders" in images.notes
    assert "ignored folders without images: empty" in images.notes


# ------------------------------------------------------------------------------------------------ splits inside classes


def test_split_folders_inside_every_class_are_the_splits(tmp_path):
    images = read(tmp_path, paths(["benign", "malignant"], "train val test"))
    assert found(images) == {(c, s): 2 for c in ("benign", "malignant") for s in (TRAIN, VAL, TEST)}
    assert images.splits_from == "train, val and test from the folders train, val and test inside each class"
    declined = read(tmp_path, [], split_folders="ignore")
    assert found(declined) == {("benign", DRAWN): 6, ("malignant", DRAWN): 6}


@pytest.mark.parametrize("stray", ["benign/0.jpg", "other/0.jpg", "benign/more/0.jpg"])
def test_a_class_without_images_is_refused_with_a_working_remedy(tmp_path, stray):
    names = [*paths(["benign", "malignant"], "train test"), stray]
    assert "--data.split-folders ignore" in refusal(tmp_path, names)
    assert sum(found(read(tmp_path, names, split_folders="ignore")).values()) == len(names)


# ------------------------------------------------------------------------------------------------- what could be either


@pytest.mark.parametrize("outer", [["tests", "trains"], ["测试集", "训练集"], ["invalid", "valids"]])
def test_a_remedy_never_gives_a_folder_a_split_unlike_its_name(tmp_path, outer):
    names = paths(outer)
    message = refusal(tmp_path, names, classes=("glioma", "normal"))
    values = [f"{name}=..." for name in sorted(outer)]
    assert f"--data.split-values {shlex.join(values)} (train, val or test instead of the dots" in message
    with pytest.raises(ValueError, match="it says value=split with the split train, val, test or drop"):
        DataConfig(split_values=values)


EITHER = [
    (["benign", "malignant"], "40X 100X"),
    (["Entrenamiento", "Prueba"], "glioma normal"),
    (["clinic A", "clinic B", "clinic C"], "benign malignant normal"),
    (["COVID", "Normal"], "images masks"),
    (["fold1", "fold2"], "0 1 2"),
]


@pytest.mark.parametrize(("outer", "inner"), EITHER, ids=str)
def test_naming_the_classes_settles_ambiguous_equal_folders(tmp_path, outer, inner):
    names = paths(outer, inner)
    message = refusal(tmp_path, names)
    (_, first), (_, second), *_ = [each for each in remedies(message) if each[0] == "classes"]
    assert (set(first), set(second)) == (set(outer), set(inner.split()))
    assert found(read(tmp_path, names, classes=first)) == {(c, DRAWN): 2 * len(inner.split()) for c in outer}
    which = refusal(tmp_path, names, classes=second)
    (open_values,) = (each for name, each in remedies(which) if name == "split_values")
    pairs = zip([value.partition("=")[0] for value in open_values], (TEST, TRAIN, VAL), strict=False)
    values = tuple(f"{name}={split}" for name, split in pairs)
    images = read(tmp_path, names, classes=second, split_values=values)
    assert images.classes == second
    assert {row.split for row in images.rows} == {pair.rpartition("=")[2] for pair in values}
    assert read(tmp_path, names, split_values=values).classes == tuple(sorted(inner.split()))
    pooled = read(tmp_path, names, classes=second, split_folders="ignore")
    assert found(pooled) == {(c, DRAWN): 2 * len(outer) for c in inner.split()}


@pytest.mark.parametrize(("outer", "fewer"), [("Prueba", "a b c"), ("test", "a b")])
def test_a_folder_lacking_classes_still_suggests_outer_splits(tmp_path, outer, fewer):
    names = [*paths(["Entrenamiento"], "a b c d e"), *paths([outer], fewer)]
    assert "either could be the classes" in refusal(tmp_path, names)


@pytest.mark.parametrize(
    "names",
    [
        paths(["a", "b"], "images"),
        [*paths(["a"], "p1 p2 p3 p4"), *paths(["b"], "p4 p5 p6 p7 p8")],
        [*paths(["positive test"], "p1 p2"), *paths(["negative test"], "p3 p4")],
        ["valid/1.jpg", "invalid/2.jpg"],
        [*paths(["valid"], "p1"), *paths(["test tube"], "p2"), *paths(["normal"], "p3")],
    ],
    ids=str,
)
def test_folders_that_are_not_alike_stay_classes(tmp_path, names):
    images = read(tmp_path, names)
    assert images.classes == tuple(sorted({name.partition("/")[0] for name in names}))
    assert {row.split for row in images.rows} == {DRAWN}


# ----------------------------------------------------------------------------------------------- refused, with a remedy


BOTH = paths(["Training", "Testing"])
ZOOMED = [f"{split}/{c}/{zoom}/0.jpg" for split in ("train", "test") for c in "ab" for zoom in ("40X", "100X")]


@pytest.mark.parametrize(
    ("names", "message", "remedy", "left"),
    [
        (paths(["TRAIN", "TEST", "TEST_SIMPLE"]), "look like the test", {"split_values": ("TEST_SIMPLE=test",)}, 12),
        (paths(["TRAIN", "TEST", "TEST_SIMPLE"]), "=drop", {"split_values": ("TEST_SIMPLE=drop",)}, 8),
        (paths(["train", "train_masks", "test"]), "train_masks", {"split_values": ("train_masks=drop",)}, 8),
        (paths(["train_224", "test", "train_512"]), "and train_512 of", {"split_values": ("train_512=drop",)}, 8),
        (paths(["train", "train_512", "test"]), "in two versions", {"split_values": ("train_512=train",)}, 12),
        (paths(["Training", "train", "test"]), "train and Training", {"split_values": ("Training=drop",)}, 8),
        (paths(["train", "train_aug", "test"]), "train_aug", {"split_values": ("train_aug=drop",)}, 8),
        ([*BOTH, "masks/glioma/0.png"], "masks next to the split", {"split_values": ("masks=drop",)}, 8),
        ([*BOTH, "a b/0.png"], "--data.split-values 'a b=drop'", {"split_values": ("a b=drop",)}, 8),
        ([*BOTH, "Val/"], "'Val' .* has no images", {"split_values": ("Val=drop",)}, 8),
        ([*BOTH, "Val/glioma/"], "'Val' .* has no images", {"split_values": ("Val=drop",)}, 8),
        ([*paths(["train"]), "test/0.jpg"], "'test' .* no class folders", {"split_values": ("test=drop",)}, 4),
        ([*paths(["train"]), "unlabeled/0.jpg"], "looks like a split", {"split_values": ("unlabeled=drop",)}, 4),
        (paths(["train", "val"]), "none for test", {"split_values": ("val=test",)}, 8),
        (paths(["train", "val"]), "none for test", {"split_folders": "ignore"}, 8),
        (paths(["val", "test"]), "none for train", {"split_values": ("val=train",)}, 8),
        (paths(["train", "eval"]), "'eval' .* could be", {"split_values": ("eval=test",)}, 8),
        (paths(["dev", "test"]), "'dev' .* could be", {"split_values": ("dev=train",)}, 8),
        ([*BOTH, "Testing/extra/0.jpg"], "'extra' .* Testing, but none in Training", {"split_folders": "ignore"}, 9),
        ([*BOTH, "Training/extra/0.jpg"], "'extra' .* Training, but none in Testing", {"split_folders": "ignore"}, 9),
        (["train/0.jpg", "test/0.jpg"], "look like splits", {"classes": ("test", "train")}, 2),
        (["xray_train/0.jpg", "xray_test/0.jpg"], "look like splits", {"classes": ("xray_test", "xray_train")}, 2),
        (ZOOMED, "if the outer ones are, name them with --data.classes a b", {"classes": ("a", "b")}, 8),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_is_refused_names_a_remedy_that_works(tmp_path, names, message, remedy, left):
    assert re.search(message, refusal(tmp_path, names))
    assert len(read(tmp_path, names, **remedy).rows) == left


@pytest.mark.parametrize(
    "folders",
    [
        ["train_v1", "train_v2", "test"],
        ["train_fold1", "train_fold2", "test_fold1"],
        ["train (1)", "train", "test"],
        ["224_train", "512_train", "224_test"],
        ["train_1x", "train_2x", "test"],
        ["train-2019", "train-2020", "test-2020"],
        ["trainset", "train", "test"],
        ["train_val", "train", "val", "test"],
        ["train", "test_1", "test_3"],
        ["train_1_224", "train_1_512", "test"],
    ],
    ids=" ".join,
)
def test_possible_copies_of_a_split_are_refused_until_explained(tmp_path, folders):
    message = refusal(tmp_path, paths(folders))
    assert "may be the same images" in message
    (typed,) = re.findall(r"--data\.split-values (.*), or read all", message)
    options = tuple(shlex.split(typed))
    kept = read(tmp_path, paths(folders), split_values=options)
    assert len(kept.rows) == 4 * (len(folders) - 1)
    both = tuple(option.replace("drop", split_word(option.partition("=")[0])[0]) for option in options)
    assert len(read(tmp_path, paths(folders), split_values=both).rows) == 4 * len(folders)


def test_numbered_or_class_disjoint_folders_of_a_split_are_read(tmp_path):
    parts = ["train_part0", "train_part1", "train_part2", "test"]
    assert len(read(tmp_path, paths(parts)).rows) == 16
    inside = [f"{c}/{split}/0.jpg" for c, split in (("a", "train"), ("a", "test"), ("b", "Train"), ("b", "Test"))]
    assert len(open_source(config(make(tmp_path / "inside", inside))).rows) == 4


def test_split_folders_differing_in_case_need_each_a_name(tmp_path):
    names = paths(["Train", "train", "test"])
    assert "Train=train train=drop" in refusal(tmp_path, names)
    images = read(tmp_path, names, split_values=("Train=train", "train=drop"))
    assert {row.where.partition("/")[0] for row in images.rows} == {"Train", "test"}
    assert len(read(tmp_path, names, split_values=("Train=train", "train=train")).rows) == 12


def test_images_and_masks_with_equal_splits_are_read_separately(tmp_path):
    message = refusal(
        tmp_path, [*paths(["train", "test"], before="images/"), *paths(["train", "test"], before="masks/")]
    )
    (source,) = re.findall(r"--data\.source (\S+)\)", message)
    assert found(open_source(config(source))) == {(c, s): 2 for c in ("glioma", "normal") for s in (TRAIN, TEST)}


def test_two_sets_beside_each_other_are_not_two_classes(tmp_path):
    names = [*paths(["CT/train", "CT/test"], "a b"), *paths(["MR/train", "MR/test"], "c d")]
    assert "set/CT)" in refusal(tmp_path, names)
    assert open_source(config(tmp_path / "set/MR")).classes == ("c", "d")


def test_a_dicom_patient_in_both_official_splits_is_refused(tmp_path):
    for split in ("Training", "Testing"):
        for i, name in enumerate(["benign", "malignant"] * 12):
            patient = f"{split} {i}" if i else "Doe"
            path = tmp_path / "set" / split / name / f"{i}.dcm"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(dicom_file(np.zeros((8, 8), np.uint8), PatientID=patient))
    options = {"num_classes": 2, "val_fraction": 0.15, "test_fraction": 0.2, "seed": 0}
    with pytest.raises(LeakError, match=r"'patient Doe' is in the splits .*--data\.split-column -"):
        assign_splits(open_source(config(tmp_path / "set")).rows, **options)
    rows = open_source(config(tmp_path / "set", split_column="-")).rows
    homes = {(row.group, split) for row, split in zip(rows, assign_splits(rows, **options), strict=True)}
    assert len(homes) == len({group for group, _ in homes}) == 47


def test_a_value_for_a_folder_that_is_not_there_is_named(tmp_path):
    assert "'Tset=drop'" in refusal(tmp_path, BOTH, split_values=("Tset=drop",))


def test_an_empty_class_folder_of_one_split_is_named(tmp_path):
    names = [*BOTH, "Testing/pituitary/", "Training/pituitary/0.jpg"]
    assert "class folder 'pituitary' in Testing" in refusal(tmp_path, names)


def test_a_class_named_otherwise_in_the_other_split_is_named(tmp_path):
    message = refusal(tmp_path, [*paths(["Training"], "glioma no_tumor"), *paths(["Testing"], "glioma notumor")])
    assert "'no_tumor'" in message
    assert "notumor=no_tumor" in message


# ----------------------------------------------------------------------------------------------------- names of classes


@pytest.mark.parametrize("other", ["benign", "BENIGN", "Be  nign", "Be nign"])
def test_folders_differing_in_case_or_spaces_are_refused(tmp_path, other):
    names = paths(["Benign" if other.isalpha() else "Be_nign", other, "malignant"], "x")
    first = names[0].partition("/")[0]
    message = refusal(tmp_path, names)
    assert "--data.class-map" in message
    assert repr(first) in message
    assert repr(other) in message
    assert read(tmp_path, names, classes=(first, other, "malignant")).classes == (first, other, "malignant")


ALIKE = {
    "Benign\u0430"[:5] + "\u0430": "CYRILLIC SMALL LETTER A",  # Benigа beside Beniga
    "\uff22eniga": "FULLWIDTH LATIN CAPITAL LETTER B",
    "\u0392eniga": "GREEK CAPITAL LETTER BETA",
    "Beni\u200bga": "u200b",
    "beniga.": "'beniga.'",
    "Beniga_": "'Beniga_'",
    "Beniga . ": "'Beniga .'",
}


@pytest.mark.parametrize(("other", "told"), ALIKE.items(), ids=map(ascii, ALIKE))
def test_look_alike_folders_are_refused_until_joined_or_named(tmp_path, other, told):
    names = paths(["Beniga", other, "malignant"], "x")
    message = refusal(tmp_path, names)
    assert told in message
    assert "look alike" in message
    name = other.strip()
    assert read(tmp_path, names, class_map=(f"{name}=Beniga",)).classes == ("Beniga", "malignant")
    assert f"--data.class-map {shlex.quote(f'{name}=Beniga')}" in message
    assert len(read(tmp_path, names, classes=("Beniga", name, "malignant")).classes) == 3


def test_folders_equal_as_numbers_are_refused_and_others_not(tmp_path):
    assert "number format" in refusal(tmp_path, paths(["1", "1.0", "2"], "x"))
    for each in (["1", "10", "1.5"], ["IFN-\u03b1", "IFN-\u03b2"], ["HER2-", "HER2+", "HER2"], ["5\u03bcm", "5mm"]):
        assert len(open_source(config(make(tmp_path / each[0], paths(each, "x")))).classes) == len(each)


def test_a_folder_resembling_a_named_class_is_reported(tmp_path):
    message = refusal(tmp_path, paths(["Benig\u043f\u0430"[:5] + "\u0430", "b"], "x"), classes=("Beniga", "b"))
    assert "CYRILLIC SMALL LETTER A" in message
    assert "if it means 'Beniga', use --data.class-map" in message


def test_folders_differing_in_case_between_splits_are_refused(tmp_path):
    message = refusal(tmp_path, [*paths(["Training"], "Glioma normal"), *paths(["Testing"], "glioma normal")])
    assert "'Glioma', 'glioma'" in message


def test_spaces_around_a_folders_name_are_no_part_of_the_class(tmp_path):
    names = [
        *paths(["Training"], "glioma normal"),
        *(f"Testing/{c}/{i}.jpg" for c in ("glioma ", "normal") for i in "01"),
    ]
    images = read(tmp_path, names)
    assert found(images) == {(c, s): 2 for c in ("glioma", "normal") for s in (TRAIN, TEST)}
    assert any("'glioma' and 'glioma '" in note for note in images.notes)
    assert read(tmp_path, [], classes=("normal", "glioma")).classes == ("normal", "glioma")


def test_a_name_in_two_unicode_forms_is_one_class_and_reported(tmp_path):
    names = [*paths(["Training"], "Me\u0301ningiome b"), *paths(["Testing"], "M\u00e9ningiome b")]
    images = read(tmp_path, names)
    assert found(images) == {(c, s): 2 for c in ("M\u00e9ningiome", "b") for s in (TRAIN, TEST)}
    assert any("Unicode encoding of an accent" in note for note in images.notes)
    assert {row.where for row in images.rows} == set(names)


def test_a_class_named_in_one_unicode_form_is_found_in_the_other(tmp_path):
    images = read(tmp_path, paths(["Me\u0301", "b"], "x"), classes=("b", "M\u00e9"))
    assert found(images) == {("b", DRAWN): 2, ("M\u00e9", DRAWN): 2}


def test_settings_of_a_set_read_before_keep_their_digest():
    before = "a78389d4dcc45042"
    assert config_digest(config("/anywhere")).startswith(before)
    assert config_digest(config("/anywhere", split_folders="ignore")) != config_digest(config("/anywhere"))


# ------------------------------------------------------------------------------------- with classes left out or renamed


def test_classes_of_one_split_can_be_left_out_or_renamed(tmp_path):
    names = [*paths(["Training"], "glioma no_tumor"), *paths(["Testing"], "glioma notumor")]
    assert "--data.class-map notumor=no_tumor" in refusal(tmp_path, names)
    images = read(tmp_path, names, class_map=("notumor=no_tumor",))
    assert found(images) == {(c, s): 2 for c in ("glioma", "no_tumor") for s in (TRAIN, TEST)}
    fewer = read(tmp_path, [*names, "Testing/notumor/extra.jpg"], drop_classes=("no_tumor", "notumor"))
    assert found(fewer) == {("glioma", s): 2 for s in (TRAIN, TEST)}


@pytest.mark.parametrize("other", ["benign", "BENIGN", "Beni gn"])
def test_folders_differing_in_case_become_one_class_as_told(tmp_path, other):
    names = paths(["Benign" if other.isalpha() else "Beni_gn", other, "malignant"], "x")
    (option,) = re.findall(r"--data\.class-map (.*?) or rename", refusal(tmp_path, names))
    images = read(tmp_path, names, class_map=tuple(shlex.split(option)))
    assert sorted(found(images).values()) == [2, 4]


def test_a_named_class_made_by_renaming_settles_the_folders(tmp_path):
    names = paths(["Benign tumor", "Malignant tumor"], "40X 100X")
    mapped = {"class_map": ("Benign tumor=benign", "Malignant tumor=malignant"), "classes": ("malignant", "benign")}
    assert found(read(tmp_path, names, **mapped)) == {("benign", DRAWN): 4, ("malignant", DRAWN): 4}


def test_groups_come_from_paths_inside_of_split_folders(tmp_path):
    rows = read(tmp_path, paths(["Training", "Testing"]), group_pattern=r"(\w+)/\w+/\d").rows
    assert {row.group for row in rows} == {"Training", "Testing"}


def make_images(folder):
    """Training and Testing of two classes, 20 real JPEGs in each."""
    for i, name in enumerate(paths(["Training", "Testing"], num=20)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(coded(pixels(i), "JPEG"))


def test_a_finished_set_whose_split_folders_were_classes_stays(tmp_path, caplog):
    make_images(tmp_path / "set")
    store = open_store(str(tmp_path / "store"))
    once = convert(config(tmp_path / "set", classes=("Testing", "Training")), store)
    settings = json.loads(store.get("config.json"))
    store.put("config.json", json.dumps({key: settings[key] for key in settings if key not in NEW_KEYS}).encode())
    caplog.clear()
    again = convert(config(tmp_path / "set", classes=("Testing", "Training")), store)
    assert (again["digest"], again["made"], again["splits_from"]) == (once["digest"], 0, "")
    assert "stays valid" in caplog.text
    assert "folders named after splits (train, test, ...) are splits, not classes" in caplog.text


def test_the_dataset_says_where_its_splits_come_from(tmp_path):
    make_images(tmp_path / "set")
    store = open_store(str(tmp_path / "store"))
    told = "train and test from the folders Training and Testing; val drawn from train"
    first = convert(config(tmp_path / "set"), store)
    assert (first["splits_from"], first["samples"]) == (told, {"train": 34, "val": 6, "test": 40})
    assert convert(config(tmp_path / "set"), store)["splits_from"] == told


@pytest.mark.parametrize("num", [12, 30])
def test_patient_folders_with_class_folders_are_not_classes(tmp_path, num):
    names = [f"p{i:02}/{label}/{i}.jpg" for i in range(num) for label in "01" if (i, label) != (3, "1")]
    assert "like patient folders" in refusal(tmp_path, names)
    one_each = [f"p{i:02}/{('benign', 'malignant')[i % 2]}/{i}.jpg" for i in range(num)]
    assert "benign and malignant" in refusal(tmp_path / "one", one_each)
    classes = tuple(f"p{i:02}" for i in range(num))
    assert len(read(tmp_path, names, classes=classes).classes) == num


def test_classes_with_folders_of_their_own_patients_are_classes(tmp_path):
    names = [f"{label}/{label}{i}/1.jpg" for label in ("a", "b", "c") for i in range(4)]
    assert read(tmp_path, names).classes == ("a", "b", "c")


def test_a_class_folder_whose_name_is_not_utf_8_is_named(tmp_path):
    for name in (b"b\xe9nin", b"malin"):
        folder = os.path.join(os.fsencode(tmp_path / "set"), name)
        os.makedirs(folder)
        for i in range(3):
            with open(os.path.join(folder, b"%d.png" % i), "wb") as file:
                file.write(b"x")
    with pytest.raises(ValueError, match=r"b\\udce9nin.*not UTF-8.*rename"):
        open_source(DataConfig(dataset="d", layout="folders", source=str(tmp_path / "set")))
