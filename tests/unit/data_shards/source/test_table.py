"""The table as a file: endings, encodings, delimiters, long cells, and what only looks like one."""

import csv
import threading

import pytest
from original_layouts import zip_of
from table_sets import opened, write
from test_source import tar_of

from data_shards.source.table.text_table import Table
from data_shards.store import open_store

ROWS = {"file": ["a.png", "b.png"], "label": ["x", "y"]}


def read(text, path="t.csv"):
    table = Table(path, text if isinstance(text, bytes) else text.encode())
    return {name: table.column(name, "label") for name in ROWS}


@pytest.mark.parametrize(
    "text",
    [
        "file,label\na.png,x\nb.png,y\n",
        "file;label\r\na.png;x\r\nb.png;y\r\n",
        "file\tlabel\ra.png\tx\rb.png\ty\r",
        "file|label\na.png|x\nb.png|y",
        "\ufefffile,label\na.png,x\nb.png,y\n",
        "sep=;\nfile;label\na.png;x\nb.png;y\n",
        "\n\n file , label \n a.png , x \n\nb.png,y\n",
        '"file";"label";"a, b, c, d"\n"a.png";"x";1\nb.png;y;","\n',
        'file,label,note\na.png,x,"two\nlines, ""quoted"""\nb.png,y,\n',
        "file,label\na.png,x\nb.png,y\n".encode("utf-16"),
        "file\tlabel\r\na.png\tx\r\nb.png\ty\r\n".encode("utf-16-be").join([b"\xfe\xff", b""]),
    ],
    ids=["comma", "semicolon", "tab", "bar", "mark", "sep", "spaces", "quoted", "lines", "utf-16", "utf-16-be"],
)
def test_a_table_is_read_however_programs_write_it(text):
    assert read(text) == ROWS


def test_a_tsv_is_read_from_folder_tar_zip_and_s3(tmp_path, s3):
    files = {"a.png": b"", "b.png": b"", "t.TSV": b"file\tlabel\tnote\na.png\tx\t1,2,3\nb.png\ty\t\n"}
    for name, data in files.items():
        open_store(s3).put(f"set/{name}", data)
    write(tmp_path, {"set.tar": tar_of(files), "set.zip": zip_of(files)})
    write(tmp_path / "set", files)
    sources = (tmp_path / "set", tmp_path / "set" / "t.TSV", tmp_path / "set.tar", tmp_path / "set.zip", f"{s3}/set")
    found = [opened(source) for source in sources]
    assert {images.classes for images in found} == {("x", "y")}
    assert all(images.rows == found[0].rows for images in found)


def test_a_csv_is_preferred_to_a_workbook_and_that_to_a_tsv(tmp_path):
    files = {"a.png": "", "b.png": "", "t.csv": "file,label\na.png,x\nb.png,y\n", "t.tsv": "file\tlabel\na.png\tq\n"}
    assert opened(write(tmp_path, files)).classes == ("x", "y")


def test_a_cell_may_have_any_length_and_the_csv_limit_stays(tmp_path):
    before = csv.field_size_limit()
    text = "file,label,report\na.png,x," + "r" * 400_000 + "\nb.png,y,\n"
    found = []
    readers = [threading.Thread(target=lambda: found.append(read(text))) for _ in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert found == [ROWS] * 4
    with pytest.raises(ValueError, match="quotation mark"):
        read(text + '"')
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("file,label\na.png,\xe9\n".encode("latin-1"), "t.csv is not UTF-8 .*: save it as UTF-8"),
        ("file,label\na.png,x\n".encode("utf-16-le"), "line 1 of t.csv has a NUL character.*UTF-16"),
        ("file,label\na.png,x\nb.png,\0\n", "line 3 of t.csv has a NUL character"),
        (b"\xff\xfea", "t.csv is not UTF-16"),
        ('file,label\na.png,"x\nb.png,y\n', "line 3 of t.csv cannot be read as CSV .*quotation mark"),
        (b"PK\3\4..", "t.csv is an XLSX workbook or a zip"),
        (b"\xd0\xcf\x11\xe0..", "old Excel"),
        (b"\x1f\x8b..", "compressed by gzip"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
        ("\n<!DOCTYPE html>\n<html></html>", "HTML page"),
        ("", "has no rows"),
    ],
)
def test_what_is_not_a_table_is_named_in_one_line(data, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(data)
    assert "\n" not in str(caught.value)
