"""Samples -> tar bytes -> samples. The same samples always give the same bytes.

Members, in this order: `<key>.cls` (the class index; not in multilabel sets), the image `<key>.jpg` or `<key>.png`
and `<key>.json` (key, labels, group, split), sorted by extension as webdataset's TarWriter does. It is not used
here because importing webdataset imports torch, which costs every shard worker 1.4 s and its memory; a test holds
that the bytes are those TarWriter would write.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from data_shards.decode import UndecodableImage, stored_bytes
from data_shards.plan import PlannedRow, ShardPlan, shard_digest
from data_shards.store import Store, StoreKeyError

if TYPE_CHECKING:
    from data_shards.config import DataConfig
    from data_shards.source import ImageSet

IMAGE_MEMBERS = ("png", "jpg")


class Sample(BaseModel):
    """One image in a shard; `offset` and `size` are those of the coded image in the tar, in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    labels: tuple[int, ...]
    group: str
    offset: int
    size: int
    height: int
    width: int
    channels: int


class Quarantined(BaseModel):
    """A row whose image could not be decoded, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    reason: str


class ShardPart(BaseModel):
    """What is known of a written shard; as `parts/<name>.json`, written after the tar, it is its commit mark."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    split: str
    plan: str
    bytes: int
    sha256: str
    samples: tuple[Sample, ...]
    quarantine: tuple[Quarantined, ...]


def tar_key(name: str) -> str:
    """Where a shard lies in its dataset's store."""
    return f"shards/{name}.tar"


def part_key(name: str) -> str:
    """Where a shard's commit mark lies in its dataset's store."""
    return f"parts/{name}.json"


def find_shard(plan: ShardPlan, config: DataConfig, out: Store) -> ShardPart | None:
    """The finished shard of exactly this plan, if the store has it."""
    try:
        part = ShardPart.model_validate_json(out.get(part_key(plan.name)))
    except (StoreKeyError, ValidationError):
        return None
    finished = part.plan == shard_digest(plan, config) and out.head(tar_key(plan.name)) == part.bytes
    return part if finished else None


def write_shard(plan: ShardPlan, image_set: ImageSet, config: DataConfig, out: Store) -> ShardPart:
    """Encodes the rows of a plan into one tar in the store, then writes its commit mark.

    An image that cannot be decoded is set aside in the part's `quarantine` with its reason.
    """
    buffer = io.BytesIO()
    samples: list[Sample] = []
    quarantine: list[Quarantined] = []
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for planned in plan.rows:
            try:
                image, member, shape = stored_bytes(image_set.read(planned.row), max_side=config.max_side)
            except UndecodableImage as error:
                quarantine.append(Quarantined(key=planned.key, reason=error.reason))
                continue
            members = {member: image, "json": _facts(planned, plan.split)}
            if image_set.task != "multilabel":
                members["cls"] = str(planned.row.labels[0]).encode()
            offset = _add(tar, planned.key, members)[member]
            height, width, channels = shape
            samples.append(
                Sample(
                    key=planned.key,
                    labels=planned.row.labels,
                    group=planned.group,
                    offset=offset,
                    size=len(image),
                    height=height,
                    width=width,
                    channels=channels,
                )
            )
    data = buffer.getvalue()
    part = ShardPart(
        name=plan.name,
        split=plan.split,
        plan=shard_digest(plan, config),
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        samples=tuple(samples),
        quarantine=tuple(quarantine),
    )
    out.put(tar_key(plan.name), data)
    out.put(part_key(plan.name), part.model_dump_json().encode())
    return part


def read_samples(shard: bytes | Path) -> Iterator[dict[str, Any]]:
    """The samples of a shard in order: the fields of their `.json`, with `member` (png or jpg) and `image` (bytes)."""
    data = shard.read_bytes() if isinstance(shard, Path) else shard
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members: dict[str, dict[str, bytes]] = {}
        for info in tar:
            key, _, extension = info.name.partition(".")
            members.setdefault(key, {})[extension] = tar.extractfile(info).read()  # type: ignore[union-attr]
    for found in members.values():
        member = next(extension for extension in IMAGE_MEMBERS if extension in found)
        yield {**json.loads(found["json"]), "member": member, "image": found[member]}


def _facts(planned: PlannedRow, split: str) -> bytes:
    facts = {"group": planned.group, "key": planned.key, "labels": list(planned.row.labels), "split": split}
    return json.dumps(facts, separators=(",", ":")).encode()


def _add(tar: tarfile.TarFile, key: str, members: dict[str, bytes]) -> dict[str, int]:
    """Appends the members of a sample; the position of each one's data in the tar."""
    offsets = {}
    for extension, data in sorted(members.items()):
        info = tarfile.TarInfo(f"{key}.{extension}")  # owner, group and time are all zero or empty
        info.size, info.mode = len(data), 0o444
        offsets[extension] = tar.offset + tarfile.BLOCKSIZE
        tar.addfile(info, io.BytesIO(data))
    return offsets
