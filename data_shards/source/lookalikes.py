"""Names that look alike: letters of other alphabets, full-width and invisible characters, spaces around a name.

Cyrillic and Greek letters that look like Latin ones are from Unicode's list of confusable characters
(https://www.unicode.org/reports/tr39/), limited to those on keyboards.
"""

from __future__ import annotations

import re
import unicodedata

_CYRILLIC = str.maketrans("авекмнорстухіјѕһԁԛԝѵ", "abekmhopctyxijshdqwv")
_GREEK = str.maketrans("αικνορυχγϲ", "aikvopuxyc")
# Their lower-case forms look different (μm is not mm), so they are folded only in names that have Latin letters.
_CAPITALS = str.maketrans("ΑΒΕΖΗΙΚΜΝΟΡΤΥΧ", "ABEZHIKMNOPTYX")


def folded(name: str) -> str:
    """A key that is equal for names that differ only in case, spaces or letters that look alike."""
    text = "".join(c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) != "Cf")
    text = "".join("-" if unicodedata.category(c) == "Pd" else c for c in text).replace("\u2019", "'")
    if re.search("[A-Za-z]", text):
        text = text.translate(_CAPITALS)
    return " ".join(text.casefold().translate(_CYRILLIC).translate(_GREEK).split())


def trimmed(name: str) -> str:
    """The name without leading and trailing spaces and underscores, and without trailing dots."""
    return re.sub(r"^[\s_]+|[\s_.]+$", "", name) or name


def described(name: str) -> str:
    """The name in quotes, with the Unicode names of letters that look Latin: `'Benignа' (with CYRILLIC ...)`."""
    unusual = (c for c in name if not c.isascii() and folded(f"x{c}").isascii())
    names = dict.fromkeys(unicodedata.name(c, f"U+{ord(c):04X}") for c in unusual)
    return f"{name!r} (with {', '.join(names)})" if names else repr(name)


def plainness(name: str) -> int:
    """Number of characters in the name that look like Latin ones or would be trimmed; 0 for a plain name."""
    return sum(not c.isascii() and folded(f"x{c}").isascii() for c in name) + len(name) - len(trimmed(name))
