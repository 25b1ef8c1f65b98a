"""Links, special files and litter: a folder, a tar and a zip of the same things give the same files."""

import io
import os
import re
import stat
import tarfile
import zipfile

import pytest

from data_shards.config import DataConfig
from data_shards.source import open_source
from data_shards.source.files import folder as files_folder
from data_shards.source.files import links as files_links
from data_shards.source.files.litter import left_out
from data_shards.source.files.open import open_files

# Name -> content, a link (as a tuple: kind, target), or None for a folder.
HARD, SOFT = "hard", "soft"


def member(name, kind, target="", data=b""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, len(data)
    return info, data


def tar(*members, **options):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def as_folder(path, tree):
    for name, what in tree.items():
        place = path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if what is None:
            place.mkdir()
        elif isinstance(what, bytes):
            place.write_bytes(what)
        elif what[0] == SOFT:
            place.symlink_to(what[1])
        else:
            os.link(path / what[1], place)
    return path


def as_tar(path, tree):
    types = {SOFT: tarfile.SYMTYPE, HARD: tarfile.LNKTYPE}
    path.write_bytes(
        tar(
            *(
                member(name, tarfile.DIRTYPE)
                if what is None
                else member(name, tarfile.REGTYPE, data=what)
                if isinstance(what, bytes)
                else member(name, types[what[0]], what[1])
                for name, what in tree.items()
            )
        )
    )
    return path


def as_zip(path, tree):
    with zipfile.ZipFile(path, "w") as archive:
        for name, what in tree.items():
            info = zipfile.ZipInfo(f"{name}/" if what is None else name)
            info.create_system = 3
            if isinstance(what, tuple):
                info.external_attr = (stat.S_IFLNK | 0o777) << 16
                what = what[1].encode()
            archive.writestr(info, what or b"")
    return path


def all_three(tmp_path, tree):
    yield "folder", open_files(str(as_folder(tmp_path / "folder", tree)))
    yield "tar", open_files(str(as_tar(tmp_path / "set.tar", tree)))
    if not any(isinstance(what, tuple) and what[0] == HARD for what in tree.values()):
        yield "zip", open_files(str(as_zip(tmp_path / "set.zip", tree)))


def contents(files):
    found = {}
    for name in files.names:
        try:
            found[name] = files.read(name)
            with files.open(name, buffer_bytes=2) as file:
                assert file.read() == found[name]
        except OSError as error:
            found[name] = error.strerror
    return found


NOWHERE = "a link to a file that is not there"
TREES = {
    "a link to a file of its folder": (
        {"a/x.png": b"1", "a/y.png": (SOFT, "x.png")}, {"a/x.png": b"1", "a/y.png": b"1"}
    ),
    "a link to a file of another folder": (
        {"b/y.png": (SOFT, "../a/x.png"), "a/x.png": b"1"}, {"a/x.png": b"1", "b/y.png": b"1"}
    ),
    "a link to a link to a file": (
        {"a/x.png": b"1", "b/y.png": (SOFT, "../a/x.png"), "c/z.png": (SOFT, "../b/./y.png")},
        {"a/x.png": b"1", "b/y.png": b"1", "c/z.png": b"1"},
    ),
    "two links to one file": (
        {"a/x.png": b"1", "a/y.png": (SOFT, "x.png"), "a/z.png": (SOFT, "../a/x.png")},
        {"a/x.png": b"1", "a/y.png": b"1", "a/z.png": b"1"},
    ),
    "a link to a folder": (
        {"a/in/x.png": b"1", "a/y.png": b"2", "b": (SOFT, "a")},
        {"a/in/x.png": b"1", "a/y.png": b"2", "b/in/x.png": b"1", "b/y.png": b"2"},
    ),
    "a link to a folder with a link": (
        {"a/x.png": b"1", "b/y.png": (SOFT, "../a/x.png"), "c": (SOFT, "b")},
        {"a/x.png": b"1", "b/y.png": b"1", "c/y.png": b"1"},
    ),
    "a link through a link to a folder": (
        {"store/one/x.png": b"1", "now": (SOFT, "store/one"), "a/x.png": (SOFT, "../now/x.png")},
        {"store/one/x.png": b"1", "now/x.png": b"1", "a/x.png": b"1"},
    ),
    "a link and .. behind a link to a folder": (
        {"far/in/x.png": b"1", "far/y.png": b"2", "near": (SOFT, "far/in"), "a/z.png": (SOFT, "../near/../y.png")},
        {"far/in/x.png": b"1", "far/y.png": b"2", "near/x.png": b"1", "a/z.png": b"2"},
    ),
    "a link to nothing": (
        {"a/x.png": b"1", "a/y.png": (SOFT, "z.png")}, {"a/x.png": b"1", "a/y.png": NOWHERE}
    ),
    "a link to itself and two to each other": (
        {"a/x.png": b"1", "a/y.png": (SOFT, "y.png"), "a/v.png": (SOFT, "w.png"), "a/w.png": (SOFT, "v.png")},
        {
            "a/x.png": b"1", "a/y.png": "a link that leads back to itself",
            "a/v.png": "a link that leads back to itself", "a/w.png": "a link that leads back to itself",
        },
    ),
    "three links to their own folder": (
        {"a/x.png": b"1", "a/l1": (SOFT, "."), "a/l2": (SOFT, "../a"), "a/l3": (SOFT, "./.")}, {"a/x.png": b"1"}
    ),
    "a link to the whole set": ({"a/x.png": b"1", "a/all": (SOFT, "..")}, {"a/x.png": b"1"}),
    "two folders with links to each other": (
        {"a/x.png": b"1", "b/y.png": b"2", "a/b": (SOFT, "../b"), "b/a": (SOFT, "../a")},
        {"a/x.png": b"1", "b/y.png": b"2", "a/b/y.png": b"2", "b/a/x.png": b"1"},
    ),
    "links into a folder that is left out": (
        {".store/x": b"1", "a/x.png": (SOFT, "../.store/x"), "b": (SOFT, ".store")},
        {"a/x.png": b"1", "b/x": b"1"},
    ),
    "an empty folder behind a link": ({"a/x.png": b"1", "b": None, "c": (SOFT, "b")}, {"a/x.png": b"1"}),
    "hard links": (
        {"a/x.png": b"1", "b/y.png": (HARD, "a/x.png"), "c/z.png": (HARD, "b/y.png"), "d/s.png": (SOFT, "../c/z.png")},
        {"a/x.png": b"1", "b/y.png": b"1", "c/z.png": b"1", "d/s.png": b"1"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("tree", "expected"), TREES.values(), ids=TREES)
def test_links_lead_to_the_same_files_in_folder_tar_and_zip(tmp_path, tree, expected):
    folders = []
    for kind, files in all_three(tmp_path, tree):
        assert (kind, contents(files)) == (kind, expected)
        folders.append(files.folders)
    assert all(each == folders[0] for each in folders)


def test_links_that_are_not_followed_are_reported(tmp_path):
    tree = TREES["three links to their own folder"][0]
    for _, files in all_three(tmp_path, tree):
        assert files.notes == (
            "3 links lead to a folder that they are in and are not followed: a/l1, a/l2, a/l3",
        )  # fmt: skip


def test_a_class_folder_that_is_a_broken_link_is_named_as_one(tmp_path):
    tree = {f"{c}/x.png": b"1" for c in "ab"} | {"c": (SOFT, "gone/c"), "d": (SOFT, "d")}
    why = {"c": NOWHERE, "d": "a link that leads back to itself"}
    for kind, files in all_three(tmp_path, tree):
        assert (kind, files.broken) == (kind, why)
    for source in (tmp_path / "folder", tmp_path / "set.tar", tmp_path / "set.zip"):
        config = DataConfig(dataset="mine", layout="folders", source=str(source))
        notes = open_source(config).notes
        assert f"2 broken links are not read: c ({NOWHERE}), d ({why['d']})" in notes
        assert not any("1 file" in note for note in notes)
        with pytest.raises(
            ValueError, match=r"'c' .* is missing .*; 2 broken links are not read: c \(a link to a file"
        ):
            open_source(config.model_copy(update={"classes": ("a", "b", "c")}))


def test_a_split_class_folder_that_is_a_broken_link_is_named(tmp_path):
    tree = {f"{split}/{c}/x.png": b"1" for split in ("train", "test") for c in "ab"} | {"test/c": (SOFT, "../c")}
    reason = rf"1 broken link is not read: test/c \({NOWHERE}\)"
    as_tar(tmp_path / "without.tar", tree)
    config = DataConfig(dataset="mine", layout="folders", source=str(tmp_path / "without.tar"))
    assert any(re.fullmatch(reason, note) for note in open_source(config).notes)
    as_tar(tmp_path / "with.tar", tree | {"train/c/x.png": b"1"})
    with pytest.raises(ValueError, match=f"'c' .* in train, but none in test, .*; {reason}"):
        open_source(config.model_copy(update={"source": str(tmp_path / "with.tar")}))


def test_a_broken_link_to_a_tables_folder_is_named(tmp_path):
    tree = {"labels.csv": b"file,label\na/x.png,1\nb/y.png,0\n", "a/x.png": b"1", "b": (SOFT, "gone")}
    for kind, make in (("folder", as_folder), ("set.zip", as_zip)):
        config = DataConfig(dataset="mine", layout="table", source=str(make(tmp_path / kind, tree)), table="labels.csv")
        with pytest.raises(ValueError, match=rf"'b/y.png' .*; 1 broken link is not read: b \({NOWHERE}\); looked"):
            open_source(config)


@pytest.mark.parametrize("target", ["../../x.png", "/etc/hostname", "../.."])
def test_a_link_out_of_an_archive_is_a_file_that_cannot_be_read(tmp_path, target):
    tree = {"a/x.png": b"1", "a/y.png": (SOFT, target)}
    for make, name in ((as_tar, "set.tar"), (as_zip, "set.zip")):
        files = open_files(str(make(tmp_path / name, tree)))
        assert contents(files) == {"a/x.png": b"1", "a/y.png": "a link that leads out of the archive"}


def test_folders_that_link_to_each_other_are_refused_soon(tmp_path, monkeypatch):
    monkeypatch.setattr(files_links, "MOST_LINKED", 2000)
    monkeypatch.setattr(files_folder, "MOST_LINKED", 2000)
    names = [f"f{i}" for i in range(14)]
    tree = {f"{name}/{other}": (SOFT, f"../{other}") for name in names for other in names if other != name}
    for make, name in ((as_folder, "folder"), (as_tar, "set.tar"), (as_zip, "set.zip")):
        path = make(tmp_path / name, tree)
        with pytest.raises(ValueError, match="lead through each other to more than 2,000 folders; remove"):
            open_files(str(path))


def test_a_hard_link_is_what_had_the_name_when_it_was_packed(tmp_path):
    path = tmp_path / "set.tar"
    path.write_bytes(
        tar(
            member("a/x.png", tarfile.REGTYPE, data=b"old"),
            member("a/y.png", tarfile.LNKTYPE, "./a/x.png"),
            member("a/z.png", tarfile.LNKTYPE, "a/later.png"),
            member("a/x.png", tarfile.REGTYPE, data=b"newer"),
            member("a/later.png", tarfile.REGTYPE, data=b"1"),
        )
    )
    files = open_files(str(path))
    assert contents(files) == {"a/x.png": b"newer", "a/y.png": b"old", "a/z.png": NOWHERE, "a/later.png": b"1"}
    assert files.notes == ("1 names appear twice in the tar; the last one counts: a/x.png",)


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_and_long_targets_are_read(tmp_path, format):
    path, long = tmp_path / "set.tar", "a/" + "n" * 200 + "/ü.png"
    path.write_bytes(
        tar(
            member(long, tarfile.REGTYPE, data=b"1"),
            member("b/" + "l" * 150, tarfile.SYMTYPE, f"../{long}"),
            member("c/x.png", tarfile.LNKTYPE, long),
            format=format,
        )
    )
    assert contents(open_files(str(path))) == {long: b"1", "b/" + "l" * 150: b"1", "c/x.png": b"1"}


def test_a_sparse_member_has_its_zeros(tmp_path):
    info = tarfile.TarInfo("a/x.bin")
    packed, size = b"A" * 1024 + b"B" * 100, 9000
    info.pax_headers = {
        "GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.name": "a/x.bin",
        "GNU.sparse.size": str(size), "GNU.sparse.numblocks": "2", "GNU.sparse.map": "512,1024,8000,100",
    }  # fmt: skip
    info.size = len(packed)
    path = tmp_path / "set.tar"
    path.write_bytes(tar((info, packed), member("a/y.bin", tarfile.REGTYPE, data=b"1"), format=tarfile.PAX_FORMAT))
    with tarfile.open(path) as archive:
        expected = archive.extractfile("a/x.bin").read()
    assert len(expected) == size
    assert expected[512:516] == b"AAAA"
    assert contents(open_files(str(path))) == {"a/x.bin": expected, "a/y.bin": b"1"}


def test_devices_pipes_and_sockets_are_left_out_and_counted(tmp_path):
    path = tmp_path / "set.tar"
    image = member("a/x.png", tarfile.REGTYPE, data=b"1")
    path.write_bytes(tar(image, member("a/p", tarfile.FIFOTYPE), member("a/d", tarfile.CHRTYPE)))
    (folder := tmp_path / "folder" / "a").mkdir(parents=True)
    (folder / "x.png").write_bytes(b"1")
    os.mkfifo(folder / "p")
    (folder / "d").symlink_to("p")
    for source in (path, folder.parent):
        files = open_files(str(source))
        assert contents(files) == {"a/x.png": b"1"}
        assert files.notes == ("2 devices, pipes or sockets are left out: a/d, a/p",)


def test_a_tar_that_continues_after_its_last_header_is_refused(tmp_path):
    image = [member(f"a/{i}.png", tarfile.REGTYPE, data=bytes([i]) * 600) for i in range(5)]
    good, path = tar(*image), tmp_path / "set.tar"
    damaged = bytearray(good)
    damaged[3 * 1536 + 5] ^= 1  # in the name in the fourth header
    for data in (bytes(damaged), good + good):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="has unreadable bytes after its last header, at byte"):
            open_files(str(path))
    path.write_bytes(good[: 2 * 1536])
    assert open_files(str(path)).notes == ("the tar has no end mark, so files may be missing at its end",)


def test_a_name_that_leads_out_of_a_tar_is_refused(tmp_path):
    path = tmp_path / "set.tar"
    for name in ("../x.png", "a/../../x.png"):
        path.write_bytes(tar(member(name, tarfile.REGTYPE, data=b"1")))
        with pytest.raises(ValueError, match=r"contains '.*x.png', which leads outside it"):
            open_files(str(path))
    path.write_bytes(tar(member("/a/x.png", tarfile.REGTYPE, data=b"1")))
    assert open_files(str(path)).names == ["a/x.png"]


LITTER = [
    "a/1.png~", "a/#1.png#",
    "a/Thumbs.db", "a/thumbs.db", "a/THUMBS.DB", "a/ehthumbs.db", "a/Desktop.ini", "a/desktop.ini", "a/.DS_Store",
    "a/._x.png", "a/x.png:Zone.Identifier", "a/x.png\uf03aZone.Identifier", "a/Icon\r", "a/Icon", "a/~$notes.docx",
    "a/.ipynb_checkpoints/x-checkpoint.png", "a/@eaDir/x.png@SynoEAStream", "__macosx/a/._x.png", "lost+found/x.png",
    "a/x.bak", "a/x.png.BAK", "a/x.png.bak2", "a/y.TMP", "a/y.png.Temp", "a/z.png.part", "a/z.png.Partial",
    "a/z.png.filepart", "a/1.png.crdownload", "a/1.png.download", "a/2.png.Download/2.png", "a/1.png.aria2",
    "a/x.tif.aux.xml", "a/x.TIF.AUX.XML", "a/x.png.old", "a/x.png.orig", "a/x.png.swp",
    "$Recycle.Bin/x.png", "System Volume Information/x", "__pycache__/x.pyc", ".git/x", "#recycle/x.png",
]  # fmt: skip


def test_litter_is_left_out_and_counted_in_every_kind_of_source(tmp_path, s3):
    from data_shards.store import open_store

    tree = {name: b"junk" for name in LITTER} | {"a/x.png": b"1", "icon/y.png": b"2"}
    store = open_store(s3)
    for name, data in tree.items():
        store.put(name, data)
    for kind, files in (*all_three(tmp_path, tree), ("s3", open_files(s3))):
        assert contents(files) == {"a/x.png": b"1", "icon/y.png": b"2"}, kind
        assert files.folders == ["a", "icon"]
        assert len(files.notes) == 1
        assert files.notes[0].startswith(f"{len(LITTER)} hidden or left by other programs, so left out: ")


@pytest.mark.parametrize(
    "name",
    [
        "a/icons/x.png",
        "icon/x.png",
        "a/thumbs/x.png",
        "a/desktop.png",
        "a/x~.png",
        "a/bak.png",
        "a/x.tmp.png",
        "x.bak/1.png",
        "a/part",
        "a/x.parts",
        "a/old",
        "a/x.xml",
    ],
)
def test_names_that_only_resemble_litter_stay(name):
    assert not left_out(name)


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    as_folder(tmp_path / "set", {"a/x.png": b"1"})
    # As root every folder is readable, so one is removed between listing its parent and listing it.
    real = os.scandir

    def gone(path):
        if str(path).endswith("/a"):
            os.rename(path, tmp_path / "away")
        return real(path)

    monkeypatch.setattr(os, "scandir", gone)
    with pytest.raises(ValueError, match=r"set/a cannot be read .*, so its images would be missing"):
        open_files(str(tmp_path / "set"))
