"""The pages in a real browser: on a phone, a tablet and a screen they are quiet, complete and not too wide."""

import pytest
from chromium import PROGRAM, browser
from reported_run import HOSTILE, store_run

from pipelines.report.comparison import make_comparison
from pipelines.report.make import PAGE, make_report
from pipelines.report.records import read_run

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs chromium: apt-get install chromium")
WIDTHS = (360, 768, 1440)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    store_run(folder / "store", "one", HOSTILE)
    store = store_run(folder / "store", "two", HOSTILE, seed=4)
    (folder / "run.html").write_bytes(make_report(store, "one", images=0).files[PAGE])
    both = [read_run(store, name) for name in ("one", "two")]
    (folder / "comparison.html").write_bytes(make_comparison(both))
    return folder


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


def messages(tab):
    kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
    return [event for event in tab.events if event.get("method") in kinds]


def requests(tab):
    asked = [e["params"]["request"]["url"] for e in tab.events if e.get("method") == "Network.requestWillBeSent"]
    return [url for url in asked if not url.startswith("data:")]


@pytest.mark.parametrize("name", ["run.html", "comparison.html"])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_page_is_quiet_and_fits_the_window(name, width, pages, tab):
    page = pages / name
    tab.open(page, width)
    assert tab.value("document.documentElement.scrollWidth") <= width
    assert tab.value("document.querySelectorAll('svg').length") == (9 if name == "run.html" else 3)
    narrowest = "Math.min(...[...document.querySelectorAll('svg')].map(e => e.getBoundingClientRect().width))"
    assert tab.value(narrowest) > 250
    assert messages(tab) == []
    assert requests(tab) == [page.as_uri()]


def test_noise_and_requests_would_be_noticed(tmp_path, tab):
    page = tmp_path / "noisy.html"
    wide = "<div style='width:900px'>x</div>"
    page.write_text(f"<!doctype html>{wide}<img src='absent.png'><script>console.log('noise')</script>")
    tab.open(page, 360)
    assert tab.value("document.documentElement.scrollWidth") > 360
    assert messages(tab) != []
    assert len(requests(tab)) == 2
