"""Image sets of every layout, the same bytes on every machine and with every version of numpy, zlib and Pillow.

Pixels are raw words of PCG64, whose stream numpy promises to keep, and PNG files are written here without compression,
so what a conversion makes of them depends on this project's code only.
"""

from __future__ import annotations

import csv
import io
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

HEADER = ("file", "diagnosis", "patient", "fold", "marks")
KVASIR = (
    "dyed-lifted-polyps", "dyed-resection-margins", "esophagitis", "normal-cecum", "normal-pylorus", "normal-z-line",
    "polyps", "ulcerative-colitis",
)  # fmt: skip
PLANES = ("Fetal abdomen", "Fetal brain", "Fetal femur", "Fetal thorax", "Maternal cervix", "Other")
SKIN = ("BCC", "ACK", "NEV", "SEK", "SCC", "MEL")


def picture(number: int, channels: int = 1, height: int | None = None, width: int | None = None) -> np.ndarray:
    """uint8 (H, W) or (H, W, 3): 8 x 8 large blocks under a little noise, unlike any other number's."""
    height, width = height or 24 + number % 9, width or 32 - number % 5
    words = np.random.PCG64(np.random.SeedSequence([7, number])).random_raw(64 * channels + height * width * channels)
    blocks = (words[: 64 * channels] >> np.uint64(57)).astype(np.uint8).reshape(8, 8, channels) + 60
    noise = (words[64 * channels :] >> np.uint64(61)).astype(np.uint8).reshape(height, width, channels)
    large = blocks[np.arange(height) * 8 // height][:, np.arange(width) * 8 // width] + noise
    return large[:, :, 0] if channels == 1 else large


def png(image: np.ndarray) -> bytes:
    """The image as an uncompressed PNG, 8 bits a channel."""
    height, width = image.shape[:2]
    rows = b"".join(b"\0" + row.tobytes() for row in np.ascontiguousarray(image))
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if image.ndim == 3 else 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _part(b"IHDR", header) + _part(b"IDAT", _stored(rows)) + _part(b"IEND", b"")


def write_sets(root: Path) -> None:
    """Writes every set below the folder."""
    _write(root / "flat", _flat())
    _write(root / "broken", {**_flat(), "b/broken.png": png(picture(40))[:300]})
    _write(root / "tree", _tree())
    copies = {
        "Training/a/copy.png": png(picture(2000)),  # of a test image
        "Training/b/close.png": png(picture(2106) + np.uint8(2)),  # nearly a test image
        "Testing/c/twice.png": png(picture(2201)),  # twice in one split
        "Training/a/both.png": png(picture(77)),  # under two labels
        "Training/c/both.png": png(picture(77)),
    }
    _write(root / "copies", {**_tree(), **copies})
    _write(root / "around", _around())
    _write(root / "inside", _inside())
    table = _table()
    _write(root / "table", table)
    _write(
        root / "kvasir",
        {f"{name}/{i}.png": png(picture(3000 + 9 * c + i, 3)) for c, name in enumerate(KVASIR) for i in range(9)},
    )
    _write(root / "planes", _planes())
    _write(root / "skin", _skin())
    _archives(root, _flat(), table)
    _npz_files(root)


def write_dicom(root: Path) -> None:
    """Writes the sets of DICOM files; needs pydicom."""
    from dicom_files import dicom_file

    def deep(number: int) -> np.ndarray:
        return picture(number, 1, 20, 24).astype(np.uint16) * 13

    files = {}
    for i in range(7):
        patient = {"PatientID": f"P{i}", "StudyInstanceUID": f"1.2.3.{i}"}
        files[f"deep/{i}.dcm"] = dicom_file(deep(5000 + i), WindowCenter=1200, WindowWidth=900, **patient)
        files[f"color/{i}"] = dicom_file(picture(5100 + i, 3, 18, 22), **{**patient, "PatientID": f"Q{i}"})
    frames = np.stack([picture(5200 + i, 1, 20, 20) for i in range(3)])
    files["deep/frames.dcm"] = dicom_file(frames, NumberOfFrames=3, PatientID="F")
    files["color/named.dcm"] = dicom_file(picture(5300, 3, 18, 22), PatientID="N", BurnedInAnnotation="YES")
    rows = [(name, name.split("/")[0]) for name in sorted(files)]
    _write(root / "dicom", {**files, "list.csv": csv_text([("file", "label"), *rows])})


def csv_text(rows: Sequence[Sequence[object]], delimiter: str = ",") -> bytes:
    """A table of text."""
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def _flat() -> dict[str, bytes]:
    """A folder per class, two images a patient; one image twice, one nearly so."""
    files = {}
    for c, (name, count) in enumerate({"a": 18, "b": 16, "c": 14}.items()):
        for i in range(count):
            files[f"{name}/p{10 * c + i // 2:02d}_{i}.png"] = png(picture(100 * c + i, 3 if i % 5 == 0 else 1))
    return {**files, "a/p00_again.png": files["a/p00_1.png"], "b/p10_near.png": png(picture(101) + np.uint8(2))}


def _tree() -> dict[str, bytes]:
    """Folders of splits around those of the classes."""
    return {
        f"{split}/{name}/{i:02d}.png": png(picture(start + 100 * c + i))
        for split, start, count in (("Training", 1000, 13), ("Testing", 2000, 8))
        for c, name in enumerate("abc")
        for i in range(count)
    }


def _around() -> dict[str, bytes]:
    """Split folders whose names need an option, and a folder that is neither a split nor a class."""
    folders = {"TRAIN_ALL": 9, "checks": 4, "TEST_SIMPLE": 4}
    return {
        f"{split}/{name}/{i}.png": png(picture(4000 + 200 * s + 50 * c + i, 3))
        for s, (split, count) in enumerate(folders.items())
        for c, name in enumerate(("left", "right"))
        for i in range(count)
    } | {f"masks/left/{i}.png": png(picture(4900 + i)) for i in range(3)}


def _inside() -> dict[str, bytes]:
    """Folders of splits inside those of the classes."""
    folders = {"train (60%)": 9, "valid": 4, "testing": 4}
    return {
        f"{name}/{split}/{i}.png": png(picture(6000 + 200 * s + 50 * c + i))
        for c, name in enumerate(("left", "right"))
        for s, (split, count) in enumerate(folders.items())
        for i in range(count)
    }


def _table() -> dict[str, bytes]:
    """Images with tables of files, labels, patients and splits; one table also lists an image that is missing."""
    files, rows = {}, []
    for i in range(48):
        name = f"images/{i:02d}.png"
        files[name] = png(picture(600 + i, 1 if i % 3 else 3))
        marks = ";".join(mark for mark, every in (("round", 2), ("dark", 3), ("large", 5)) if i % every == 0)
        rows.append((name, ("low", "mid", "high")[i // 2 % 3], f"n{i // 2}", "10120"[i // 6 % 5], marks or "clear"))
    missing = ("images/99.png", "low", "n99", "1", "clear")
    return files | {
        "labels.csv": csv_text([HEADER, *rows]),
        "labels.tsv": csv_text([HEADER, *rows], "\t"),
        "labels.xlsx": _xlsx([HEADER, *rows]),
        "longer.csv": csv_text([HEADER, *rows, missing]),
    }


def _planes() -> dict[str, bytes]:
    header = ("Image_name", "Patient_num", "Plane", "Brain_plane", "Operator", "US_Machine", "Train ")
    files, rows = {}, []
    for i in range(96):
        plane = PLANES[i // 2 % 6]
        files[f"Images/x_{i}.png"] = png(picture(7000 + i))
        rows.append((f"x_{i}", i // 2, plane, "Not A Brain", "Op. 1", "Voluson E6", int(i // 12 % 3 < 2)))
    return files | {"FETAL_PLANES_DB_data.csv": csv_text([header, *rows], ";")}


def _skin() -> dict[str, bytes]:
    files, rows = {}, []
    for i in range(72):
        files[f"images/imgs_part_{i % 3 + 1}/PAT_{i}.png"] = png(picture(8000 + i, 3))
        rows.append((f"PAT_{i // 2}", i, SKIN[i // 2 % 6], f"PAT_{i}.png"))
    return files | {"metadata.csv": csv_text([("patient_id", "lesion_id", "diagnostic", "img_id"), *rows])}


def _archives(root: Path, flat: Mapping[str, bytes], table: Mapping[str, bytes]) -> None:
    inner = io.BytesIO()
    for place, files in ((inner, flat), (root / "table.zip", table)):
        with zipfile.ZipFile(place, "w") as archive:
            for name, data in files.items():
                archive.writestr(zipfile.ZipInfo(f"set/{name}"), data)
    (root / "flat.zip").write_bytes(inner.getvalue())
    with zipfile.ZipFile(root / "nested.zip", "w") as archive:
        archive.writestr(zipfile.ZipInfo("inner.zip"), inner.getvalue())
    with tarfile.open(root / "flat.tar", "w") as tar:
        for name, data in flat.items():
            member = tarfile.TarInfo(f"set/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def _npz_files(root: Path) -> None:
    counts = {"train": 30, "val": 10, "test": 15}

    def images(start: int, count: int, channels: int, side: int) -> np.ndarray:
        return np.stack([picture(start + i, channels, side, side) for i in range(count)])

    grey, color, marked = {}, {}, {}
    for s, (split, count) in enumerate(counts.items()):
        grey |= {
            f"{split}_images": images(9000 + 100 * s, count, 1, 28),
            f"{split}_labels": np.arange(count)[:, None] % 2,
        }
        classes = np.arange(count) % 5
        color |= {
            f"{split}_images": images(9500 + 100 * s, count, 3, 20),
            f"{split}_labels": np.eye(5, dtype=int)[classes],
        }
        bits = (np.arange(count)[:, None] >> np.arange(3)) & 1
        marked |= {f"{split}_images": color[f"{split}_images"], f"{split}_labels": bits}
    np.savez_compressed(root / "grey.npz", **grey)
    np.savez(root / "color.npz", **color)
    np.savez_compressed(root / "marked.npz", **marked)
    np.savez_compressed(
        root / "halves.npz", **{name: array for name, array in grey.items() if not name.startswith("val")}
    )


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def _xlsx(rows: Sequence[Sequence[object]]) -> bytes:
    import openpyxl

    book, buffer = openpyxl.Workbook(), io.BytesIO()
    for row in rows:
        book.active.append(list(row))
    book.save(buffer)
    return buffer.getvalue()


def _part(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _stored(data: bytes) -> bytes:
    # zlib's level 0 may cut blocks otherwise in another implementation.
    blocks = [data[start : start + 65535] for start in range(0, len(data), 65535)]
    coded = b"\x78\x01"
    for i, block in enumerate(blocks):
        coded += struct.pack("<BHH", i == len(blocks) - 1, len(block), len(block) ^ 0xFFFF) + block
    return coded + struct.pack(">I", zlib.adler32(data))
