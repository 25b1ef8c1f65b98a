"""The leak report as one page: counts, and the images of each finding side by side."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable

import numpy as np
from PIL import Image

from data_shards.leakage import Copy, Finding, LeakReport

LEAKS_PAGE = "leakage.html"
MOST_SHOWN = 100  # findings with images: a page of some megabytes
_MOST_COPIES = 6
_SIDE = 160
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #1a1a1a }
table { border-collapse: collapse; margin: 1rem 0 } td, th { text-align: left; padding: .2rem 1.2rem .2rem 0 }
td.number { text-align: right; font-variant-numeric: tabular-nums }
section { border-top: 1px solid #ccc; padding: .6rem 0 } h2 { font-size: 1rem; margin: .2rem 0 }
figure { display: inline-block; margin: .4rem 1rem .4rem 0; vertical-align: top; max-width: 12rem }
figcaption { font-size: .8rem; overflow-wrap: anywhere } img { image-rendering: pixelated; background: #888 }
.across, .conflict { color: #a40000 }
@media (prefers-color-scheme: dark) {
  body { background: #161616; color: #e6e6e6 } .across, .conflict { color: #ff8a80 }
}
"""


def page(
    report: LeakReport, *, title: str, classes: tuple[str, ...], picture: Callable[[Copy], np.ndarray | None]
) -> str:
    """HTML that needs nothing else. `picture` gives a copy's pixels (H, W, C), or None where they cannot be had."""
    rows = "".join(f'<tr><td>{_e(what)}</td><td class="number">{n:,}</td></tr>' for what, n in report.counts.items())
    shown = [_section(number, f, classes, picture) for number, f in enumerate(report.findings[:MOST_SHOWN], 1)]
    rest = len(report.findings) + report.more - len(shown)
    more = f"<p>{rest:,} more findings are in leakage.json without pictures.</p>" if rest > 0 else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{_e(title)}: images that stand twice</title><style>{_STYLE}</style></head><body>
<h1>{_e(title)}: images that stand twice</h1>
<p>{report.images:,} images compared by their decoded pixels (exact) and by fingerprints that differ in at most
{report.near} of 168 bits (near); {report.blank:,} without structure by their pixels only; {report.undecodable:,} could
not be decoded. Copies in different splits: policy <b>{report.across}</b>. {len(report.dropped):,} images left out.</p>
<table><tr><th>copies beyond the first</th><th>images</th></tr>{rows}</table>
{"".join(shown) or "<p>No image stands twice.</p>"}{more}
</body></html>
"""


def _section(
    number: int, finding: Finding, classes: tuple[str, ...], picture: Callable[[Copy], np.ndarray | None]
) -> str:
    mark = "across" if finding.where != "within a split" else ""
    conflict = ', <span class="conflict">different labels</span>' if finding.conflict else ""
    figures = "".join(_figure(copy, classes, picture(copy)) for copy in finding.copies[:_MOST_COPIES])
    rest = len(finding.copies) - _MOST_COPIES
    more = f"<p>and {rest} more</p>" if rest > 0 else ""
    head = f'{number}. {finding.kind}, <span class="{mark}">{finding.where}</span>{conflict}'
    return f"<section><h2>{head}</h2>{figures}{more}</section>"


def _figure(copy: Copy, classes: tuple[str, ...], pixels_HWC: np.ndarray | None) -> str:
    known = () if copy.dataset else classes  # another dataset's labels have names of their own
    names = ", ".join(known[label] if label < len(known) else f"label {label}" for label in copy.labels)
    told = " · ".join(filter(None, (copy.dataset, copy.split, names, "" if copy.fate == "kept" else copy.fate)))
    image = "<p>(no picture)</p>" if pixels_HWC is None else _image(pixels_HWC)
    return f"<figure>{image}<figcaption>{_e(told)}<br>{copy.key}</figcaption></figure>"


def _image(pixels_HWC: np.ndarray) -> str:
    image = Image.fromarray(pixels_HWC[:, :, 0] if pixels_HWC.shape[2] == 1 else pixels_HWC)
    height, width = pixels_HWC.shape[:2]
    image.thumbnail((_SIDE, _SIDE))
    coded = io.BytesIO()
    image.save(coded, "PNG")
    # Small images are enlarged by the browser, pixel by pixel.
    scale = _SIDE / max(image.size)
    size = f'width="{round(image.width * scale)}" height="{round(image.height * scale)}"'
    data = base64.b64encode(coded.getvalue()).decode()
    return f'<img {size} alt="{width} x {height} pixels" src="data:image/png;base64,{data}">'


def _e(text: str) -> str:
    return html.escape(text)
