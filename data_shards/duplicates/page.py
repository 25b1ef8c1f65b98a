"""The report of duplicates as one page: counts, and the images of each finding side by side."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable

import numpy as np
from PIL import Image

from data_shards.duplicates.report import Copy, DuplicatesReport, Finding, named_labels

PAGE = "duplicates.html"
EARLIER_PAGE = "leakage.html"
MOST_SHOWN = 100  # findings with images: a page of some megabytes
MOST_COPIES_SHOWN = 6  # of each finding
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
    report: DuplicatesReport,
    *,
    title: str,
    classes: tuple[str, ...],
    picture: Callable[[Copy], np.ndarray | None],
    named: Callable[[Copy], str] = lambda copy: "",
    most: int = MOST_SHOWN,
) -> str:
    """HTML without references to other files.

    Args:
        report: What was found.
        title: The dataset.
        classes: Its class names, for reports of earlier releases, which hold labels as numbers only.
        picture: Gives an image's pixels (H, W, C), or None where they cannot be read.
        named: Gives an image's file, for a page that stays with the owner of the images.
        most: Findings that are shown with their images.
    """
    rows = "".join(f'<tr><td>{_e(what)}</td><td class="number">{n:,}</td></tr>' for what, n in report.counts.items())
    shown = [
        _section(number, finding, classes, picture, named) for number, finding in enumerate(report.findings[:most], 1)
    ]
    num = len(report.findings) + report.more
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{_e(title)}: duplicates</title><style>{_STYLE}</style></head><body>
<h1>{_e(title)}: duplicates</h1>
<p>{report.images:,} images compared by their decoded pixels (exact) and by fingerprints that differ in at most
{report.near} of 168 bits (near); {report.blank:,} without structure by their pixels only; {report.undecodable:,} could
not be decoded. Duplicates in different splits: policy <b>{report.across}</b>. {len(report.dropped):,} images left
out. {_e(report.not_searched)}</p>
<table><tr><th>duplicates beyond the first</th><th>images</th></tr>{rows}</table>
<p>{num:,} groups of duplicates.</p>
{"".join(shown) or "<p>No image appears twice.</p>"}{_rest(report, len(shown))}
</body></html>
"""


def _rest(report: DuplicatesReport, shown: int) -> str:
    """How many groups are not on the page, and where they are."""
    listed = len(report.findings) - shown
    parts = [f"{listed:,} more groups are in leakage.json without pictures."] if listed else []
    parts += [f"{report.more:,} more groups were only counted."] if report.more else []
    return f"<p>{' '.join(parts)}</p>" if parts else ""


def _section(
    number: int,
    finding: Finding,
    classes: tuple[str, ...],
    picture: Callable[[Copy], np.ndarray | None],
    named: Callable[[Copy], str],
) -> str:
    mark = "across" if finding.where != "within a split" else ""
    conflict = ', <span class="conflict">different labels</span>' if finding.conflict else ""
    copies = finding.copies[:MOST_COPIES_SHOWN]
    figures = "".join(_figure(copy, classes, picture(copy), named(copy)) for copy in copies)
    rest = finding.rest(len(copies))
    more = f"<p>{rest}</p>" if rest else ""
    where = f'<span class="{mark}">{finding.where}</span>'
    head = f"{number}. {finding.head}, {where}{conflict}, {finding.num_copies:,} images"
    return f"<section><h2>{head}</h2>{figures}{more}</section>"


def _figure(copy: Copy, classes: tuple[str, ...], pixels_HWC: np.ndarray | None, name: str) -> str:
    known = () if copy.dataset else classes  # another dataset's labels have names of their own
    labels = ", ".join(copy.label_names or named_labels(copy.labels, known))
    shown = " · ".join(filter(None, (copy.dataset, copy.split, labels, "" if copy.fate == "kept" else copy.fate)))
    image = "<p>(no picture)</p>" if pixels_HWC is None else _image(pixels_HWC)
    file = f"<br>{_e(name)}" if name else ""
    return f"<figure>{image}<figcaption>{_e(shown)}<br>{copy.key}{file}</figcaption></figure>"


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
