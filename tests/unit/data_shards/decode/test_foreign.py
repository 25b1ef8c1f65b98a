"""Files that are not images: each has a short reason that names what it is and quotes nothing of it."""

import gzip
import io
import json
import logging
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from data_shards.config import DataConfig
from data_shards.convert import convert
from data_shards.decode import UndecodableImage, decode
from data_shards.store import open_store


def zipped(name):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"1")
    return buffer.getvalue()


def tarred():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("x.png"))
    return buffer.getvalue()


def media(*brands):
    return (
        (16 + 4 * len(brands[1:])).to_bytes(4, "big")
        + b"ftyp"
        + brands[0]
        + bytes(4)
        + b"".join(brands[1:])
        + b"x" * 99
    )


NIFTI = (348).to_bytes(4, "little") + bytes(340) + b"n+1\0" + bytes(99)
ARRAY = io.BytesIO()
np.save(ARRAY, np.zeros((4, 4)))
KINDS = {
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "a Git LFS pointer"),
    "git annex": (b"../../.git/annex/objects/mX/9J/SHA256E-s1--abc.png/SHA256E-s1--abc.png", "a git-annex pointer"),
    "heic": (media(b"heic", b"mif1"), "HEIC"),
    "heif": (media(b"mif1", b"heic"), "HEIC"),
    "avif": (media(b"avif", b"mif1", b"miaf"), "AVIF"),
    "avif by its second brand": (media(b"mif1", b"avif"), "AVIF"),
    "jpeg xl": (b"\xff\x0a" + bytes(range(99)), "JPEG XL"),
    "jpeg xl in a box": (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(99), "JPEG XL"),
    "jpeg xr": (b"II\xbc\x01" + bytes(99), "JPEG XR"),
    "nifti": (NIFTI, "NIfTI"),
    "nifti of another byte order": ((348).to_bytes(4, "big") + NIFTI[4:], "NIfTI"),
    "nifti 2": ((540).to_bytes(4, "little") + b"n+2\0\r\n\x1a\n" + bytes(999), "NIfTI"),
    "compressed nifti": (gzip.compress(NIFTI), "compressed NIfTI"),
    "analyze": ((348).to_bytes(4, "little") + bytes(344) + b"1", "an Analyze header"),
    "nrrd": (b"NRRD0004\ntype: short\n", "NRRD"),
    "metaimage": (b"ObjectType = Image\nNDims = 3\n", "a MetaImage header"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    "svg with a declaration": (b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- by x -->\n<svg></svg>', "SVG"),
    "html": (b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>", "an HTML page"),
    "html in capitals": (b"\r\n<HTML><HEAD><TITLE>Sign in</TITLE>", "an HTML page"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an XML text"),
    "json": (json.dumps({"error": "not found"}).encode(), "a JSON text"),
    "json list": (b'[\n  {"a": 1}\n]', "a JSON text"),
    "csv": (b"file,label\nx.png,1\ny.png,2\n", "a table (CSV)"),
    "text": (b"Downloaded from somewhere on Monday.\n", "a text, not an image"),
    "text in utf-16": ("Grüße\n".encode("utf-16"), "a text, not an image"),
    "a text that begins as a BMP": (b"BMI of all patients is above 25\n", "a text, not an image"),
    "link as a text": (b"../store/images/0001.png", "a link that was saved as a text"),
    "link of windows": (b"L\0\0\0\x01\x14\x02\0" + bytes(99), "a link of Windows"),
    "link of cygwin": (b"!<symlink>\xff\xfex", "a link of Cygwin"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3", "a PDF"),
    "zip": (zipped("x.png"), "a zip archive"),
    "npz": (zipped("train_images.npy"), "NumPy arrays (.npz)"),
    "docx": (zipped("[Content_Types].xml"), "an Office document"),
    "gzip": (gzip.compress(b"anything"), "a gzip archive"),
    "tar": (tarred(), "a tar archive"),
    "tar.gz": (gzip.compress(tarred()), "a compressed tar archive"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(99), "a 7z archive"),
    "rar": (b"Rar!\x1a\x07\1\0" + bytes(99), "a RAR archive"),
    "npy": (ARRAY.getvalue(), "a NumPy array (.npy)"),
    "mat": (b"MATLAB 5.0 MAT-file, Platform: GLNXA64" + bytes(200), "a MATLAB file"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "HDF5"),
    "mp4": (media(b"isom", b"mp41"), "a video (MP4"),
    "mov": (media(b"qt  "), "a video (MP4 or QuickTime)"),
    "avi": (b"RIFF\x99\0\0\0AVI LIST" + bytes(99), "a video (AVI)"),
    "mkv": (b"\x1aE\xdf\xa3" + bytes(99), "a video (Matroska"),
    "pickle": (b"\x80\4\x95\0K\1.", "a Python pickle"),
    "apple double": (b"\0\5\x16\7\0\2" + bytes(99), "a file of macOS"),
    "photoshop": (b"8BPS\0\1" + bytes(99), "a Photoshop file"),
    "only zeros": (bytes(5000), "only zero bytes"),
    "dicom without preamble": (b"\x08\0\x05\0CS\x0a\0ISO_IR 100" + bytes(200), "a DICOM file without its preamble"),
}


@pytest.mark.parametrize(("data", "reason"), KINDS.values(), ids=KINDS)
def test_a_file_that_is_not_an_image_is_named(data, reason):
    with pytest.raises(UndecodableImage) as caught:
        decode(data)
    assert caught.value.reason.startswith(reason)
    assert len(caught.value.reason) <= 120


def test_reasons_quote_nothing_of_the_file():
    for data in (
        b"Jane Doe was here\n",
        b"../Jane Doe/x.png",
        b"a,Jane Doe\nb,c\n",
        b"<html>Jane Doe",
        b'{"n": "Jane Doe"}',
    ):
        with pytest.raises(UndecodableImage) as caught:
            decode(data)
        assert "Jane" not in caught.value.reason


def test_other_files_in_a_class_folder_are_quarantined_by_kind(tmp_path, caplog):
    for i in range(40):
        (folder := tmp_path / "set" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (24, 24), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (tmp_path / "set" / "a" / "notes.txt").write_text("Scanned on Monday.\n")
    (tmp_path / "set" / "b" / "pointer.png").write_bytes(KINDS["git lfs"][0])
    config = DataConfig(dataset="x", layout="folders", source=str(tmp_path / "set"), max_quarantine=0.5)
    with caplog.at_level(logging.WARNING):
        facts = convert(config, open_store(str(tmp_path / "store")))
    assert (facts["num_images"], facts["quarantine"]) == (40, 2)
    assert "a/notes.txt (a text, not an image); b/pointer.png (a Git LFS pointer, not the file itself" in caplog.text
