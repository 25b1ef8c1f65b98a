"""A run's page and card: complete, escaped, self-contained, and the same bytes for the same records."""

import itertools
import json
import re
from html.parser import HTMLParser

import pytest
from reported_run import HOSTILE, store_run

from pipelines.cli import main
from pipelines.report.checklist import ITEMS
from pipelines.report.comparison import make_comparison, paired
from pipelines.report.make import JSON, MARKDOWN, PAGE, make_report
from pipelines.report.records import read_run
from pipelines.report.words import NOT_STATED, labels, number, plain

VOID = {"meta", "link", "img", "br", "input"}


class Parsed(HTMLParser):
    """The elements of a page with their attributes, its text, and whether every element is closed."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page.decode())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def attributes(self, name):
        return [attributes[name] for _, attributes in self.elements if name in attributes]


@pytest.fixture(scope="module", params=["multiclass", "ordinal", "multilabel"])
def made(request, tmp_path_factory):
    store = store_run(tmp_path_factory.mktemp("store"), classes=HOSTILE, task=request.param)
    return make_report(store, "r", images=0)


@pytest.fixture(scope="module")
def parsed(made):
    return Parsed(made.files[PAGE])


def test_hostile_names_are_text_and_nothing_else(parsed):
    assert parsed.open == []
    tags = {tag for tag, _ in parsed.elements}
    assert not tags & {"script", "iframe", "object", "embed", "form", "b", "i"}
    assert not [name for _, attributes in parsed.elements for name in attributes if name.startswith("on")]
    for name in HOSTILE:
        assert plain(name) in " ".join(parsed.text.split()), name
    assert "\u202e" not in parsed.text


def test_nothing_is_fetched(made, parsed):
    places = parsed.attributes("src") + parsed.attributes("href")
    assert places
    assert all(place.startswith(("#", "data:")) for place in places)
    style = re.search(rb"<style>(.*?)</style>", made.files[PAGE], re.DOTALL).group(1)
    assert b"@import" not in style
    assert re.findall(rb"url\((?!#)", made.files[PAGE]) == []


def test_every_link_ends_at_one_element(parsed):
    ids = parsed.attributes("id")
    assert len(ids) == len(set(ids))
    assert {place[1:] for place in parsed.attributes("href") if place.startswith("#")} <= set(ids)


def test_headings_tables_and_figures_can_be_read_aloud(parsed):
    levels = [int(tag[1]) for tag, _ in parsed.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    tags = [tag for tag, _ in parsed.elements]
    assert {"header", "nav", "main", "footer"} <= set(tags)
    assert tags.count("figure") == tags.count("svg") == tags.count("figcaption") == tags.count("details") == 9
    labels = [each["aria-label"] for _, each in parsed.elements if each.get("role") == "img"]
    assert len(labels) == 9
    assert all(len(label) > 20 for label in labels)
    assert all(each.get("scope") in ("row", "col") for tag, each in parsed.elements if tag == "th")


def test_the_same_records_are_the_same_bytes(tmp_path):
    one = make_report(store_run(tmp_path / "one", classes=HOSTILE), "r", images=0)
    two = make_report(store_run(tmp_path / "two", classes=HOSTILE), "r", images=0)
    assert one.files == two.files
    assert one.digest == two.digest
    other = make_report(store_run(tmp_path / "other", classes=HOSTILE, seed=3), "r", images=0)
    assert other.digest != one.digest


def test_the_page_has_the_figures_of_the_study(tmp_path):
    store = store_run(tmp_path)
    found = read_run(store, "r").study
    text = Parsed(make_report(store, "r", images=0).files[PAGE]).text
    for each in found.by_class:
        assert number(each.figures["auc"].value) in text
    assert found.sample_size in text
    assert "1.50" in text, "GPU-hours"
    assert "about $6.00" in text
    assert "2 images could not be decoded" in text
    assert "None: no images were asked for." in text


def test_a_run_of_an_earlier_release_has_a_page(tmp_path):
    store = store_run(tmp_path, validated=False, with_study=False)
    text = Parsed(make_report(store, "r").files[PAGE]).text
    assert "Not calibrated: no validation predictions" in text
    assert "the images cannot be shown" in text, "its shards are not there"


def test_a_run_that_is_not_evaluated_is_refused(tmp_path):
    store = store_run(tmp_path)
    store.put("runs/other/workflow.json", b"{}")
    with pytest.raises(ValueError, match="has not finished shard, train, evaluate; run `medmamba evaluate"):
        make_report(store, "other")


def test_predictions_that_were_changed_are_refused(tmp_path):
    store = store_run(tmp_path, with_study=False)
    store.put("runs/r/evaluate/predictions.parquet", b"PAR1")
    with pytest.raises(ValueError, match="changed afterwards"):
        make_report(store, "r")


def test_the_card_has_every_item_and_says_what_is_not_stated(made):
    card = json.loads(made.files[JSON])
    assert card == json.loads(json.dumps(made.card))
    answers = {each["item"]: each["answer"] for each in card["guidelines"]}
    assert len(answers) == len(ITEMS)
    assert answers["Ethical approval"] == answers["Funding"] == NOT_STATED
    assert answers["Performance with intervals"].startswith("AUC 0.")
    assert card["metrics"]["auc"]["low"] < card["metrics"]["auc"]["value"] < card["metrics"]["auc"]["high"]
    assert list(card["metrics_by_class"]) == card["model_details"]["classes"]


def test_the_card_as_markdown_shows_names_as_they_are(made):
    text = made.files[MARKDOWN].decode()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert re.search(r"(?<!\\)\]\(http", text) is None
    widths = {}
    for line in text.splitlines():
        if line.startswith("|"):
            widths.setdefault(len(re.findall(r"(?<!\\)\|", line)), []).append(line)
    assert {5, 9} <= set(widths), "the tables of figures and of operating points"


def test_two_runs_on_the_same_images_are_compared_in_pairs(tmp_path):
    store_run(tmp_path, "one")
    store = store_run(tmp_path, "two", seed=5)
    runs = [read_run(store, "one"), read_run(store, "two")]
    text = Parsed(make_comparison(runs)).text
    gap = runs[1].study.macro["auc"].value - runs[0].study.macro["auc"].value
    assert paired(*runs).macro["auc"].value == pytest.approx(gap, abs=1e-12)
    assert f"{gap:+.3f}" in text
    assert "two less one, on 120 images of 60 groups" in text


def test_runs_on_other_data_are_not_compared_in_pairs(tmp_path):
    store_run(tmp_path, "one")
    store = store_run(tmp_path, "two", manifest="6" * 64)
    text = Parsed(make_comparison([read_run(store, "one"), read_run(store, "two")])).text
    assert "two less one: no paired differences, the runs were evaluated on other data." in text


def test_the_command_writes_into_the_store_or_a_file(tmp_path, capsys):
    store = store_run(tmp_path / "store")
    assert main(["report", "--run", "r", "--store", store.uri]) == 0
    assert capsys.readouterr().out.split() == [f"{store.uri}/runs/r/report/report.html"]
    assert {PAGE, MARKDOWN, JSON} == {key.rpartition("/")[2] for key in store.list("runs/r/report/")}
    store_run(tmp_path / "store", "s", seed=2)
    page = tmp_path / "both.html"
    both = ["--run", "r", "--run", "s", "--store", store.uri]
    assert main(["report", *both, "--out", str(page), "--json"]) == 0
    assert [card["run"] for card in json.loads(capsys.readouterr().out)] == ["r", "s"]
    assert b"Paired differences" in page.read_bytes()
    assert main(["report", *both]) == 0
    assert re.search(r"runs/r/report/comparison-\w{12}\.html$", capsys.readouterr().out.strip())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "name a run with --run"),
        (["--run", "r", "--run", "r"], "given twice"),
        (["--run", "r", "--images", "51"], "must be from 0 to 50"),
        (["--run", "r", "--out", "."], "is a folder"),
    ],
)
def test_wrong_use_of_the_command_is_one_line(arguments, told, tmp_path, capsys):
    assert main(["report", *arguments, "--store", str(tmp_path)]) == 2
    assert told in capsys.readouterr().err


def test_a_run_that_does_not_exist_is_one_line(tmp_path, capsys):
    assert main(["report", "--run", "absent", "--store", str(tmp_path)]) == 1
    assert "run 'absent' not found" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.5, "0.500"), (1.0, "1.000"), (0.9997, "0.9997"), (0.999999, ">0.9999"), (-0.2, "-0.200")],
)
def test_a_number_is_shown_as_one_only_if_it_is(value, text):
    assert number(value) == text


def test_short_names_stay_different():
    assert labels(["x" * 30 + "1", "x" * 30 + "2", "y"]) == [f"{'x' * 21}… [1]", f"{'x' * 21}… [2]", "y"]
