"""Options of the command line and names, as a message shows them."""

from __future__ import annotations

import shlex
import unicodedata
from collections.abc import Sequence

_SHOWN = 10  # names in a message at most
_CONTROLS = {"Cc", "Zl", "Zp"}  # Unicode's categories of what ends a line or cannot be seen, tabs among them


def listed(names: Sequence[str]) -> str:
    """The names for a message, the first ones if there are many."""
    shown = ", ".join(name or "'' (no label)" for name in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def option(name: str, *values: str) -> str:
    """An option of the command line with its values, as a shell takes them."""
    return " ".join([f"--data.{name}", *map(quoted, values)])


def quoted(value: str) -> str:
    """The value as users type it in a shell, in one line: `'a b'`, and `$'a\\nb'` for a line feed in it."""
    if not any(unicodedata.category(c) in _CONTROLS for c in value):
        return shlex.quote(value)
    plain = value.replace("\\", r"\\").replace("'", r"\'").replace("\n", r"\n").replace("\t", r"\t")
    coded = (
        "".join(f"\\x{byte:02x}" for byte in c.encode()) if unicodedata.category(c) in _CONTROLS else c for c in plain
    )
    return f"$'{''.join(coded)}'"


def printable(text: str) -> str:
    """The text with everything that a terminal would act on, or cannot show, as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def listing_command(verb: str, dataset: str, name: str, uri: str) -> str:
    """The command that lists what a conversion into `uri` left out (`medmamba shards <verb>`), with file names."""
    place = f"/datasets/{dataset}/{name}"
    store = f" --store {shlex.quote(uri.removesuffix(place))}" if uri.endswith(place) else ""
    return f"medmamba shards {verb} {dataset}/{name} --names{store}"
