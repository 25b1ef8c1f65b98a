"""Draws figures with matplotlib as SVG that is part of an HTML page: the same input gives the same bytes."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# From Okabe and Ito's palette for the color-blind, the light ones darkened: each has a contrast of 3 to white.
COLORS = ("#0072b2", "#c04a00", "#007a5a", "#a0457f", "#1a1a1a", "#7a6000", "#56309b", "#4d7f8f")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
GRAY = "#6b6b6b"
WIDTH, HEIGHT = 4.4, 3.7  # inches: on a phone of 360 px letters stay above 10 px
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "medmamba",
    "text.parse_math": False,  # class names may have dollar signs
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
}
_NOTHING = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def draw(name: str, paint: Callable[[Figure], None], *, width: float = WIDTH, height: float = HEIGHT) -> str:
    """An <svg> element. `name` makes its ids different from those of the other figures of a page."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        warnings.simplefilter("ignore", UserWarning)  # of letters that the font for measuring lacks
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=_NOTHING)
    return _inline(buffer.getvalue(), name)


def _inline(document: str, name: str) -> str:
    """Without what only a file of its own needs: declarations, namespaces, and a style that would be the page's too."""
    element = document[document.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r"<defs>\s*<style[^>]*>[^<]*</style>\s*</defs>", "", element)
    element = re.sub(r"<!--.*?-->", "", element, flags=re.DOTALL)
    return re.sub(r"<[^>]+>", lambda tag: _own_ids(tag.group(), name), element).strip()


def _own_ids(tag: str, name: str) -> str:
    if tag.startswith("<svg"):
        tag = re.sub(r' (?:xmlns(?::\w+)?|version|width|height)="[^"]*"', "", tag)
        tag = tag.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1)
    tag = tag.replace("xlink:href=", "href=")
    return re.sub(r'(\bid="|\bhref="#|url\(#)', rf"\g<1>{name}-", tag)
