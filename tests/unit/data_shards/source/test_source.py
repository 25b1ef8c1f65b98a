"""Sources: npz, folders, CSV from a folder, a tar or S3, phantoms; and every fault of theirs, named in one line."""

import io
import tarfile
import zipfile
from collections import Counter

import boto3
import numpy as np
import pytest
from original_layouts import zip_of
from PIL import Image

from data_shards.config import DataConfig, PhantomConfig
from data_shards.decode import UndecodableImage, decode
from data_shards.source import check_source, open_source
from data_shards.split import LeakError, assign_splits
from data_shards.store import open_store


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def png(value):
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(folder)


def tar_of(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def splits_of(image_set, **options):
    options = {"val_fraction": 0.15, "test_fraction": 0.2, "seed": 0, **options}
    return assign_splits(image_set.rows, num_classes=len(image_set.classes), classes=image_set.classes, **options)


def config(source="", **fields):
    return DataConfig(**{"dataset": "mine", "source": str(source), **fields})


# --- real sets


@pytest.mark.parametrize(("name", "counts"), [("breastmnist", (546, 78, 156)), ("pneumoniamnist", (4708, 524, 624))])
def test_a_medmnist_file_keeps_its_official_splits_and_pixels(shared_dir, name, counts):
    path = shared_dir / "data" / f"{name}.npz"
    images = open_source(DataConfig(dataset=name, source=str(path)))
    assert (len(images.classes), images.task) == (2, "multiclass")
    assert tuple(Counter(row.split for row in images.rows)[s] for s in ("train", "val", "test")) == counts
    assert splits_of(images) == [row.split for row in images.rows]
    with np.load(path) as arrays:
        row = images.rows[-1]
        assert row.where == f"test_images/{counts[2] - 1}"
        assert np.array_equal(images.reader.read(row), arrays["test_images"][-1])
        assert row.labels == tuple(arrays["test_labels"][-1].tolist())


CELLS = {"dataset": "bccd", "layout": "table", "group_column": "smear"}


def test_blood_cells_come_from_their_tar_with_smears_as_groups(shared_dir):
    path = shared_dir / "data" / "bccd_cells.tar"
    images = open_source(DataConfig(source=str(path), **CELLS))
    assert images.classes == ("platelets", "rbc", "wbc")
    assert Counter(images.classes[row.labels[0]] for row in images.rows) == {"rbc": 1392, "wbc": 372, "platelets": 361}
    assert len({row.group for row in images.rows}) == 364
    with tarfile.open(path) as tar:
        for row in images.rows[::200]:
            assert images.reader.read(row) == tar.extractfile(f"bccd_cells/{row.where}").read()
    splits = splits_of(images)
    smears = {s: {row.group for row, home in zip(images.rows, splits, strict=True) if home == s} for s in set(splits)}
    assert not smears["train"] & smears["test"]
    assert not smears["val"] & (smears["train"] | smears["test"])
    test_share = Counter(row.labels[0] for row, home in zip(images.rows, splits, strict=True) if home == "test")
    assert [test_share[i] for i in range(3)] == [pytest.approx(n * 0.2, rel=0.1) for n in (361, 1392, 372)]


def test_blood_cells_are_the_same_rows_from_tar_folder_and_csv(shared_dir, tmp_path):
    path = shared_dir / "data" / "bccd_cells.tar"
    with tarfile.open(path) as tar:
        tar.extractall(tmp_path, filter="data")
    rows = open_source(DataConfig(source=str(path), **CELLS)).rows
    for source in (tmp_path, tmp_path / "bccd_cells", tmp_path / "bccd_cells" / "cells.csv"):
        images = open_source(DataConfig(source=str(source), **CELLS))
        assert images.rows == rows
        assert decode(images.reader.read(rows[0])).shape[2] == 3
    folders = open_source(DataConfig(dataset="bccd", layout="folders", source=str(path)))
    assert [row.where for row in folders.rows] == [row.where for row in rows]


def test_phantoms_are_drawn_by_row_and_split_by_patient():
    images = open_source(DataConfig(phantoms=PhantomConfig(num_patients=30)))
    assert len(images.rows) == 120
    assert images.reader.read(images.rows[7]).shape == (64, 64)
    assert not np.array_equal(images.reader.read(images.rows[0]), images.reader.read(images.rows[1]))
    homes = {}
    for row, split in zip(images.rows, splits_of(images), strict=True):
        assert homes.setdefault(row.group, split) == split


# --- small sets of our own


FOLDERS = {f"{c}/{c} ({i}).png": png(i) for c in ("benign", "malignant") for i in range(8)}
CSV = "file,label,patient,part\r\n" + "".join(
    f"{name},{name.split('/')[0]},p{i},{('train', 'train', 'val', 'test')[i % 4]}\r\n" for i, name in enumerate(FOLDERS)
)
TABLE = {"layout": "table", "group_column": "patient"}


def test_class_folders_leave_out_what_only_looks_like_a_class(tmp_path):
    litter = {".ipynb_checkpoints/a.png": b"", "__MACOSX/benign/._a.png": b"", "benign/.DS_Store": b"", "README": b""}
    images = open_source(config(write(tmp_path, FOLDERS | litter), layout="folders"))
    assert images.classes == ("benign", "malignant")
    assert [row.where for row in images.rows] == sorted(FOLDERS)
    assert images.reader.read(images.rows[3]) == FOLDERS["benign/benign (3).png"]


def test_a_tar_and_a_wrapping_folder_give_the_same_rows(tmp_path):
    plain = open_source(config(write(tmp_path / "a", FOLDERS), layout="folders"))
    inner = {f"./set/{name}": data for name, data in FOLDERS.items()}
    write(tmp_path, {"b.tar": tar_of(inner)})
    wrapped = open_source(config(tmp_path / "b.tar", layout="folders"))
    assert wrapped.rows == plain.rows
    assert wrapped.reader.read(wrapped.rows[0]) == plain.reader.read(plain.rows[0])


def test_sources_on_s3_give_the_same_rows(tmp_path, s3, shared_dir):
    local = write(tmp_path / "a", FOLDERS | {"table.csv": CSV})
    for name, data in (FOLDERS | {"table.csv": CSV.encode()}).items():
        open_store(s3).put(f"set/{name}", data)
    open_store(s3).put("set.tar", tar_of(FOLDERS))
    open_store(s3).put("set.zip", zip_of(FOLDERS))
    open_store(s3).put("parts/a.zip", zip_of(FOLDERS))
    open_store(s3).put("b.npz", shared_dir / "data" / "breastmnist.npz")
    for layout in ("folders", "table"):
        there = open_source(config(f"{s3}/set", layout=layout))
        here = open_source(config(local, layout=layout))
        assert there.rows == here.rows
        assert there.reader.read(there.rows[2]) == here.reader.read(here.rows[2])
    assert open_source(config(f"{s3}/set/table.csv", layout="table")).rows == here.rows
    for source in ("set.tar", "set.zip", "parts"):
        there = open_source(config(f"{s3}/{source}", layout="folders"))
        assert there.rows == open_source(config(local, layout="folders")).rows
        assert there.reader.read(there.rows[2]) == FOLDERS[there.rows[2].where]
    assert len(open_source(DataConfig(dataset="breastmnist", source=f"{s3}/b.npz")).rows) == 780


def test_a_split_column_is_kept(tmp_path):
    images = open_source(config(write(tmp_path, FOLDERS | {"t.csv": CSV}), **TABLE, split_column="part"))
    assert Counter(splits_of(images)) == {"train": 8, "val": 4, "test": 4}


def test_semicolons_and_bare_names_in_subfolders_are_understood(tmp_path):
    table = "Image_name;Plane;Patient_num\n" + "".join(
        f"x{i};{('Other', 'Fetal brain')[i % 2]};{i // 2}\n" for i in range(8)
    )
    write(tmp_path, {f"Images/x{i}.png": png(i) for i in range(8)} | {"FETAL_PLANES_DB_data.csv": table})
    card = {"dataset": "fetal-planes-db", "classes": ("Fetal brain", "Other"), "split_column": "-"}
    images = open_source(DataConfig(source=str(tmp_path), **card))
    assert [(r.where, r.labels, r.group) for r in images.rows][:2] == [
        ("Images/x0.png", (1,), "0"),
        ("Images/x1.png", (0,), "0"),
    ]


def test_several_labels_in_one_cell(tmp_path):
    table = "file,label\na.png,edema|mass\nb.png,\nc.png,mass\n"
    write(tmp_path, {f"{n}.png": png(1) for n in "abc"} | {"t.csv": table})
    images = open_source(config(tmp_path, layout="table", task="multilabel"))
    assert images.classes == ("edema", "mass")
    assert [row.labels for row in images.rows] == [(0, 1), (), (1,)]


# --- faults


def npz(path, drop=(), compressed=True, **changed):
    arrays = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = np.zeros((4, 8, 8), np.uint8)
        arrays[f"{split}_labels"] = np.array([[0], [1], [0], [1]], np.uint8)
    arrays = {k: v for k, v in (arrays | changed).items() if k not in drop}
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


def test_labels_may_be_flat_and_arrays_uncompressed(tmp_path):
    flat = np.array([0, 1, 0, 1])
    images = open_source(config(npz(tmp_path / "a.npz", compressed=False, train_labels=flat), layout="npz"))
    assert images.classes == ("0", "1")
    assert [row.labels for row in images.rows[:4]] == [(0,), (1,), (0,), (1,)]


def test_a_replaced_npz_is_read_anew(tmp_path):
    path = npz(tmp_path / "a.npz")
    open_source(config(path, layout="npz"))
    npz(path, train_images=np.ones((4, 8, 8), np.uint8))
    images = open_source(config(path, layout="npz"))
    assert images.reader.read(images.rows[0]).all()


ONE_HOT = np.eye(2)[[0, 1, 0, 1]]


@pytest.mark.parametrize(
    "labels",
    [
        np.array([False, True, False, True]),
        np.array([[False], [True], [False], [True]]),
        np.array([0.0, 1.0, 0.0, 1.0]),
        np.array([0, 1, 0, 1], ">u2"),
        ONE_HOT,
        ONE_HOT.astype(bool),
        np.asfortranarray(ONE_HOT.astype(">i8")),
    ],
    ids=["bool", "bool-n1", "float", "big-endian", "one-hot", "one-hot-bool", "one-hot-fortran"],
)
def test_labels_of_any_kind_of_number_are_read(tmp_path, labels):
    images = open_source(config(npz(tmp_path / "a.npz", train_labels=labels), layout="npz"))
    assert images.classes == ("0", "1")
    assert [row.labels for row in images.rows[:4]] == [(0,), (1,), (0,), (1,)]
    assert images.notes == (
        ("labels of a.npz are one-hot: each row's column with the 1 is its class",) * (labels.shape == (4, 2))
    )


def test_bool_labels_of_several_classes_are_read(tmp_path):
    labels = {f"{split}_labels": np.array([[1, 1], [0, 1], [0, 0], [1, 0]], bool) for split in ("train", "val", "test")}
    images = open_source(config(npz(tmp_path / "a.npz", **labels), layout="npz", task="multilabel"))
    assert [row.labels for row in images.rows[:4]] == [(0, 1), (1,), (), (0,)]


def test_an_npz_with_train_and_test_draws_val_from_train(tmp_path):
    images = open_source(config(npz(tmp_path / "a.npz", drop=("val_images", "val_labels")), layout="npz"))
    assert Counter(row.split for row in images.rows) == {"train": 4, "test": 4}
    assert images.notes == ("a.npz has no val arrays: validation is drawn from train",)
    splits = splits_of(images)
    assert Counter(splits) == {"train": 2, "val": 2, "test": 4}
    assert splits[4:] == ["test"] * 4


def test_pixels_in_fortran_order_are_the_same_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 6, 3), dtype=np.uint8)
    images = open_source(config(npz(tmp_path / "a.npz", train_images=np.asfortranarray(pixels)), layout="npz"))
    read = images.reader.read(images.rows[2])
    assert np.array_equal(read, pixels[2])
    assert read.flags.c_contiguous


@pytest.mark.parametrize("label", [255, 2**40])
def test_a_label_beyond_the_number_of_images_is_named(tmp_path, label):
    path = npz(tmp_path / "a.npz", train_labels=np.array([0, 1, label, 0]))
    with pytest.raises(ValueError, match=rf"go up to {label}, but it has only 12 images"):
        open_source(config(path, layout="npz"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"drop": ("val_images",)}, "has no array 'val_images'"),
        ({"drop": ("val_labels",)}, "has no array 'val_labels'"),
        ({"drop": ("test_images", "test_labels")}, "has no array 'test_labels'"),
        ({"drop": ("train_images", "val_images", "val_labels")}, "has no array 'train_images'"),
        ({"train_images": np.zeros((4, 8, 8), np.uint16)}, "uint16"),
        ({"train_images": np.zeros((4, 3, 8, 8), np.uint8)}, r"uint8 \(4, 3, 8, 8\), but images must be"),
        ({"train_labels": np.array([0, 1, np.nan, 1])}, "must be integers"),
        ({"train_labels": np.array([0, 1, np.inf, 1])}, "must be integers"),
        ({"train_labels": np.array(["no", "yes", "no", "yes"])}, "must be integers"),
        ({"train_labels": ONE_HOT * 0.9}, "must be integers"),
        ({"train_labels": np.ones((4, 2), int)}, "one class per image"),
        ({"train_images": np.zeros((4, 8, 8), np.float32)}, "float32"),
        ({"train_images": np.zeros((4, 64), np.uint8)}, "uint8"),
        ({"train_images": np.zeros((3, 8, 8), np.uint8)}, "3 train_images but 4 train_labels"),
        ({"train_labels": np.array([0, 1, 2, 7])}, r"label 2 at train_labels\[2\] of a.npz is out of range"),
        ({"train_labels": np.array([0, 1, -1, 1])}, "label -1 .* out of range"),
        ({"train_labels": np.array([0.5, 1, 0, 1])}, "must be integers"),
        ({"train_labels": np.zeros((4, 2), int)}, "one class per image"),
        ({"train_labels": np.array([None] * 4)}, "Python objects"),
    ],
)
def test_a_faulty_npz_is_named(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message) as caught:
        open_source(config(npz(tmp_path / "a.npz", **changed), layout="npz", classes=("no", "yes")))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "damage", [lambda d: b"no zip", lambda d: d[:300], lambda d: d[:100] + b"\0" * 40 + d[140:], lambda d: d[1:]]
)
def test_a_damaged_npz_is_named_and_leaves_nothing_in_the_cache(tmp_path, damage, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    noise = np.random.default_rng(0).integers(0, 256, (4, 8, 8), dtype=np.uint8)
    path = npz(tmp_path / "a.npz", train_images=noise)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"a\.npz.*download"):
        open_source(config(path, layout="npz"))
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and "train_images" in p.name]
    assert not list((tmp_path / "cache").rglob(".tmp-*"))


@pytest.mark.parametrize("name", ["train_images", "val_labels"])
def test_an_array_that_claims_too_much_is_refused_unallocated(tmp_path, name):
    path = npz(tmp_path / "a.npz", compressed=False)
    with zipfile.ZipFile(path) as archive:
        files = {member: archive.read(member) for member in archive.namelist()}
    claim = b"'shape': (4, 1), }" if name == "val_labels" else b"'shape': (4, 8, 8), }"
    larger = claim.replace(b"(4,", b"(4000000000000,")
    header = claim + b" " * (len(larger) - len(claim))
    assert header in files[f"{name}.npy"]
    files[f"{name}.npy"] = files[f"{name}.npy"].replace(header, larger)
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in files.items():
            archive.writestr(member, data)
    with pytest.raises(ValueError, match=f"array '{name}' of .* is damaged .*4000000000000.* download the file again"):
        open_source(config(path, layout="npz"))


def case(message, files=None, **fields):
    return pytest.param(files, fields, message, id=message)


@pytest.mark.parametrize(
    ("files", "fields", "message"),
    [
        case("'mine' is not in the catalog"),
        case("needs its files", layout="folders", source=""),
        case("needs its files; download them .https://zenodo", dataset="breastmnist", source=""),
        case("was not found; check", layout="folders", source="/no/such"),
        case("was not found; check", layout="npz", source="/no/such.npz"),
        case("was not found; check", layout="table", source="/no/such.tar"),
        case("is a folder, but this layout needs a file", {}, layout="npz"),
        case("has no folders", {"a.png": b""}, layout="folders"),
        case("look like splits", {"train/a.png": b"", "test/b.png": b""}, layout="folders"),
        case("class folder 'empty' .* is empty", {**FOLDERS, "empty/.keep": b""}, layout="folders"),
        case("class folder 'gone' .* is missing", FOLDERS, layout="folders", classes=("benign", "malignant", "gone")),
        case("'malignant' .* is not one of the classes", FOLDERS, layout="folders", classes=("benign",)),
        case("holds 0 files", FOLDERS, layout="table"),
        case("holds 2 files", {"a.csv": CSV, "b.csv": CSV}, layout="table"),
        case("holds 2 files", {"a.xlsx": b"", "b.xlsx": b""}, layout="table"),
        case("has no rows", {"a.csv": "file,label\n"}, layout="table"),
        case("not UTF-8", {"a.csv": b"file,label\n\xff\xfe,1\n"}, layout="table"),
        case("line 3 of a.csv has 1 cells", {"a.csv": "file,label\na,b\nc\n"}, layout="table"),
        case("no column 'smear'", FOLDERS | {"a.csv": CSV}, layout="table", group_column="smear"),
        case("no column 'label'", {"x.png": b"", "a.csv": "file,grade\nx.png,1\n"}, layout="table"),
        case(
            r"1 of 2 rows .* not there .'gone\.png' in line 3",
            {"x.png": b"", "a.csv": "file,label\nx.png,1\ngone.png,0\n"},
            layout="table",
        ),
        case("again in line 3", {"x.png": b"", "a.csv": "file,label\nx.png,1\nx.png,0\n"}, layout="table"),
        case("may be any of", {"1/x.png": b"", "2/x.png": b"", "a.csv": "file,label\nx.png,1\n"}, layout="table"),
        case(
            "label '7' in line 2", {"x.png": b"", "a.csv": "file,label\nx.png,7\n"}, layout="table", classes=("a", "b")
        ),
        case("line 2 .* needs its group", {"x.png": b"", "a.csv": "file,label,patient\nx.png,1,\n"}, **TABLE),
        case(
            "'dev' in line 2", {"x.png": b"", "a.csv": "file,label,s\nx.png,1,dev\n"}, layout="table", split_column="s"
        ),
        case("phantoms have the classes", dataset="phantoms", classes=("a", "b", "c")),
        case("is compressed", layout="folders", source="/x/set.tar.gz"),
        case("is not a supported file", {"x.png": b""}, layout="folders", source="x.png"),
    ],
)
def test_a_faulty_set_is_named_in_one_line(tmp_path, monkeypatch, files, fields, message):
    monkeypatch.chdir(tmp_path)
    if files is not None:
        write(tmp_path, files)
        fields = {"source": str(tmp_path), **fields}
    with pytest.raises(ValueError, match=message) as caught:
        open_source(config(**fields))
    assert "\n" not in str(caught.value)


def test_an_empty_class_folder_of_a_local_set_is_seen(tmp_path):
    write(tmp_path, FOLDERS)
    (tmp_path / "normal").mkdir()
    with pytest.raises(ValueError, match=r"class folder 'normal' .* is empty"):
        open_source(config(tmp_path, layout="folders"))


def test_s3_console_folders_are_folders_and_an_empty_one_is_seen(s3):
    store = open_store(s3)
    client = boto3.client("s3")
    bucket, _, prefix = s3.removeprefix("s3://").partition("/")
    for name, data in FOLDERS.items():
        store.put(name, data)
    present = sorted({name.partition("/")[0] for name in FOLDERS})
    for folder in ("", *(f"{name}/" for name in present)):
        client.put_object(Bucket=bucket, Key=f"{prefix}/{folder}", Body=b"")
    images = open_source(config(s3, layout="folders"))
    assert (images.classes, len(images.rows)) == (tuple(present), len(FOLDERS))
    client.put_object(Bucket=bucket, Key=f"{prefix}/zebra/", Body=b"")
    with pytest.raises(ValueError, match=r"class folder 'zebra' .* is empty"):
        open_source(config(s3, layout="folders"))


def test_an_image_that_is_there_but_cannot_be_read_has_a_reason(tmp_path):
    write(tmp_path, FOLDERS)
    name = next(iter(FOLDERS))
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(tmp_path / "nowhere")
    images = open_source(config(tmp_path, layout="folders"))
    with pytest.raises(UndecodableImage) as caught:
        images.reader.read(next(row for row in images.rows if row.where == name))
    assert caught.value.reason == "cannot be read: a link to a file that is not there"


def test_a_torn_tar_is_named(tmp_path):
    data = tar_of({"a/x.bin": bytes(5000), "b/x.bin": bytes(50000)})
    for length in (30, 4000, 7000, 20000):
        (tmp_path / "torn.tar").write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"torn\.tar .*download it again"):
            open_source(config(tmp_path / "torn.tar", layout="folders"))


def test_a_patient_in_two_given_splits_is_named(tmp_path):
    table = CSV.replace(",p3,test", ",p0,test")
    images = open_source(config(write(tmp_path, FOLDERS | {"t.csv": table}), **TABLE, split_column="part"))
    with pytest.raises(LeakError, match="'p0' is in the splits train and test"):
        splits_of(images)


def test_a_source_on_s3_may_be_an_object_or_a_folder(s3):
    store = open_store(s3)
    store.put("sets/set.npz", b"x")
    for uri in (f"{s3}/sets/set.npz", f"{s3}/sets", f"{s3}/sets/", "/".join(s3.split("/")[:3])):
        check_source(DataConfig(dataset="own", layout="folders", source=uri))
    for uri in (f"{s3}/sets/other.npz", f"{s3}/set", f"{s3}/sets/set"):
        with pytest.raises(ValueError, match=f"{uri} was not found: .*check --data.source"):
            check_source(DataConfig(dataset="own", layout="folders", source=uri))
