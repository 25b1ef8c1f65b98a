"""`medmamba datasets fetch` and `verify`: terms first, files after, and the next command, which works."""

import json
import shlex
import zipfile
from pathlib import Path

import pytest
from http_server import Site, answers, drops_after, running, without_length

from data_shards import catalog
from data_shards.config import DataConfig
from data_shards.source import open_source
from pipelines.cli import main

PUBLISHED = [name for name in catalog.names() if catalog.card(name).files]
PRIVATE = ["cervical-us", "otoscopy2024"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def breastmnist(shared_dir):
    """The real file, on a server of our own."""
    with running(Site((shared_dir / "data" / "breastmnist.npz").read_bytes(), etag='"1"')) as site:
        yield site


def mirror(site):
    return ["--mirror", site.url.rpartition("/")[0]]


def fetched(capsys, *argv, code=0):
    assert main(["datasets", "fetch", *argv]) == code
    told = capsys.readouterr()
    return told.out, told.err


def test_a_set_is_fetched_checked_opened_and_the_next_step_named(breastmnist, capsys, tmp_path):
    breastmnist.script.append(drops_after(100_000))
    out, _ = fetched(capsys, "breastmnist", *mirror(breastmnist), "--json")
    result = json.loads(out)
    assert result["source"] == "medmamba-data/breastmnist/breastmnist.npz"
    (file,) = result["files"]
    assert (file["state"], file["checked"], file["md5"]) == ("fetched", "md5", breastmnist.md5)
    assert breastmnist.ranges == ["", "bytes=100000-"]
    assert len(open_source(DataConfig(dataset="breastmnist", source=result["source"])).rows) == 780
    words = shlex.split(result["next"])
    assert words[:6] == ["medmamba", "run", "direct", "--recipe", "breastmnist", "--run"]
    assert main([*words[1:], "--dry-run"]) == 0
    capsys.readouterr()
    again = json.loads(fetched(capsys, "breastmnist", *mirror(breastmnist), "--json")[0])
    assert again["files"][0]["state"] == "already there"


def test_license_and_citation_come_before_any_request(capsys):
    with running(Site(b"")) as site:
        site.script.append(answers(404))
        _, err = fetched(capsys, "dermamnist", *mirror(site), code=1)
    lines = err.splitlines()
    assert lines[0].startswith("Pigmented skin lesions: CC BY-NC 4.0, https://zenodo.org")
    assert lines[1].startswith("cite: Yang et al., MedMNIST v2")
    assert lines[2].startswith("NC: do not use these images primarily for")
    assert lines[3].startswith("BY: ")
    assert lines[4].startswith("dermamnist.npz: from http://127.0.0.1")
    assert lines[-1].startswith("medmamba: http://127.0.0.1")
    assert "refused with 404" in lines[-1]


def test_a_set_without_known_checksum_shows_terms_and_md5(capsys, tmp_path):
    with zipfile.ZipFile(tmp_path / "made.zip", "w") as archive:
        archive.writestr("kvasir-dataset/polyps/1.jpg", b"x")
    with running(Site((tmp_path / "made.zip").read_bytes())) as site:
        site.script.append(without_length)
        out, err = fetched(capsys, "kvasir", *mirror(site), "--to", "here")
    assert "research and education only: any other use needs the owners' written permission" in err
    assert f"kvasir-dataset.zip: no published checksum to compare with; its MD5 is {site.md5}" in out
    last = "next: medmamba run direct --recipe paper --run kvasir --data.dataset kvasir"
    assert f"{last} --data.source here/kvasir-dataset.zip" in out
    assert zipfile.is_zipfile("here/kvasir-dataset.zip")


def test_a_set_of_several_files_is_its_whole_folder(capsys, monkeypatch):
    card = catalog.card("pad-ufes-20")
    bare = {name: file.model_copy(update={"sha256": "", "size_bytes": 0}) for name, file in card.files.items()}
    with zipfile.ZipFile("part.zip", "w") as archive:
        archive.writestr("imgs_part_1/x.png", b"x")
    with running(Site(Path("part.zip").read_bytes())) as site:
        monkeypatch.setattr("pipelines.commands.datasets.card", lambda name: card.model_copy(update={"files": bare}))
        out, _ = fetched(capsys, "pad-ufes-20", *mirror(site), "--file", "images/imgs_part_1.zip")
        assert "the dataset is incomplete; still missing: metadata.csv, images/imgs_part_2.zip" in " ".join(out.split())
        assert "next:" not in out
        result = json.loads(fetched(capsys, "pad-ufes-20", *mirror(site), "--json")[0])
    assert [file["state"] for file in result["files"]] == ["fetched", "already there", "fetched", "fetched"]
    assert result["source"] == "medmamba-data/pad-ufes-20"
    assert site.paths[1:] == [f"/files/{name}" for name in card.files if name != "images/imgs_part_1.zip"]


def test_another_file_than_the_published_one_is_exit_code_1(capsys):
    with running(Site(b"no table")) as site:
        _, err = fetched(capsys, "pad-ufes-20", *mirror(site), "--file", "metadata.csv", code=1)
    assert "offers 8 bytes, but 316,209 were published" in err


def test_a_set_too_large_for_the_disk_is_refused_before_fetching(capsys, monkeypatch):
    card = catalog.card("fetal-planes-db")
    huge = {name: file.model_copy(update={"size_bytes": 1 << 60}) for name, file in card.files.items()}
    monkeypatch.setattr("pipelines.commands.datasets.card", lambda name: card.model_copy(update={"files": huge}))
    with running(Site(b"")) as site:
        _, err = fetched(capsys, "fetal-planes-db", *mirror(site), code=1)
    assert "are needed: free some" in err
    assert site.asked == []


@pytest.mark.parametrize("name", PRIVATE)
def test_a_private_set_is_told_how_to_be_placed_by_hand(name, capsys, tmp_path):
    out, _ = fetched(capsys, name, code=1)
    assert out.startswith(f"{name} cannot be fetched: private: ")
    assert [line.strip() for line in out.splitlines() if line.endswith("/")] == [
        f"{name}/", *(f"{label}/" for label in catalog.card(name).classes)
    ]  # fmt: skip
    result = json.loads(fetched(capsys, name, "--json", code=1)[0])
    for folder in result["tree"][1:]:
        path = tmp_path / name / folder.strip()
        path.mkdir(parents=True)
        (path / "1.png").write_bytes(b"x")
    assert len(open_source(DataConfig(dataset=name, source=name)).rows) == len(catalog.card(name).classes)
    assert main([*shlex.split(result["next"])[1:], "--dry-run"]) == 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_suggested_command_is_one_the_command_line_takes(name, capsys):
    from pipelines.commands.datasets import _next_command

    Path("some where").mkdir()
    with zipfile.ZipFile("some where/x.zip", "w") as archive:  # a dry run looks whether it is there, with its classes
        for label in catalog.card(name).classes:
            archive.writestr(f"{label}/1.png", b"")
    words = shlex.split(_next_command(catalog.card(name), "some where/x.zip"))
    assert main([*words[1:], "--dry-run", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)["recipe"]["data"]
    assert (data["dataset"], data["source"]) == (name, "some where/x.zip")


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["fetch", "kvasr"], "did you mean 'kvasir'"),
        (["fetch"], "Missing from medmamba datasets fetch: NAME"),
        (["fetch", "phantoms"], "generated when they are needed"),
        (
            ["fetch", "bloodmnist", "--file", "bloodmnist_256.npz"],
            "no file bloodmnist_256.npz; did you mean ",
        ),
        (["fetch", "bloodmnist", "--mirror", "ftp://x"], "--mirror ftp://x is not a URL"),
        (["fetch", "bloodmnist", "--too", "x"], "datasets fetch: Unrecognized options: --too"),
        (["verify", "bloodmnist"], "give at least one file"),
        (["verify", "blood", "x"], "is not in the catalog"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_use_is_one_line_and_exit_code_2(argv, line, capsys):
    assert main(["datasets", *argv]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert line in err


def test_files_that_one_has_are_compared_with_the_published_ones(shared_dir, capsys, tmp_path):
    real = shared_dir / "data" / "breastmnist.npz"
    assert main(["datasets", "verify", "breastmnist", str(real)]) == 0
    assert "as published" in capsys.readouterr().out
    (tmp_path / "breastmnist.npz").write_bytes(real.read_bytes()[:-1] + b"x")
    (tmp_path / "breastmnist_64.npz").write_bytes(b"x")
    assert main(["datasets", "verify", "breastmnist", str(tmp_path), "--json"]) == 1
    first, second = json.loads(capsys.readouterr().out)
    assert first["fault"].startswith("its MD5 is")
    assert second["path"] == str(tmp_path / "breastmnist_64.npz")


@pytest.mark.parametrize(
    ("name", "path", "line"),
    [
        ("breastmnist", "other.npz", "is none of the files published for breastmnist"),
        ("breastmnist", ".", "contains none of the files published for breastmnist"),
        ("breastmnist", "gone.npz", "not found"),
        ("otoscopy2024", "other.npz", "has no published files to compare with: private"),
    ],
)
def test_a_path_that_cannot_be_compared_is_named(name, path, line, capsys, tmp_path):
    (tmp_path / "other.npz").write_bytes(b"")
    assert main(["datasets", "verify", name, path]) == 1
    assert line in capsys.readouterr().err
