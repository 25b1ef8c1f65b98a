"""Damage for fuzz tests: seeds of bytes, altered as disks, networks and bad writers alter them."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

# Numbers that lengths, counts and offsets are often misread at.
_EDGES = [b"\0", b"\xff", b"\x7f", b"\x80", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"]


@st.composite
def damaged(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """One of the seeds with one to eight alterations; the whole seed is drawn too, so that the harness is tested."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 8))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(["bit", "edge", "bytes", "cut", "drop", "repeat", "splice", "near"])):
            case "bit" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "edge":
                edge = draw(st.sampled_from(_EDGES))
                data[at : at + len(edge)] = edge
            case "bytes":
                new = draw(st.binary(max_size=8))
                data[at : at + draw(st.integers(0, 8))] = new
            case "cut":
                del data[at:]
            case "drop":
                del data[at : at + draw(st.integers(1, 64))]
            case "repeat":
                data[at:at] = data[at : at + draw(st.integers(1, 64))]
            case "splice":
                other = draw(st.sampled_from(seeds))
                data[at:] = other[draw(st.integers(0, len(other))) :]
            case "near" if data:
                data[at] = (data[at] + draw(st.sampled_from([1, 255]))) % 256
    return bytes(data)


# What a field may not be where it becomes a path, a size or a shape. VICTIM is replaced by a file of the test.
_HOSTILE = [
    "VICTIM", "../VICTIM", "/dev/zero", "..", ".", "", "a/b", "a\0b", "\x1b[2J", "[red]x[/red]", "x" * 5000, "0" * 64,
    "train-00000", "../../train-00000", -1, 0, 1, 2**31, 2**62, 2**63 - 1, 2**63, 10**30, 1e308, float("nan"),
    float("-inf"), True, None, [], {}, [[[]]], [10**12] * 3,
]  # fmt: skip


def hostile_json(seed: bytes) -> st.SearchStrategy[bytes]:
    """The seed with one to three values, anywhere in it, replaced by what somebody would choose to do harm."""
    return altered_json(seed, st.sampled_from(_HOSTILE))


@st.composite
def altered_json(draw: st.DrawFn, seed: bytes, values: st.SearchStrategy[Any] | None = None) -> bytes:
    """The seed with one to three values, anywhere in it, replaced (by one of `values`) or removed."""
    document = json.loads(seed)
    anything = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just([]), st.just({}),
        st.lists(st.integers(), max_size=2),
    )  # fmt: skip
    for _ in range(draw(st.integers(1, 3))):
        places = [(document, key) for key in _keys(document)]
        for parent, key in places:
            places += [(parent[key], inner) for inner in _keys(parent[key])]
        parent, key = draw(st.sampled_from(places))
        if draw(st.booleans()):
            parent[key] = copy.deepcopy(draw(anything if values is None else values))  # the next round may change it
        else:
            del parent[key]
            if not document:
                break
    return json.dumps(document).encode()


def _keys(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value)
    return list(range(len(value))) if isinstance(value, list) else []
