"""Opens the files of an image set in a folder, a tar, a zip, or below an s3:// prefix.

Zips among them are read as if unpacked in place, and links as their targets. Files that must be local (an archive or
.npz from S3, a zip inside a zip, unpacked arrays) are stored once per machine in a cache folder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from data_shards.source.files.cache import copy_stamp, local_file, local_path
from data_shards.source.files.files import Files
from data_shards.source.files.folder import FolderFiles
from data_shards.source.files.nested import NestedFiles
from data_shards.source.files.prefix import StoreFiles
from data_shards.source.files.tar import TarFiles
from data_shards.source.files.zip import ZipFiles
from data_shards.store import open_store

if TYPE_CHECKING:
    from data_shards.store.s3.store import S3Store

# Published sets nest one zip in another; an archive that contains itself would never end.
_DEEPEST_ZIP = 3


def open_files(uri: str) -> Files:
    """The files of a folder, a .tar, a .zip, or an s3:// prefix, including those inside zips.

    ValueError if nothing is there, its kind is not supported, or an archive is damaged or hostile.
    """
    return _with_those_in_zips(_open(uri), uri)


def _open(uri: str) -> Files:
    if uri.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z", ".rar")):
        raise ValueError(
            f"{uri} is compressed, so single images cannot be read from it; unpack it to a folder or a .tar"
        )
    if uri.lower().endswith(".tar"):
        return TarFiles(archive := local_file(uri), copy_stamp(uri, archive.path()))
    if uri.lower().endswith(".zip"):
        return ZipFiles(local_file(uri))
    if uri.startswith("s3://"):
        return StoreFiles(cast("S3Store", open_store(uri)))
    folder = local_path(uri)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a supported file; a source is a folder, .zip, .tar, .csv, .xlsx or .npz")
    return FolderFiles(folder)


def _with_those_in_zips(files: Files, called: str, depth: int = 0) -> Files:
    zips = [name for name in files.names if name.lower().endswith(".zip")]
    if not zips:
        return files
    if depth == _DEEPEST_ZIP:
        raise ValueError(
            f"{zips[0]!r} in {called} is nested too deeply: zips are read {_DEEPEST_ZIP} levels deep; unpack it and "
            "use the folder as source"
        )
    inner = {}
    for name in zips:
        where = f"{called}/{name}"
        inner[name] = _with_those_in_zips(ZipFiles(files.local(name), called=where), where, depth + 1)
    return NestedFiles(files, inner, called)
