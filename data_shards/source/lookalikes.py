"""Names that look alike: letters of other alphabets, full-width and invisible ones, and what is around a name.

The letters of Cyrillic and Greek that a font draws as Latin ones, from Unicode's list of confusable characters
(https://www.unicode.org/reports/tr39/), as far as keyboards have them.
"""

from __future__ import annotations

import re
import unicodedata

_CYRILLIC = str.maketrans("авекмнорстухіјѕһԁԛԝѵ", "abekmhopctyxijshdqwv")
_GREEK = str.maketrans("αικνορυχγϲ", "aikvopuxyc")
# Of these the small letter is drawn otherwise (μm is not mm), so they count only within a name that has Latin letters.
_CAPITALS = str.maketrans("ΑΒΕΖΗΙΚΜΝΟΡΤΥΧ", "ABEZHIKMNOPTYX")


def folded(name: str) -> str:
    """What two names have in common that differ in case, in spaces, or in letters that are drawn alike."""
    text = "".join(c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) != "Cf")
    text = "".join("-" if unicodedata.category(c) == "Pd" else c for c in text).replace("\u2019", "'")
    if re.search("[A-Za-z]", text):
        text = text.translate(_CAPITALS)
    return " ".join(text.casefold().translate(_CYRILLIC).translate(_GREEK).split())


def trimmed(name: str) -> str:
    """The name without spaces and underscores around it, and without dots behind it."""
    return re.sub(r"^[\s_]+|[\s_.]+$", "", name) or name


def described(name: str) -> str:
    """The name in quotes, and what its letters are where they only look like others: `'Benignа' (CYRILLIC ...)`."""
    unusual = (c for c in name if not c.isascii() and folded(f"x{c}").isascii())
    names = dict.fromkeys(unicodedata.name(c, f"U+{ord(c):04X}") for c in unusual)
    return f"{name!r} (with {', '.join(names)})" if names else repr(name)


def plainness(name: str) -> int:
    """How many characters of the name are drawn like others or are around it: 0 for one that is as it looks."""
    return sum(not c.isascii() and folded(f"x{c}").isascii() for c in name) + len(name) - len(trimmed(name))
