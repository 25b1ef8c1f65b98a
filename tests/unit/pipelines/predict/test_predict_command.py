"""`medmamba predict` on a registered model: what it takes, what it writes, and what one bad file does."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import registered
from dicom_files import dicom_file, header, written
from PIL import Image

from data_shards.config import DataConfig, PhantomConfig
from data_shards.convert import convert
from data_shards.manifest import open_dataset
from data_shards.store import open_store
from pipelines.cli import main
from pipelines.predict.classify import answers, classify
from pipelines.predict.inputs import open_inputs
from pipelines.predict.outputs import class_columns, open_out
from pipelines.predict.predictor import open_predictor
from pipelines.predict.source import Item
from pipelines.tracking import open_tracking
from pipelines.tracking.registry import by_alias, loaded

ODD = ["new\nline.png", 'comma, and "quotes".png', "ünïcode 乳.png", "apostrophe's.png", os.fsdecode(b"byte\xff.png")]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """With a champion and a dataset of 60 phantoms."""
    store = open_store(str(tmp_path_factory.mktemp("store")))
    registered.released(store, open_tracking(store), "first", auc=0.9)
    config = DataConfig(phantoms=PhantomConfig(num_patients=30, images_per_patient=2, side=32), samples_per_shard=20)
    convert(config, store.at("datasets", "phantoms", "default"))
    return store


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (36, 44), dtype=np.uint8)


def pictures(folder: Path, num: int) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:04}.png" for number in range(num)]
    for number, path in enumerate(paths):
        path.write_bytes(registered.coded(picture(number)))
    return paths


def bad_files(folder: Path) -> dict[str, str]:
    """Ten files of different kinds that are not images, with what is said about each."""
    good = registered.coded(picture(0))
    stack = [Image.fromarray(picture(number)) for number in (1, 2)]
    (folder / "cut.png").write_bytes(good[: len(good) // 2])
    (folder / "text.png").write_text("no picture but a text of several words\n" * 9)
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "page.jpeg").write_text("<!doctype html><html><body>404</body></html>")
    (folder / "noise.bmp").write_bytes(bytes(range(256)))
    stack[0].save(folder / "stack.gif", save_all=True, append_images=stack[1:])
    floats = np.full((9, 9), np.nan, np.float32)
    data = header(floats, PixelData=None, BitsStored=None, HighBit=None, PixelRepresentation=None)
    data.FloatPixelData = floats.tobytes()
    (folder / "nan.dcm").write_bytes(written(data))
    Image.fromarray(floats).save(folder / "nan.tif")
    (folder / "link.png").symlink_to("nowhere.png")
    (folder / "broken.zip").write_bytes(b"PK\3\4 and no more")
    return {
        "cut.png": "truncated", "text.png": "text", "empty.jpg": "empty file", "page.jpeg": "an HTML page",
        "noise.bmp": "", "stack.gif": "2 frames", "nan.tif": "floating-point", "nan.dcm": "no finite numbers",
        "link.png": "link", "broken.zip": "not a complete zip",
    }  # fmt: skip


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def run(store, *argv: object, code: int = 0) -> None:
    assert main(["predict", *map(str, argv), "--store", store.uri]) == code


def test_of_a_thousand_files_ten_bad_ones_are_rows(store, tmp_path, capsys):
    folder = tmp_path / "images"
    good = pictures(folder, 990)
    bad = bad_files(folder)
    (folder / "labels.csv").write_text("a,b\n")
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "inner").mkdir()
    shutil.move(good[500], folder / "inner" / "0500.png")
    run(store, folder, "--out", tmp_path / "x.csv")
    rows = {row["path"]: row for row in rows_of(tmp_path / "x.csv")}
    assert len(rows) == 1000
    for name, says in bad.items():
        row = rows[f"{folder}/{name}"]
        assert row["class"] == row["no lesion"] == ""
        assert row["error"]
        assert says in row["error"]
    fine = [row for row in rows.values() if not row["error"]]
    assert len(fine) == 990
    assert f"{folder}/inner/0500.png" in rows
    expected = registered.direct_scores(store, "first", [picture(number)[..., None] for number in (0, 321)])
    found = [[float(rows[str(good[n])][name]) for name in registered.CLASSES] for n in (0, 321)]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    told = capsys.readouterr().err.splitlines()
    assert any("1 file is not an image by its name and is skipped: labels.csv" in line for line in told)
    assert any("1000/1000 files" in line and "images/s" in line for line in told)
    assert told[-1].startswith("10 of 1000 images could not be classified: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_a_row(store, tmp_path):
    first, second = pictures(tmp_path, 2)
    second.chmod(0)
    found = classify([first, second], store=store)
    assert found[1]["error"] == "cannot be read: Permission denied"


def test_only_bad_files_are_a_failure(store, tmp_path, capsys):
    (tmp_path / "README.txt").write_text("some words")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    names = ["README.txt", "folder.png", "pipe.png"]
    run(store, *(tmp_path / name for name in names), code=1)
    seen = capsys.readouterr()
    assert "3 of 3 images could not be classified: " in seen.err.splitlines()[-1]
    assert "not a regular file" in seen.out


def test_a_folder_without_images_is_a_failure(store, tmp_path, capsys):
    (tmp_path / "README.txt").write_text("some words")
    (tmp_path / "labels.csv").write_text("a,b\n")
    run(store, tmp_path, code=1)
    told = capsys.readouterr().err.splitlines()
    assert "2 files are not images by their names and are skipped: README.txt, labels.csv" in told
    assert told[-1].endswith("no images there")


def test_odd_names_come_back_from_every_format(store, tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    for name in ODD:
        (folder / name).write_bytes(registered.coded(picture(1)))
    expected = [f"{folder}/{name}" for name in sorted(ODD[:-1])]
    for ending in ("csv", "json", "parquet"):
        run(store, folder, "--out", tmp_path / f"x.{ending}")
    tables = [
        [row["path"] for row in rows_of(tmp_path / "x.csv")],
        [row["image"] for row in json.loads((tmp_path / "x.json").read_text())],
        pq.read_table(tmp_path / "x.parquet")["path"].to_pylist(),
    ]
    for names in tables:
        assert sorted(names) == sorted([*expected, f"{folder}/byte\\xff.png"])
        assert names == tables[0]


def test_formats_agree_and_parquet_is_typed(store, tmp_path):
    paths = [*pictures(tmp_path / "images", 5), tmp_path / "empty.png"]
    paths[-1].write_bytes(b"")
    for ending in ("csv", "json", "parquet"):
        run(store, *paths, "--out", tmp_path / f"x.{ending}", "--batch-size", 2)
    table = pq.read_table(tmp_path / "x.parquet")
    assert table.column_names == ["path", "class", *registered.CLASSES, "model", "version", "error", "calibrated"]
    kinds = [pa.string(), pa.string(), *[pa.float64()] * 3, pa.string(), pa.int64(), pa.string(), pa.bool_()]
    assert table.schema.types == kinds
    typed, text = table.to_pylist(), rows_of(tmp_path / "x.csv")
    loose = json.loads((tmp_path / "x.json").read_text())
    for path, one, two, three in zip(map(str, paths), typed, text, loose, strict=True):
        assert one["path"] == two["path"] == three["image"] == path
        assert (one["class"] or "") == two["class"] == (three["class"] or "")
        for name in registered.CLASSES:
            assert one[name] == three["scores"].get(name)
            assert one[name] is None or one[name] == float(two[name])
    assert (typed[5]["error"], text[5]["error"], loose[5]["error"]) == ("empty file",) * 3
    assert (typed[0]["calibrated"], text[0]["calibrated"], loose[0]["calibrated"]) == (False, "no", False)
    assert not list(tmp_path.glob(".x*"))


def test_class_names_that_clash_with_columns_get_a_prefix():
    names = ["path", "p_path", "error", "benign"]
    assert class_columns(names) == ["p_p_path", "p_path", "p_error", "benign"]


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("x.xlsx", "unknown ending; available: .csv, .parquet, .json"),
        ("nowhere/x.csv", "nowhere is not a folder of this machine"),
        ("s3://bucket/x.csv", "is not a folder of this machine"),
    ],
)
def test_a_wrong_out_is_refused_before_a_model_is_loaded(out, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["predict", "a.png", "--out", out]) == 2
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_older_file_stays_if_the_command_fails(store, tmp_path):
    (image,) = pictures(tmp_path, 1)
    (tmp_path / "x.csv").write_text("older")
    run(store, image, "--out", tmp_path / "x.csv", "--model", "no-such-model", code=1)
    assert (tmp_path / "x.csv").read_text() == "older"


def write_two_rows(write) -> None:
    """The second one lacks a field."""
    row = {"image": "a", "class": "b", "scores": {"b": 1.0}, "model": "m", "version": 1, "error": None}
    write({**row, "calibrated": False})
    write(row | {"scores": {}})


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_an_older_file_stays_if_writing_ends_early(tmp_path, ending):
    path = tmp_path / f"x.{ending}"
    path.write_text("older")
    with pytest.raises(KeyError, match="calibrated"), open_out(str(path), ["b"]) as write:
        write_two_rows(write)
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("word", ["missing.png", "missing:trian", "s3:x", "phantoms/default:validation"])
def test_a_name_that_is_not_there_is_wrong_use(store, word, capsys):
    run(store, word, code=2)
    assert f"{word} was not found" in capsys.readouterr().err


def test_an_unknown_dataset_is_named_with_the_known_ones(store, capsys):
    run(store, "breastmnist:test", code=2)
    assert "one of phantoms/default" in capsys.readouterr().err


def test_a_folder_a_tar_and_a_zip_give_the_same(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = pictures(Path("images"), 7)
    with tarfile.open("images.tar", "w") as tar, zipfile.ZipFile("images.zip", "w") as packed:
        for path in paths:
            tar.add(path, path.name)
            packed.write(path, path.name)
    direct = classify(paths, store=store)
    for archive in ("images", "images.tar", "images.zip"):
        found = classify([archive], store=store)
        assert [row["image"] for row in found] == [f"{archive}/{path.name}" for path in paths]
        assert [row["scores"] for row in found] == [row["scores"] for row in direct]
    Path("images/more.zip").write_bytes(Path("images.zip").read_bytes())
    assert len(classify(["images"], store=store)) == 14


@pytest.mark.parametrize("word", ["phantoms:test", "phantoms/default:test"])
def test_a_split_has_its_keys_as_names(store, tmp_path, word):
    run(store, word, "--out", tmp_path / "x.csv")
    index = open_dataset(store.at("datasets", "phantoms", "default")).index("test")
    rows = rows_of(tmp_path / "x.csv")
    assert [row["path"] for row in rows] == index.key.tolist()
    assert not any(row["error"] for row in rows)


def test_a_shard_gives_the_same_as_its_split(store, tmp_path):
    (tar,) = Path(store.uri).glob("datasets/phantoms/default/shards/test-*.tar")
    run(store, tar, "phantoms:test", "--out", tmp_path / "x.csv")
    rows = rows_of(tmp_path / "x.csv")
    assert len(rows) % 2 == 0
    by_name = {Path(row["path"]).stem: row["spiculated"] for row in rows[: len(rows) // 2]}
    assert by_name == {row["path"]: row["spiculated"] for row in rows[len(rows) // 2 :]}


def test_objects_and_prefixes_of_s3(store, s3, tmp_path, capsys):
    paths, bucket = pictures(tmp_path / "images", 4), open_store(s3)
    for path in paths:
        bucket.put(f"set/{path.name}", path)
    bucket.put("set/notes.txt", b"words")
    bucket.put("set/bad.png", b"words")
    direct = [row["scores"] for row in classify(paths, store=store)]
    run(store, f"{s3}/set", f"{s3}/set/0002.png", "--out", tmp_path / "x.json")
    rows = json.loads((tmp_path / "x.json").read_text())
    names = [*(f"set/{path.name}" for path in paths), "set/bad.png", "set/0002.png"]
    assert [row["image"] for row in rows] == [f"{s3}/{name}" for name in names]
    assert [row["scores"] for row in rows] == [*direct, {}, direct[2]]
    assert "notes.txt" in capsys.readouterr().err
    run(store, f"{s3}/nothing", code=2)
    assert "no object has this key or prefix" in capsys.readouterr().err


def test_a_series_of_dicom_files_has_a_row_per_frame(store, shared_dir, tmp_path):
    series = tmp_path / "series"
    series.mkdir()
    for name in ("CT_small.dcm", "SC_rgb_2frame.dcm", "emri_small.dcm", "rtplan.dcm"):
        shutil.copy(shared_dir / "data" / "dicom" / name, series / name)
    shutil.copy(series / "CT_small.dcm", series / "IM000001")
    rows = classify([series, series / "IM000001"], store=store)
    names = ["CT_small.dcm", "IM000001", "SC_rgb_2frame.dcm#0", "SC_rgb_2frame.dcm#1"]
    names += [*(f"emri_small.dcm#{frame}" for frame in range(10)), "rtplan.dcm", "IM000001"]
    assert [row["image"] for row in rows] == [f"{series}/{name}" for name in names]
    assert [row["image"] for row in rows if row["error"]] == [f"{series}/rtplan.dcm"]
    assert rows[0]["scores"] == rows[1]["scores"] == rows[-1]["scores"]
    assert rows[2]["scores"] != rows[3]["scores"]


def test_frames_are_all_there_if_they_are_more_than_a_batch(store, tmp_path):
    frames = np.stack([picture(number) for number in range(11)])
    (tmp_path / "many.dcm").write_bytes(dicom_file(frames, NumberOfFrames=11))
    run(store, tmp_path / "many.dcm", "--out", tmp_path / "x.csv", "--batch-size", 2)
    rows = rows_of(tmp_path / "x.csv")
    assert [row["path"] for row in rows] == [f"{tmp_path}/many.dcm#{frame}" for frame in range(11)]
    assert len({row["spiculated"] for row in rows}) == 11


class Counting:
    """A source that knows how far it has been read."""

    def __init__(self) -> None:
        self.num_read = 0

    def count_frames(self, where: int) -> int:
        return 1

    def read(self, where: int, frame: int) -> bytes:
        self.num_read += 1
        return registered.coded(picture(where))


def test_only_some_images_are_read_ahead_and_the_order_is_kept(store):
    source, batch = Counting(), 8
    items = (Item(str(number), source, number) for number in range(200))
    with open_predictor(store, batch_size=batch, device="cpu") as predictor:
        for number, answer in enumerate(answers(items, predictor, batch_size=batch)):
            assert answer.path == str(number)
            assert source.num_read - number <= 4 * batch
    assert number == 199


def test_names_are_listed_without_reading(tmp_path):
    for number in range(300):
        (tmp_path / f"{number}.png").symlink_to("nowhere")
    inputs = open_inputs([str(tmp_path)], dataset=open_store)
    assert inputs.num_files == 300
    assert len(list(inputs)) == 300


def test_the_table_ends_after_twenty_rows_unless_all_are_wanted(store, tmp_path, capsys):
    paths = pictures(tmp_path, 23)
    run(store, *paths)
    seen = capsys.readouterr().out
    assert seen.count(".png") == 20
    assert "and 3 more" in seen
    run(store, *paths, "--all")
    assert capsys.readouterr().out.count(".png") == 23


def test_json_on_standard_output_has_old_and_new_fields(store, tmp_path, capsys):
    (tmp_path / "text.png").write_text("some words")
    run(store, *pictures(tmp_path, 1), tmp_path / "text.png", "--json")
    good, bad = json.loads(capsys.readouterr().out)
    assert list(good) == ["image", "class", "scores", "model", "version", "error", "calibrated"]
    assert (good["model"], good["version"], good["error"]) == ("medmamba-phantoms", 1, None)
    assert (bad["class"], bad["scores"]) == (None, {})


def test_a_version_without_calibration_says_so(store, tmp_path):
    tracking = open_tracking(store)
    version = by_alias(tracking, "medmamba-phantoms", "champion")
    for wanted in (True, False):
        with loaded(tracking, version, calibrated=wanted) as classifier:
            assert (classifier.is_calibrated, classifier.temperature) == (False, 1.0)


def test_torch_does_not_import_its_compiler(store, tmp_path):
    """It takes a second of the five until the first answer."""
    (image,) = pictures(tmp_path, 1)
    code = f"""
import sys
from pipelines.cli import main
assert main(["predict", {str(image)!r}, "--store", {store.uri!r}, "--device", "cpu"]) == 0
assert not {{"torch._dynamo", "torch._inductor", "sympy", "ray"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_cuda_without_a_gpu_is_said(store, tmp_path, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    run(store, *pictures(tmp_path, 1), "--device", "cuda", code=1)
    assert "torch sees no GPU here" in capsys.readouterr().err
