"""Debian's radosgw with a monitor and an object store in memory: a second real S3 server, with its own idea of S3."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import subprocess
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("radosgw", "radosgw-admin", "ceph", "ceph-mon", "ceph-osd", "monmaptool")
SETTINGS = """[global]
fsid = {fsid}
mon host = v1:127.0.0.1:{mon}
public addr = 127.0.0.1
ms bind msgr2 = false
auth cluster required = none
auth service required = none
auth client required = none
mon allow pool size one = true
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd crush chooseleaf type = 0
osd objectstore = memstore
memstore device bytes = 4294967296
mon data = {folder}/mon
osd data = {folder}/osd
rgw data = {folder}/rgw
rgw rados pool pg num min = 4
mon max pg per osd = 1000
run dir = {folder}
log file = {folder}/$name.log
admin socket = {folder}/$name.$pid.asok
"""


def missing() -> list[str]:
    """The programs that are not installed on this machine."""
    return [program for program in PROGRAMS if shutil.which(program) is None]


@contextlib.contextmanager
def radosgw(folder: Path, *, mon: int, port: int) -> Iterator[dict[str, str]]:
    """A fresh radosgw while the block lasts, at two free ports; what boto3 reads to reach it."""
    fsid, osd, secret = str(uuid.uuid4()), str(uuid.uuid4()), secrets.token_hex(16)
    settings = folder / "ceph.conf"
    settings.write_text(SETTINGS.format(fsid=fsid, mon=mon, folder=folder))

    def ask(program: str, *arguments: str) -> None:
        command = [program, "-c", str(settings), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{command}: {done.stderr}"

    for name in ("mon", "osd", "rgw"):
        (folder / name).mkdir()
    monitors = ["--create", "--addv", "a", f"[v1:127.0.0.1:{mon}]", "--fsid", fsid, str(folder / "map")]
    subprocess.run(["monmaptool", *monitors], check=True, capture_output=True)
    with contextlib.ExitStack() as running:

        def start(program: str, *arguments: str) -> None:
            out = running.enter_context((folder / f"{program}.out").open("wb"))
            process = subprocess.Popen([program, "-c", str(settings), *arguments, "-f"], stdout=out, stderr=out)
            running.callback(process.wait)
            running.callback(process.kill)

        ask("ceph-mon", "--mkfs", "-i", "a", "--monmap", str(folder / "map"))
        start("ceph-mon", "-i", "a")
        ask("ceph", "osd", "new", osd, "0")
        ask("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        start("ceph-osd", "-i", "0")
        start("radosgw", "-n", "client.rgw", "--rgw-frontends", f"beast endpoint=127.0.0.1:{port}")
        _wait(f"http://127.0.0.1:{port}", folder)
        user = ["--uid", "tests", "--display-name", "tests", "--access-key", "tests", "--secret-key", secret]
        ask("radosgw-admin", "-n", "client.rgw", "user", "create", *user)
        yield {
            "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{port}",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "tests",
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_EC2_METADATA_DISABLED": "true",
        }


def _wait(address: str, folder: Path, most_s: float = 180) -> None:
    deadline = time.monotonic() + most_s
    while True:
        try:
            urllib.request.urlopen(address, timeout=2)
            return
        except OSError:
            if time.monotonic() > deadline:
                raise AssertionError("\n".join(log.read_text()[-1000:] for log in folder.glob("*.log"))) from None
            time.sleep(0.2)
