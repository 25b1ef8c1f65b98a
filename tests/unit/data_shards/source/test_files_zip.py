"""Zips as sources: read in place by many at once; each way in which one is damaged or hostile is named in one line."""

import concurrent.futures
import io
import multiprocessing
import os
import random
import re
import struct
import time
import warnings
import zipfile

import pytest
from original_layouts import central_entry, image, patched, write, zip_of

from data_shards.config import DataConfig
from data_shards.decode import UndecodableImage
from data_shards.source import open_source
from data_shards.source.files.cache import cached
from data_shards.source.files.open import open_files

FILES = {f"{c}/{c} ({i}).png": image(10 * j + i, "L") for j, c in enumerate(("benign", "malignant")) for i in range(4)}
SECOND = "benign/benign (1).png"


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def saved(folder, data, name="set.zip"):
    (folder / name).write_bytes(data)
    return str(folder / name)


def folders(source):
    return open_source(DataConfig(dataset="mine", layout="folders", source=str(source)))


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "deflated"])
def test_a_zip_gives_the_rows_and_bytes_of_the_folder(tmp_path, stored):
    litter = {"__MACOSX/benign/._x.png": b"", "benign/Thumbs.db": b"", ".ipynb_checkpoints/a.png": b""}
    zipped = folders(saved(tmp_path, zip_of(FILES | litter, stored=stored)))
    unpacked = folders(write(tmp_path / "set", FILES))
    assert zipped.rows == unpacked.rows
    assert [zipped.reader.read(row) for row in zipped.rows] == [unpacked.reader.read(row) for row in unpacked.rows]


def test_only_a_zip_inside_a_zip_is_unpacked_and_only_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    open_files(saved(tmp_path, zip_of(FILES)))
    assert not (tmp_path / "cache").exists()
    nested = saved(tmp_path, zip_of({"parts/inner.ZIP": zip_of(FILES)}), "nested.zip")
    assert open_files(nested).names == [f"parts/{name}" for name in sorted(FILES)]
    (unpacked,) = (path for path in (tmp_path / "cache").rglob("*.ZIP"))
    when = unpacked.stat().st_mtime_ns
    open_files(nested)
    assert unpacked.stat().st_mtime_ns == when


def test_a_replaced_zip_is_unpacked_anew(tmp_path):
    source = saved(tmp_path, zip_of({"inner.zip": zip_of({"a/x.png": b"1"})}))
    assert open_files(source).read("a/x.png") == b"1"
    os.utime(saved(tmp_path, zip_of({"inner.zip": zip_of({"a/x.png": b"2"})})), ns=(1, 1))
    assert open_files(source).read("a/x.png") == b"2"


def test_many_threads_read_one_open_zip(tmp_path):
    files = open_files(saved(tmp_path, zip_of(FILES)))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda name: files.read(name) == FILES[name], sorted(FILES) * 50))


def _reads_right(files, name):
    return files.read(name) == FILES[name]


def test_forked_processes_read_one_open_zip(tmp_path):
    files = open_files(saved(tmp_path, zip_of(FILES)))
    context = multiprocessing.get_context("fork")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads of other tests
        workers = [context.Process(target=_exit_well, args=(files,)) for _ in range(4)]
        for worker in workers:
            worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0] * 4


def _exit_well(files):
    os._exit(0 if all(_reads_right(files, name) for name in sorted(FILES) * 20) else 1)


@pytest.mark.parametrize("says_utf8", [True, False])
def test_names_in_utf8_are_read_with_and_without_the_flag_for_it(tmp_path, says_utf8):
    assert open_files(saved(tmp_path, renamed("a/grün.png".encode(), says_utf8=says_utf8))).names == ["a/grün.png"]


def test_backslashes_of_old_windows_programs_separate_folders(tmp_path):
    assert open_files(saved(tmp_path, named("a\\x.png", "a\\y.png"))).names == ["a/x.png", "a/y.png"]


def test_a_zip_in_a_tar_counts_too(tmp_path):
    import tarfile

    data = zip_of(FILES)
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        info = tarfile.TarInfo("set/images.zip")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    images = folders(tmp_path / "set.tar")
    assert [images.reader.read(row) for row in images.rows] == [FILES[name] for name in sorted(FILES)]


def test_a_damaged_member_is_the_fault_of_one_image(tmp_path):
    data = zip_of(FILES)
    info = zipfile.ZipFile(io.BytesIO(data)).getinfo(SECOND)
    middle = info.header_offset + 30 + len(SECOND) + info.compress_size // 2
    for broken in (patched(data, middle, b"\xff" * 8), patched(data, info.header_offset, b"\0\0\0\0")):
        images = folders(saved(tmp_path, broken))
        for row in images.rows:
            if row.where == SECOND:
                with pytest.raises(UndecodableImage, match="damaged in its zip"):
                    images.reader.read(row)
            else:
                assert images.reader.read(row) == FILES[row.where]


@pytest.mark.parametrize("claimed", [1, 100_000], ids=["less", "more"])
def test_a_member_that_is_not_as_long_as_it_says_is_damaged(tmp_path, claimed):
    data = zip_of(FILES)
    images = folders(saved(tmp_path, patched(data, central_entry(data, SECOND) + 24, struct.pack("<I", claimed))))
    with pytest.raises(UndecodableImage, match="damaged in its zip"):
        images.reader.read(next(row for row in images.rows if row.where == SECOND))


def test_a_table_that_is_damaged_in_its_zip_is_named(tmp_path):
    table = "".join(f"a{i}.png,x\n" for i in range(500))
    data = zip_of({"t.csv": f"file,label\n{table}".encode()})
    at = zipfile.ZipFile(io.BytesIO(data)).getinfo("t.csv").header_offset + 60
    with pytest.raises(ValueError, match=r"t\.csv of .*set\.zip cannot be read \(damaged in its zip\): get it again"):
        open_source(DataConfig(dataset="mine", layout="table", source=saved(tmp_path, patched(data, at, b"\xff" * 20))))


# --- archives that are unfit as a whole


def named(*names):
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as archive:
        warnings.simplefilter("ignore", UserWarning)  # of names that stand twice
        for name in names:
            archive.writestr(name, b"x")
    return buffer.getvalue()


def renamed(coded, *, says_utf8):
    """A zip of one member whose name is these bytes, with or without the flag that says UTF-8."""
    name = "?" * len(coded)
    data = flagged(named(name), name, 0x800 if says_utf8 else 0)
    return data.replace(name.encode(), coded)


def bomb():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr("a/bomb.png", bytes(70 << 20))
    return buffer.getvalue()


def packed_with(method):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("a/x.png", b"x" * 100)
    return buffer.getvalue()


def on_the_same_bytes():
    data = zip_of(FILES, stored=True)
    offset = zipfile.ZipFile(io.BytesIO(data)).getinfo("benign/benign (0).png").header_offset
    return patched(data, central_entry(data, SECOND) + 42, struct.pack("<I", offset))


def flagged(data, name, flags):
    return patched(data, central_entry(data, name) + 8, struct.pack("<H", flags))


def nested(depth):
    data = zip_of({"a/x.png": b"x"})
    for _ in range(depth):
        data = zip_of({"inner.zip": data})
    return data


WHOLE = zip_of(FILES)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (named("a/x.png", "../b/x.png"), r"contains '\.\./b/x\.png', which leads outside it"),
        (named("/etc/x.png"), "leads outside it"),
        (named("a/../../x.png"), "leads outside it"),
        (named("C:/x.png"), "leads outside it"),
        (named("a\\..\\..\\x.png"), "leads outside it"),
        (named("a\n/x.png"), r"contains 'a\\n/x.png', a name with control characters"),
        (named("a/x.png", "a/x.png"), "contains 'a/x.png' twice"),
        (named("a/x.png", "a//x.png"), "contains 'a/x.png' twice"),
        (flagged(WHOLE, SECOND, 1), "is encrypted; unpack the archive with its password"),
        (bomb(), r"claims to unpack from 7\d,\d\d\d to 73,400,320 bytes"),
        (packed_with(zipfile.ZIP_BZIP2), "is packed with bzip2"),
        (packed_with(zipfile.ZIP_LZMA), "is packed with lzma"),
        (on_the_same_bytes(), "overlap in"),
        (renamed("a/grün.png".encode("latin-1"), says_utf8=False), "neither ASCII nor UTF-8"),
        (renamed("a/grün.png".encode("latin-1"), says_utf8=True), "is marked as UTF-8 but is not"),
        (b"PK no zip", "is not a complete zip file"),
        (b"", "is not a complete zip file"),
        (WHOLE[:-30], "is not a complete zip file"),
        (WHOLE[: len(WHOLE) // 2], "is not a complete zip file"),
        (patched(WHOLE, WHOLE.index(b"PK\1\2"), b"XXXX"), "is not a complete zip file"),
        (nested(4), "zips are read 3 levels deep"),
        (
            zip_of({"a.zip": zip_of({"x/1.png": b"1"}), "b.zip": zip_of({"x/1.png": b"2"})}),
            "two zips of .* contain 'x/1.png'",
        ),
        (zip_of({"a.zip": b"no zip"}), r"set\.zip/a\.zip is not a complete zip file"),
    ],
)
def test_an_unfit_zip_is_named_in_one_line(tmp_path, data, message):
    with pytest.raises(ValueError, match=message) as caught:
        open_files(saved(tmp_path, data))
    assert "\n" not in str(caught.value)
    assert re.search("[:;] ", str(caught.value))


def test_a_member_claiming_more_than_the_archive_is_refused(tmp_path):
    inner = zip_of({"a/x.png": bytes(1 << 20)})
    data = zip_of({"inner.zip": inner}, stored=True)
    # As if the inner zip were 1 EiB, in the way that sizes above 4 GiB are written down.
    huge = struct.pack("<HHQQ", 1, 16, 1 << 60, 1 << 60)
    at = central_entry(data, "inner.zip")
    data = patched(patched(data, at + 20, b"\xff" * 8), at + 30, struct.pack("<H", len(huge)))
    end = at + 46 + len("inner.zip")
    data = data[:end] + huge + data[end:]
    eocd = data.rindex(b"PK\5\6")
    (size,) = struct.unpack_from("<I", data, eocd + 12)
    with pytest.raises(ValueError, match=r"ends in the middle of 'inner.zip'; download it again"):
        open_files(saved(tmp_path, patched(data, eocd + 12, struct.pack("<I", size + len(huge)))))


def test_no_small_change_makes_a_zip_crash_or_silently_wrong(tmp_path):
    """Whatever is changed: the same bytes, an image at fault, or the archive refused."""
    files = {name: FILES[name] for name in sorted(FILES)[:4]} | {"more/inner.zip": zip_of({"a/x.png": image(99, "L")})}
    whole = zip_of(files)
    right = files | {"more/a/x.png": image(99, "L")}
    dice, outcomes = random.Random(0), {"same": 0, "image at fault": 0, "refused": 0}
    for number in range(400):
        data = bytearray(whole)
        begin = 0 if number % 2 else whole.index(b"PK\1\2")  # half of the changes in the table of contents
        for _ in range(dice.randint(1, 4)):
            data[dice.randrange(begin, len(data))] = dice.randrange(256)
        try:
            opened = open_files(saved(tmp_path, bytes(data), f"{number}.zip"))
        except ValueError:
            outcomes["refused"] += 1
            continue
        for name in opened.names:
            try:
                found = opened.read(name)
            except OSError:
                outcomes["image at fault"] += 1
                continue
            assert found == right[name]
            outcomes["same"] += 1
    assert min(outcomes.values()) > 20


def test_what_many_tasks_of_a_node_need_is_made_by_one():
    made = []

    def write_slowly(target):
        made.append(target)
        time.sleep(0.2)
        target.write_bytes(b"x")

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: cached("some/file", write_slowly).read_bytes(), range(8)))
    assert found == [b"x"] * 8
    assert len(made) == 1
