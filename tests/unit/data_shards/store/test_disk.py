"""A full disk in one line: the place, what is free, what was needed."""

import contextlib
import errno
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from data_shards.source.files.open import open_files
from data_shards.store import StoreError, open_store
from data_shards.store.disk import DiskFullError, full_disk, is_full, says_full, size_text


@pytest.fixture
def small_disk(tmp_path):
    """A real disk of 2 MiB."""
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)], capture_output=True
    ).returncode:
        pytest.skip("this user may not mount a disk")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_cache_without_room_names_itself_and_the_size_needed(small_disk, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(small_disk))
    tar = tmp_path_factory.mktemp("set") / "set.tar"
    with tarfile.open(tar, "w") as archive:
        member = tarfile.TarInfo("a.npz")
        member.size = 5 << 20
        archive.addfile(member, io.BytesIO(bytes(member.size)))
    with pytest.raises(DiskFullError) as error:
        open_files(str(tar)).local("a.npz").path()
    assert f"the disk of {small_disk}/medmamba/sources " in str(error.value)
    assert "5.0 MiB needed" in str(error.value)
    assert "XDG_CACHE_HOME" in str(error.value)
    assert "a.npz" not in error.value.public


def test_no_room_for_temporary_files_is_one_line_with_the_disk(small_disk):
    with contextlib.suppress(OSError), (small_disk / "fill").open("wb") as file:
        file.write(bytes(4 << 20))
    script = (
        "import sys, tempfile\n"
        f"tempfile._candidate_tempdir_list = lambda: [{str(small_disk)!r}]\n"
        "from pipelines.cli import main\n"
        "sys.exit(main(['run', '--recipe', 'quickstart', '--store', sys.argv[1]]))"
    )
    store = str(small_disk.parent / "store")
    environment = {**os.environ, "TMPDIR": str(small_disk)}
    done = subprocess.run([sys.executable, "-c", script, store], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert done.stderr.startswith(f"medmamba: the disk of {small_disk} is full: no room for temporary files (0 B free)")
    assert "set TMPDIR" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_store_without_room_names_itself_and_both_sizes(small_disk):
    store = open_store(str(small_disk / "deep/store"))
    with pytest.raises(StoreError) as error:
        store.put("shards/a.tar", b"x" * 5_000_000)
    told = str(error.value)
    assert f"the disk of {small_disk}/deep/store had no room for shards/a.tar" in told
    assert "MiB free now" in told
    assert "4.8 MiB needed for this object" in told
    assert "use another store" in told
    assert list(store.list()) == []


def test_a_file_that_is_put_has_its_size_named_too(small_disk, tmp_path_factory):
    source = tmp_path_factory.mktemp("source") / "file"
    source.write_bytes(b"x" * 3_000_000)
    with pytest.raises(StoreError, match=r"2\.9 MiB needed"):
        open_store(str(small_disk)).put("a", source)


def test_a_disk_is_full_when_a_mebibyte_does_not_fit(small_disk):
    assert not is_full(small_disk / "not/there/yet")
    with contextlib.suppress(OSError):
        (small_disk / "a").write_bytes(b"x" * 1_500_000)
    assert is_full(small_disk)
    assert "is full: no room for it" in full_disk(small_disk, "it")


@pytest.mark.parametrize("path", ["/", "relative", "/no/such/place"])
def test_every_place_has_a_disk(path):
    assert f"the disk of {path}" in full_disk(Path(path), "it")


def test_only_what_speaks_of_a_full_disk_does():
    assert says_full(OSError(errno.EDQUOT, "x"))
    assert not says_full(OSError(errno.EACCES, "Permission denied"))
    assert not says_full(ValueError("a is 28; take 3"))


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (12 << 20, "12 MiB"), (3 << 40, "3.0 TiB")]
)
def test_sizes_are_read_with_their_unit(size, text):
    assert size_text(size) == text
