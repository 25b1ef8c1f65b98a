"""Every set of the paper, in an imitation of its published form, opened by its card alone."""

import csv
import io
import posixpath
from collections import Counter

import pytest
from original_layouts import (
    FETAL_COLUMNS,
    RGB_MEDMNIST,
    class_folders,
    cpn_x_ray,
    fetal_planes_db,
    imitation,
    medmnist,
    pad_ufes_20,
    write,
    xlsx,
    xlsx_by_excel,
    zip_of,
)

from data_shards import catalog
from data_shards.config import DataConfig
from data_shards.convert import convert
from data_shards.decode import decode
from data_shards.source import open_source
from data_shards.split import LeakError, assign_splits
from data_shards.store import open_store

PUBLISHED = [name for name in catalog.names() if name != "phantoms"]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def by_card(name, source, **fields):
    return open_source(DataConfig(dataset=name, source=str(source), **fields))


def splits_of(images, **options):
    options = {"val_fraction": 0.15, "test_fraction": 0.2, "seed": 0, **options}
    return assign_splits(images.rows, num_classes=len(images.classes), classes=images.classes, **options)


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_published_set_is_opened_by_its_card_alone(name, tmp_path):
    made = imitation(name, tmp_path)
    images = by_card(name, made.source)
    card = catalog.card(name)
    assert (images.classes, images.task) == (card.classes, card.task)
    assert Counter(images.classes[label] for row in images.rows for label in row.labels) == made.counts
    assert {posixpath.basename(row.where): row.group for row in images.rows if row.group} == made.groups
    splits = splits_of(images)
    assert set(splits) == {"train", "val", "test"}
    if card.split_policy == "official":
        assert [row.split for row in images.rows] == splits
    if card.split_policy == "official test":
        found = {posixpath.basename(row.where): split for row, split in zip(images.rows, splits, strict=True)}
        assert {n: split.replace("val", "train") for n, split in found.items()} == made.splits
    homes = {(row.group, split) for row, split in zip(images.rows, splits, strict=True) if row.group}
    assert len(homes) == len({group for group, _ in homes})
    assert {decode(images.reader.read(row)).shape[2] for row in images.rows} <= {1, 3}


@pytest.mark.parametrize("name", ["kvasir", "pad-ufes-20", "fetal-planes-db", "cpn-x-ray", "otoscopy2024"])
def test_an_imitation_becomes_shards_with_nothing_set_aside(name, tmp_path):
    made = imitation(name, tmp_path)
    facts = convert(DataConfig(dataset=name, source=str(made.source)), open_store(str(tmp_path / "store")))
    assert (facts["num_images"], facts["quarantine"]) == (sum(made.counts.values()), 0)


@pytest.mark.parametrize("side", [28, 64, 128, 224])
@pytest.mark.parametrize("name", ["retinamnist", "breastmnist"])
def test_medmnist_files_of_every_size_are_read(name, side, tmp_path):
    images = by_card(name, medmnist(name, tmp_path, side=side).source)
    shape = (side, side, *((3,) if name in RGB_MEDMNIST else ()))
    assert {images.reader.read(row).shape for row in images.rows} == {shape}


def test_a_set_zipped_fetched_or_unpacked_has_the_same_rows(tmp_path):
    zipped, fetched, unpacked = (
        by_card("pad-ufes-20", pad_ufes_20(tmp_path / str(i), form).source)
        for i, form in enumerate(("one zip", "single files", "unpacked"))
        if not (tmp_path / str(i)).mkdir()
    )
    assert zipped.rows == fetched.rows == unpacked.rows
    assert zipped.rows[0].where.startswith("images/imgs_part_1/PAT_")
    for rows in zip(zipped.rows, fetched.rows, unpacked.rows, strict=True):
        assert len({each.reader.read(row) for each, row in zip((zipped, fetched, unpacked), rows, strict=True)}) == 1


def test_unpacking_a_zip_beside_itself_changes_nothing(tmp_path):
    source = pad_ufes_20(tmp_path, "single files").source
    rows = by_card("pad-ufes-20", source).rows
    (tmp_path / "again").mkdir()
    pad_ufes_20(tmp_path / "again", "unpacked")
    (tmp_path / "again" / "pad-ufes-20" / "images").rename(tmp_path / "images")
    for part in (tmp_path / "images").iterdir():
        part.rename(source / "images" / part.name)
    assert by_card("pad-ufes-20", source).rows == rows


def part_of_pad(folder, *, without):
    """PAD-UFES-20 with its own table, of which the images of a class and some others have not been fetched."""
    made = pad_ufes_20(folder, "unpacked")
    table = csv.DictReader(io.StringIO((made.source / "metadata.csv").read_text()))
    for number, row in enumerate(table):
        if row["diagnostic"] == without or number % 7 == 0:
            next(made.source.rglob(row["img_id"])).unlink()
    return made.source


def test_a_part_of_pad_becomes_shards_with_its_own_classes(tmp_path, caplog):
    source = part_of_pad(tmp_path, without="ACK")
    config = DataConfig(dataset="pad-ufes-20", source=str(source), rows_without_file="drop")
    with pytest.raises(ValueError, match="name an image that is not there"):
        open_source(config.model_copy(update={"rows_without_file": "refuse"}))
    facts = convert(config, open_store(str(tmp_path / "store")))
    assert set(facts["counts"]["test"]) == {"BCC", "NEV", "SEK", "SCC", "MEL"}
    assert facts["num_images"] == len(list(source.rglob("*.png")))
    assert "no image is left of ACK" in caplog.text
    assert "rows of metadata.csv name an image that is not there" in caplog.text


def test_classes_of_pad_are_joined_left_out_and_named(tmp_path):
    source = pad_ufes_20(tmp_path, "unpacked").source
    malignant = ("BCC=malignant", "SCC=malignant", "MEL=malignant")
    images = by_card("pad-ufes-20", source, class_map=malignant, drop_classes=("SEK",))
    assert images.classes == ("malignant", "ACK", "NEV")
    with pytest.raises(ValueError, match=r"class 'ACK' is missing .* --data\.drop-classes ACK"):
        convert(
            DataConfig(
                dataset="pad-ufes-20", source=str(part_of_pad(tmp_path / "part", without="ACK")),
                rows_without_file="drop", classes=("BCC", "ACK", "NEV", "SEK", "SCC", "MEL"),
            ),
            open_store(str(tmp_path / "store")),
        )  # fmt: skip


def test_a_group_pattern_replaces_the_published_group_column(tmp_path):
    images = by_card("pad-ufes-20", pad_ufes_20(tmp_path, "unpacked").source, group_pattern=r"PAT_15(\d+)_")
    assert {row.group for row in images.rows} == {f"{i:02d}" for i in range(30)}


def test_the_fetal_table_is_read_from_excel_too(tmp_path):
    made = fetal_planes_db(tmp_path)
    from_csv = by_card("fetal-planes-db", made.source)
    from_excel = by_card("fetal-planes-db", made.source, table="FETAL_PLANES_DB_data.xlsx")
    assert from_excel.rows == from_csv.rows
    assert [row.group for row in from_excel.rows[:3]] == ["1", "1", "2"]


def test_the_official_fetal_test_stays_and_val_is_by_patient(tmp_path):
    images = by_card("fetal-planes-db", fetal_planes_db(tmp_path).source)
    drawn = [splits_of(images, seed=seed) for seed in (0, 1)]
    tests = [[i for i, split in enumerate(splits) if split == "test"] for splits in drawn]
    assert tests[0] == tests[1] == [i for i, row in enumerate(images.rows) if row.split == "test"]
    assert drawn[0] != drawn[1]
    assert Counter(drawn[0])["val"] == pytest.approx(0.15 * 48, abs=4)


def test_all_splits_are_by_patient_if_the_column_is_declined(tmp_path):
    images = by_card("fetal-planes-db", fetal_planes_db(tmp_path).source, split_column="-")
    assert {row.split for row in images.rows} == {None}
    assert set(splits_of(images)) == {"train", "val", "test"}


def test_a_patient_in_the_official_train_and_test_is_named(tmp_path):
    rows = [("a", 1, "x", 1), ("b", 1, "x", 0), *((f"c{i}", 10 + i, "xy"[i % 2], i % 4 // 2) for i in range(16))]
    table = xlsx([("file", "patient", "label", "Train"), *rows])
    write(tmp_path, {"t.xlsx": table} | {f"{row[0]}.png": b"" for row in rows})
    images = open_source(
        DataConfig(
            dataset="mine", layout="table", source=str(tmp_path), group_column="patient", split_column="Train",
            split_values=("1=train", "0=test"),
        )
    )  # fmt: skip
    with pytest.raises(LeakError, match="group '1' is in the splits"):
        splits_of(images)


def test_cervical_patients_come_from_the_users_own_table(tmp_path):
    source = class_folders("cervical-us", tmp_path).source
    files = sorted(path for path in source.rglob("*.*") if path.suffix.lower() == ".png" and path.stat().st_size)
    lines = ["file,label,patient"] + [f"{f.relative_to(source)},{f.parent.name},p{i // 2}" for i, f in enumerate(files)]
    (source / "patients.csv").write_text("\n".join(lines))
    images = by_card("cervical-us", source, layout="table", group_column="patient")
    assert images.classes == catalog.card("cervical-us").classes
    assert {row.group for row in images.rows} == {f"p{i // 2}" for i in range(len(files))}


# --- tables that are not quite


TABLE = [("file", "label"), ("a.png", "x"), ("b.png", "y"), ("gone.png", "x")]


def own(folder, **fields):
    return open_source(DataConfig(**{"dataset": "mine", "layout": "table", "source": str(folder), **fields}))


def test_rows_without_a_file_are_refused_or_dropped_if_allowed(tmp_path):
    write(tmp_path, {"t.xlsx": xlsx(TABLE), "a.png": b"", "b.png": b"", "c.png": b""})
    with pytest.raises(ValueError, match=r"1 of 3 rows .*'gone.png' in line 4 of t.xlsx.*rows-without-file drop"):
        own(tmp_path)
    images = own(tmp_path, rows_without_file="drop")
    assert [row.where for row in images.rows] == ["a.png", "b.png"]
    assert "1 of 3 rows" in images.notes[0]
    assert images.notes[0].endswith("dropped")
    assert images.notes[1] == "1 files have no row in t.xlsx and are left out: c.png"


def test_a_table_none_of_whose_files_is_there_is_refused_even_so(tmp_path):
    write(tmp_path, {"t.xlsx": xlsx(TABLE), "c.png": b""})
    with pytest.raises(ValueError, match="3 of 3 rows"):
        own(tmp_path, rows_without_file="drop")


def test_names_may_differ_from_files_in_case_and_accent_coding(tmp_path):
    rows = [("file", "label"), ("A.png", "x"), ("Fußgänger", "y")]
    write(tmp_path, {"t.xlsx": xlsx(rows), "img/a.PNG": b"", "img/Fußga\u0308nger.jpg": b""})
    assert [row.where for row in own(tmp_path).rows] == ["img/Fußga\u0308nger.jpg", "img/a.PNG"]


def test_an_exact_name_is_preferred_to_one_in_another_case(tmp_path):
    write(tmp_path, {"t.xlsx": xlsx(TABLE[:3]), "1/a.png": b"", "2/A.png": b"", "b.png": b""})
    assert [row.where for row in own(tmp_path).rows] == ["1/a.png", "b.png"]


def test_cells_of_excel_are_read_as_a_csv_would_say_them(tmp_path):
    rows = [
        ("file", "label", "patient", None, None),
        ("a.png", 1, 7.0, None, None),
        (None, None, None, None, None),
        ("b.png", 2.0, " p8 ", None, " "),
        ("c.png", 2, True),
        (None,),
    ]
    write(tmp_path, {"t.XLSX": xlsx(rows)} | {f"{n}.png": b"" for n in "abc"})
    images = own(tmp_path, group_column="patient")
    assert images.classes == ("1", "2")
    assert [row.group for row in images.rows] == ["7", "p8", "True"]
    assert own(tmp_path / "t.XLSX", group_column="patient").rows == images.rows


def test_a_workbook_as_excel_writes_it_is_read(tmp_path):
    write(tmp_path, {"t.xlsx": xlsx_by_excel(), "a.png": b"", "b.png": b""})
    images = own(tmp_path, group_column="patient")
    assert images.classes == ("x", "y")
    assert [(row.where, row.labels, row.group) for row in images.rows] == [
        ("a.png", (0,), "7"),
        ("b.png", (1,), "True"),
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no workbook", r"t\.xlsx cannot be read as XLSX"),
        (zip_of({"a": b"b"}), "cannot be read as XLSX"),
        (xlsx(TABLE)[:-40], "cannot be read as XLSX"),
        (xlsx([("file", "label")]), "has no rows"),
        (xlsx([("file", "label"), ("a.png", "x", "beyond")]), "line 2 of t.xlsx has 3 cells for 2"),
        (xlsx([("file", "label", "label"), ("a.png", "x", "y")]), "has 2 columns 'label'"),
    ],
)
def test_a_workbook_that_is_none_is_named_in_one_line(tmp_path, data, message):
    write(tmp_path, {"t.xlsx": data, "a.png": b""})
    with pytest.raises(ValueError, match=message) as caught:
        own(tmp_path)
    assert "\n" not in str(caught.value)


def test_empty_lines_of_a_csv_saved_by_excel_are_none(tmp_path):
    write(tmp_path, {"t.csv": b"file;label\r\na.png;x\r\n;\r\nb.png;y\r\n;\r\n", "a.png": b"", "b.png": b""})
    assert len(own(tmp_path).rows) == 2


def test_an_unexplained_split_word_is_named_with_its_remedy(tmp_path):
    write(tmp_path, {"t.csv": b"file,label,Train\na.png,x,1\n", "a.png": b""})
    said = r"split '1' in line 2 of t.csv is unknown: .* --data.split-values 1=\.\.\. \(train, val or test"
    with pytest.raises(ValueError, match=said):
        own(tmp_path, split_column="Train")


def test_the_blank_after_a_column_name_is_none():
    assert FETAL_COLUMNS[-1] != catalog.card("fetal-planes-db").split_column == FETAL_COLUMNS[-1].strip()


def test_a_class_folder_with_an_inner_zip_counts_what_it_holds(tmp_path):
    made = cpn_x_ray(tmp_path)
    images = by_card("cpn-x-ray", made.source)
    assert images.rows[0].where == "COVID/COVID (1).png"
    assert len(images.rows) == sum(made.counts.values())
