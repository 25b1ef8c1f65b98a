"""Damaged files of every kind that is read give an image or a ValueError that says why: no crash, no hang, no flood.

The short run is the same every time. The long one (`-m slow`) draws anew; MEDMAMBA_FUZZ_EXAMPLES says how many of each
kind. What it finds becomes a test with a name beside the others.
"""

import functools
import io
import json
import os
import resource
import tarfile
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("hypothesis", reason="the fuzz tests need hypothesis, which is in the extra `dev`")
pydicom = pytest.importorskip("pydicom", reason="DICOM needs the extra `dicom`")

from damage import altered_json, damaged, hostile_json
from dicom_files import PATIENT, dicom_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from original_layouts import xlsx
from PIL import Image
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit
from tiny_sets import coded, in_memory_set, pixels

from data_shards.config import DataConfig, DicomConfig
from data_shards.convert import convert
from data_shards.decode import UndecodableImage, decode, dicom, stored_bytes
from data_shards.duplicates import REPORT, read_report
from data_shards.duplicates.scan import FINGERPRINTS, stored_digests
from data_shards.loader.local_shard import LocalShards
from data_shards.manifest import INDEX, MANIFEST, manifest_digest, open_dataset
from data_shards.plan import plan_shards
from data_shards.shard import ShardPart, ShardTask, find_shard, part_key, read_samples, tar_key, write_shard
from data_shards.source import open_source
from data_shards.split import assign_splits
from data_shards.store import Store, open_store
from data_shards.verify import verify

SHORT, LONG = 40, int(os.environ.get("MEDMAMBA_FUZZ_EXAMPLES", "3000"))
# Far above what an example takes, far below what a hang does.
DEADLINE_MS, MORE_MIB = 10_000, 1000

GREY, RGB = pixels(1), pixels(2, channels=3)
WIDE = GREY.astype("<u2") * 17


def in_folder(check):
    """The check, given a folder of its own that is also the machine's cache."""

    def run(data):
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", f"{folder}/cache")
            check(Path(folder), data)

    return run


# --- images


def images():
    deep = Image.fromarray(WIDE)
    smooth = Image.fromarray(RGB).resize((40, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = [
        (GREY, "PNG", {}), (RGB, "PNG", {"exif": exif}), (smooth.convert("P"), "PNG", {"transparency": 3}),
        (deep, "PNG", {}), (smooth, "JPEG", {"exif": exif}), (smooth, "JPEG", {"progressive": True}),
        (smooth.convert("CMYK"), "JPEG", {}), (deep, "TIFF", {}), (smooth, "TIFF", {"compression": "tiff_lzw"}),
        (smooth, "TIFF", {"compression": "jpeg"}), (GREY > 99, "TIFF", {"compression": "group4"}), (smooth, "BMP", {}),
        (smooth.convert("P"), "GIF", {}), (smooth, "WEBP", {}), (smooth, "WEBP", {"lossless": True}),
        (smooth, "PPM", {}), (smooth, "JPEG2000", {}), (deep, "JPEG2000", {"no_jp2": True}),
    ]  # fmt: skip
    for image, format, options in kinds:
        buffer = io.BytesIO()
        (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, format, **options)
        yield buffer.getvalue()


def result_of(function, *args):
    """What it returns, None where it refuses with a fit reason; anything else that it raises is a finding."""
    try:
        return function(*args)
    except UndecodableImage as error:
        reason = error.reason
    except ValueError as error:
        reason = str(error)
        if function in (stored_bytes, decode, dicom.frame):
            raise
    assert reason
    assert "\n" not in reason
    assert len(reason) <= 120 or function not in (stored_bytes, decode, dicom.frame)
    assert not any(value in reason for value in PATIENT.values())
    return None


def check_image(data):
    kept, ending, _ = result_of(stored_bytes, data) or (None,) * 3
    if kept is None:
        return
    assert ending in ("png", "jpg")
    assert np.array_equal(decode(kept), decode(data))


# --- DICOM


def dicom_files():
    jpeg, j2k = coded(GREY, "JPEG"), io.BytesIO()
    Image.fromarray(GREY).save(j2k, "JPEG2000", no_jp2=True)
    rle = bytes([1, 0, 0, 0, 64]) + bytes(59) + b"".join(bytes([14]) + row.tobytes() for row in GREY)
    palette = {
        f"{name}PaletteColorLookupTable{what}": value
        for name in ("Red", "Green", "Blue")
        for what, value in (("Descriptor", [256, 0, 16]), ("Data", np.arange(0, 65536, 256, dtype="<u2").tobytes()))
    }
    yield dicom_file(WIDE, WindowCenter=2000, WindowWidth=1500, RescaleSlope=2, RescaleIntercept=-1024)
    yield dicom_file(np.stack([WIDE, WIDE]), "1.2.840.10008.1.2", NumberOfFrames=2)
    yield dicom_file(WIDE.astype(">u2"), "1.2.840.10008.1.2.2", PhotometricInterpretation="MONOCHROME1")
    yield dicom_file(WIDE, "1.2.840.10008.1.2.1.99")
    yield dicom_file(RGB, PhotometricInterpretation="YBR_FULL", PlanarConfiguration=1)
    yield dicom_file(GREY, PhotometricInterpretation="PALETTE COLOR", **palette)
    yield dicom_file(np.stack([GREY, GREY]), JPEGBaseline8Bit, NumberOfFrames=2, PixelData=[jpeg, jpeg])
    yield dicom_file(RGB, JPEGBaseline8Bit, PixelData=[coded(RGB, "JPEG")], PhotometricInterpretation="YBR_FULL_422")
    yield dicom_file(GREY, JPEG2000Lossless, PixelData=[j2k.getvalue()])
    yield dicom_file(GREY, "1.2.840.10008.1.2.5", PixelData=[rle])
    # What cannot be written here: JPEG-LS, lossless JPEG and more.
    packaged = (Path(pydicom.__file__).parent / "data" / "test_files").glob("*.dcm")
    yield from (path.read_bytes() for path in sorted(packaged) if path.stat().st_size < 20_000)


@st.composite
def dicom_fields(draw):
    """A whole file whose header says anything."""
    padding = st.sampled_from([0, 1, 255, 32767])
    whole = st.sampled_from([0, 1, 2, 3, 7, 8, 9, 12, 15, 16, 17, 32, 64, 255, 65535])
    real = st.one_of(st.floats(-1e6, 1e6).map(lambda x: f"{x:.6g}"), st.sampled_from(["0", "1", "0.5", "-1", "1e300"]))
    kinds = {
        "Rows": whole, "Columns": whole, "SamplesPerPixel": whole, "BitsAllocated": whole, "BitsStored": whole,
        "HighBit": whole, "PixelRepresentation": whole, "PlanarConfiguration": whole, "PixelPaddingValue": padding,
        "NumberOfFrames": st.integers(-(2**31), 2**31 - 1), "WindowCenter": st.lists(real, max_size=3),
        "WindowWidth": st.lists(real, max_size=3), "RescaleSlope": real, "RescaleIntercept": real,
        "VOILUTFunction": st.sampled_from(["LINEAR", "SIGMOID", "LINEAR_EXACT", "X"]),
        "PhotometricInterpretation": st.sampled_from(
            ["MONOCHROME1", "MONOCHROME2", "RGB", "YBR_FULL", "YBR_FULL_422", "PALETTE COLOR", "YBR_RCT", "X", ""]
        ),
    }  # fmt: skip
    fields = draw(st.fixed_dictionaries({}, optional=kinds))
    return dicom_file(draw(st.sampled_from([GREY, WIDE, RGB])), **fields)


def check_dicom(data):
    facts = dicom.facts(io.BytesIO(data)) if dicom.is_dicom(io.BytesIO(data)) else dicom.Facts()
    assert 1 <= facts.num_frames <= 8 * len(data) or facts.num_frames <= 8 << 20
    for frame in {0, 1, facts.num_frames - 1}:
        for config in (DicomConfig(), DicomConfig(window=(40, 400))):
            shown = result_of(dicom.frame, io.BytesIO(data), frame, config)
            if shown is not None:
                assert shown.dtype == np.uint8
                assert shown.ndim == 2 or shown.shape[2:] == (3,)
                assert shown.size > 0


# --- sources


def tar_of(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


PNG = coded(GREY)
TREE = {f"{label}/{i}.png": PNG for label in ("benign", "malignant") for i in range(3)}


@in_folder
def check_tar(folder, data):
    (folder / "set.tar").write_bytes(data)
    read_all(DataConfig(dataset="x", layout="folders", source=str(folder / "set.tar")))


@in_folder
def check_zip(folder, data):
    (folder / "set.zip").write_bytes(data)
    read_all(DataConfig(dataset="x", layout="folders", source=str(folder / "set.zip")))


def zip_of(files, how):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", how) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data, how)
    return buffer.getvalue()


def check_csv(data):
    check_table((data, "t.csv"))


def check_xlsx(data):
    check_table((data, "t.xlsx"))


@in_folder
def check_table(folder, data_and_name):
    data, name = data_and_name
    for i in range(3):
        (folder / f"{i}.png").write_bytes(PNG)
    (folder / name).write_bytes(data)
    columns = {"label_column": "label", "group_column": "patient", "split_column": "split"}
    read_all(DataConfig(dataset="x", layout="table", source=str(folder), **columns))


@in_folder
def check_npz(folder, data):
    (folder / "set.npz").write_bytes(data)
    read_all(DataConfig(dataset="x", layout="npz", source=str(folder / "set.npz")))


def opened(config):
    images = open_source(config)
    assign_splits(images.rows, num_classes=len(images.classes), val_fraction=0.2, test_fraction=0.2, seed=0)
    return images


def read_all(config):
    images = result_of(opened, config)
    for row in images.rows[:20] if images else ():
        source = result_of(images.reader.read, row)
        if source is not None:
            result_of(decode, source)


def npz(save):
    buffer = io.BytesIO()
    arrays = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = np.stack([GREY, GREY])
        arrays[f"{split}_labels"] = np.array([[0], [1]], np.uint8)
    save(buffer, **arrays)
    return buffer.getvalue()


CELLS = [["file", "label", "patient", "split"], ["0.png", "a", "p0", "train"], ["1.png", "b", "p1", "test"]]
TABLES = [
    b"file,label,patient,split\n0.png,a,p0,train\n1.png,b,p1,val\n2.png,a,p2,test\n",
    b'\xef\xbb\xbfpatient;split;label;file\r\n"p0";train;1;"0.png"\r\n"p1";test;0;1.png\r\n',
]


# --- what we wrote


@functools.cache
def written() -> dict[str, bytes]:
    """A small dataset, object by object."""
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(folder)
        convert(
            DataConfig(phantoms={"num_patients": 12, "images_per_patient": 1, "side": 32}, samples_per_shard=4), store
        )
        return {key: store.get(key) for key in store.list()}


def laid_down(folder: Path, **changed: bytes) -> Store:
    for key, data in {**written(), **changed}.items():  # by hand, as a store syncs each to the disk
        path = folder / "store" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return open_store(str(folder / "store"))


@in_folder
def check_manifest(folder, data):
    dataset_of(laid_down(folder, **{MANIFEST: data}))


@in_folder
def check_index(folder, data):
    manifest = json.loads(written()[MANIFEST])
    manifest["index"] |= {"sha256": manifest_digest(data), "bytes": len(data)}
    dataset_of(laid_down(folder, **{INDEX: data, MANIFEST: json.dumps(manifest).encode()}))


def dataset_of(store):
    dataset = result_of(open_dataset, store)
    for split in dataset.manifest.splits if dataset else ():
        index = result_of(dataset.index, split)
        assert index is None or len(index) == dataset.manifest.splits[split].samples


@in_folder
def check_reading(folder, data):
    """Whatever a manifest says, its shards are read to the end or refused, and nothing else on the disk is touched."""
    victim = folder / "victim"
    victim.write_bytes(b"precious")
    store = laid_down(folder, **{MANIFEST: data.replace(b"VICTIM", str(victim).encode())})
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def read():
        dataset = open_dataset(store)
        shards = LocalShards([(store, entry) for entry in dataset.manifest.shards])
        index = dataset.index("train")
        return shards.read_many(index.shard, index.offset, index.size)

    result_of(read)
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {path: data for path, data in after.items() if folder / "cache" not in path.parents} == before


@in_folder
def check_report(folder, data):
    result_of(read_report, laid_down(folder, **{REPORT: data}))


@in_folder
def check_fingerprints(folder, data):
    result_of(stored_digests, laid_down(folder, **{FINGERPRINTS: data}))


@st.composite
def one_object_damaged(draw):
    key = draw(st.sampled_from(sorted(written())))
    return key, draw(damaged([written()[key]]))


@in_folder
def check_verify(folder, damage):
    """Damage is told wherever a digest knows of it."""
    key, data = damage
    found = verify(laid_down(folder, **{key: data}))
    known = key == INDEX or key.startswith("shards/")
    assert found.problems or data == written()[key] or not known


def a_shard() -> dict[str, Any]:
    images = in_memory_set(6)
    config = DataConfig(dataset="tiny", layout="folders", source="/x")
    (plan,) = plan_shards(images.rows, ["train"] * 6, config)
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(folder)
        write_shard(ShardTask(images, plan, config, images.task, store))
        return {
            "task": ShardTask(images, plan, config, images.task, store),
            "tar": store.get(tar_key(plan.name)),
            "part": store.get(part_key(plan.name)),
        }


SHARD = a_shard()


def check_shard(data):
    for sample in result_of(lambda: list(read_samples(data))) or ():
        assert isinstance(sample["image"], bytes)


@in_folder
def check_part(folder, data):
    store = open_store(str(folder))
    task = replace(SHARD["task"], out=store)
    store.put(tar_key(task.plan.name), SHARD["tar"])
    store.put(part_key(task.plan.name), data)
    found = find_shard(task)
    assert found is None or isinstance(found, ShardPart)


MANIFEST_JSON = written()[MANIFEST]
KINDS = {
    "image": (check_image, damaged(list(images()))),
    "dicom": (check_dicom, damaged(list(dicom_files()))),
    "dicom header": (check_dicom, dicom_fields()),
    "tar": (check_tar, damaged([tar_of(TREE)])),
    "zip": (check_zip, damaged([zip_of(TREE, zipfile.ZIP_STORED), zip_of(TREE, zipfile.ZIP_DEFLATED)])),
    "nested-zip": (check_zip, damaged([zip_of({"inner.zip": zip_of(TREE, zipfile.ZIP_DEFLATED)}, zipfile.ZIP_STORED)])),
    "workbook": (check_xlsx, damaged([xlsx(CELLS)])),
    "table": (check_csv, st.one_of(damaged(TABLES), st.text(max_size=200).map(str.encode))),
    "npz": (check_npz, damaged([npz(np.savez), npz(np.savez_compressed)])),
    "manifest": (check_manifest, st.one_of(damaged([MANIFEST_JSON]), altered_json(MANIFEST_JSON))),
    "hostile manifest": (check_reading, hostile_json(MANIFEST_JSON)),
    "report": (check_report, st.one_of(damaged([written()[REPORT]]), hostile_json(written()[REPORT]))),
    "fingerprints": (check_fingerprints, damaged([written()[FINGERPRINTS]])),
    "index": (check_index, damaged([written()[INDEX]])),
    "shard": (check_shard, damaged([SHARD["tar"]])),
    "verify": (check_verify, one_object_damaged()),
    "commit mark": (
        check_part,
        st.one_of(damaged([SHARD["part"]]), altered_json(SHARD["part"]), hostile_json(SHARD["part"])),
    ),
}


def run(kind, **how):
    check, strategy = KINDS[kind]
    options = settings(deadline=DEADLINE_MS, database=None, suppress_health_check=list(HealthCheck), **how)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    options(given(strategy)(check))()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MORE_MIB << 10


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_gives_an_image_or_a_reason(kind):
    run(kind, max_examples=SHORT, derandomize=True)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_files_give_an_image_or_a_reason(kind):
    run(kind, max_examples=LONG)
