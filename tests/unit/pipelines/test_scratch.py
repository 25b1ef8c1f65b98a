"""Temporary folders: gone after their block and after a kill, never while somebody works in them."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from data_shards.store.disk import DiskFullError
from pipelines.scratch import remove_left_behind, scratch

HOLDS = """
import sys, time
from pipelines.scratch import scratch
with scratch("checkpoint") as folder:
    (folder / "weights").write_bytes(b"x" * 1000)
    print(folder, flush=True)
    time.sleep(300)
"""


@pytest.fixture(autouse=True)
def own_tmpdir(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


@pytest.fixture
def small_disk(tmp_path):
    """A real disk of 2 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("this user may not mount a disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> None:
    with contextlib.suppress(OSError), (folder / "filled").open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


def another_process() -> tuple[subprocess.Popen, Path]:
    holder = subprocess.Popen([sys.executable, "-c", HOLDS], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    with holder.stdout:
        return holder, Path(holder.stdout.readline().strip())


def test_a_folder_exists_just_for_its_block_even_on_errors(tmp_path):
    def fails_in_it() -> None:
        with scratch("model") as folder:
            (folder / "deep").mkdir()
            (folder / "deep/file").write_bytes(b"x")
            assert folder.parent == tmp_path
            raise KeyError

    with pytest.raises(KeyError):
        fails_in_it()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_processs_folder_goes_and_a_held_one_stays():
    holder, held = another_process()
    killed, left = another_process()
    try:
        killed.kill()
        killed.wait()
        assert left.is_dir()
        with scratch("train") as folder:
            assert not left.exists()
            assert (held / "weights").is_file()
            assert remove_left_behind() == []
            assert folder.is_dir()
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    assert remove_left_behind() == [held]


def test_folders_of_others_and_links_are_left_alone(tmp_path):
    (tmp_path / "medmamba-elsewhere").mkdir()
    (tmp_path / "target").mkdir()
    (tmp_path / "target/file").touch()
    (tmp_path / "medmamba.link").symlink_to(tmp_path / "target")
    (tmp_path / "medmamba.file").touch()
    assert remove_left_behind() == []
    assert (tmp_path / "target/file").exists()
    assert (tmp_path / "medmamba.file").exists()


def saves_a_model() -> None:
    """8 MB through torch's writer, which says "enforce fail at inline_container.cc" of a full disk."""
    with scratch("checkpoint") as folder:
        torch.save(torch.zeros(2_000_000), folder / "weights.pt")


def test_a_full_tmpdir_is_named_with_free_and_needed_space(small_disk, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(small_disk))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with pytest.raises(
        DiskFullError, match=r"more than \d.*iB needed\); free some space there, or set TMPDIR"
    ) as error:
        saves_a_model()
    assert f"the disk of {small_disk} is full" in str(error.value)
    assert list(small_disk.iterdir()) == []


def test_a_tmpdir_without_room_for_a_folder_is_named_too(small_disk, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(small_disk))
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    fill(small_disk)
    with pytest.raises(DiskFullError, match=f"the disk of {small_disk} is full"):
        saves_a_model()


def test_an_error_on_a_disk_with_room_stays_what_it_is(tmp_path):
    def fails() -> None:
        with scratch("checkpoint"):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fails()
