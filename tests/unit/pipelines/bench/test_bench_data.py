from __future__ import annotations

import json

import numpy as np
import pytest

from pipelines.bench.conversion import check as written_right
from pipelines.bench.conversion import measure
from pipelines.bench.feed import KINDS, feed_table
from pipelines.bench.loading import LOADERS, TimedLoader
from pipelines.bench.work import Work, check, make_images, summarize
from pipelines.cli import main


@pytest.fixture(scope="module")
def works(tmp_path_factory) -> dict[str, Work]:
    """A dozen small images of each kind."""
    shared = {"num": 12, "batch": 4, "workers": 1, "repeats": 1}
    found = {
        "jpeg": Work(str(tmp_path_factory.mktemp("jpeg")), side=64, ending="jpg", target=32, min_area=0.3, **shared),
        "png": Work(str(tmp_path_factory.mktemp("png")), side=28, ending="png", target=28, min_area=0.0, **shared),
    }
    for work in found.values():
        make_images(work)
    return found


def delivered(work: Work, numbers: list[int]):
    for number in numbers:
        yield [number], work.picture(number, work.files[number])[None]


@pytest.mark.parametrize("name", ["medmamba", "DataLoader over PIL", "webdataset"])
@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_a_loader_that_delivers_each_image_once_has_figures(works, name, kind):
    loader = TimedLoader(name, works[kind])
    assert loader.why_not == ""
    assert [loader.time_epoch()["images"] for _ in range(2)] == [12, 12]
    del loader


def test_bench_takes_the_median_epoch_and_all_processor_time():
    found = summarize([{"images": 100, "seconds": s, "processor_s": 0.5} for s in (1, 2, 10)])
    assert found["images_per_s"] == 50
    assert found["processor_s_per_1000"] == pytest.approx(5)


def test_a_lost_repeated_or_altered_image_is_found_out(works):
    work = works["jpeg"]
    assert check(delivered(work, list(range(12))), work) == ""
    assert check(delivered(work, list(range(11))), work) == "1 images never arrived and 0 arrived more than once"
    assert check(delivered(work, [*range(12), 3]), work) == "0 images never arrived and 1 arrived more than once"
    altered = ((numbers, np.roll(images, 1, 0) // 2) for numbers, images in delivered(work, list(range(12))))
    assert "of 255 brighter or darker than PIL's" in check(altered, work)


def test_a_loader_that_is_not_installed_says_so(works, monkeypatch):
    def absent(work: Work):
        raise ModuleNotFoundError("No module named 'streaming'")

    monkeypatch.setitem(LOADERS, "MosaicML Streaming", absent)
    assert TimedLoader("MosaicML Streaming", works["png"]).why_not == "cannot be imported: No module named 'streaming'"


def test_bench_data_prints_json_and_nothing_else(capsys):
    asked = ["--images", "0", "--small-images", "64", "--batch", "16", "--repeats", "1", "--workers", "1"]
    chosen = ["--loaders", "medmamba", "--writers", "medmamba"]
    assert main(["bench", "data", *asked, *chosen, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    for half in ("loading", "conversion"):
        (row,) = figures[half]
        assert (row["by"], row["images"]) == ("medmamba", "PNG 28 px")
        assert row["mb_per_s"] > 0
        assert row["peak_gib"] > 0


def test_bench_data_measures_the_half_that_is_asked_for(capsys):
    asked = ["--images", "0", "--small-images", "64", "--batch", "16", "--repeats", "1", "--workers", "1"]
    chosen = ["--only", "conversion", "--writers", "webdataset ShardWriter"]
    assert main(["bench", "data", *asked, *chosen]) == 0
    told = capsys.readouterr().out
    assert "Conversion: PNG 28 px" in told
    assert "Loading" not in told


def test_bench_data_measures_the_loader_at_each_image_size(capsys):
    asked = ["--sides", "28", "--images", "16", "--batch", "8", "--repeats", "1", "--workers", "1"]
    assert main(["bench", "data", *asked, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert [(row["images"], row["by"]) for row in figures["feed"]] == [
        (f"{file} 28 px", kind) for file in ("PNG", "JPEG") for kind in ("whole, decoded", "whole, kept", "parts")
    ]
    assert all(row["images_per_s"] > 0 for row in figures["feed"])


def test_the_table_of_the_feed_has_a_line_for_each_kind_of_file():
    rows = [{"images": "PNG 28 px", "by": kind, "images_per_s": 1000 * (n + 1)} for n, kind in enumerate(KINDS)]
    rows.append({"images": "JPEG 28 px", "by": KINDS[0], "why_not": "wrong"})
    assert feed_table(rows)[1] == [("PNG 28 px", "1,000", "2,000", "3,000"), ("JPEG 28 px", "", "", "")]


@pytest.mark.parametrize("name", ["medmamba", "webdataset ShardWriter"])
@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_a_writer_that_keeps_each_image_has_figures(works, name, kind):
    found = measure(name, works[kind])
    assert "why_not" not in found
    assert found["images_per_s"] > 0
    assert found["bytes_written"] > sum(path.stat().st_size for path in works[kind].files)


def test_what_a_writer_lost_or_made_up_is_found_out(works):
    work = works["png"]
    files = [path.read_bytes() for path in work.files]
    assert written_right(iter(files), work, kept_as_is=True) == ""
    assert written_right(iter(files[1:]), work, kept_as_is=True) == "1 images are missing and 0 do not match any file"
    assert written_right(iter([*files, files[0]]), work, kept_as_is=True).endswith("1 do not match any file")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--images", "100"], "must be a multiple of --batch 64"),
        (["--workers", "0"], "must be at least 1"),
        (["--min-area", "0"], "must be above 0 and at most 1"),
        (["--loaders", "ffcv"], "available: medmamba"),
        (["--writers", "tar"], "available: medmamba"),
        (["--sides", "4"], "at least 8"),
        (["--sides", "28", "--images", "0"], "at least one batch"),
        (["--out", "nowhere/figures.json"], "its folder does not exist"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_what_cannot_be_meant_is_told_in_one_line(argv, message, capsys):
    assert main(["bench", "data", *argv]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert len(told.splitlines()) == 1
