"""What the tests of infra/ share: where the files are, which versions are pinned, what a secret looks like."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
INFRA = ROOT / "infra"
SECRET_NAME = re.compile(r"KEY|SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
SECRET_VALUE = re.compile(r"AKIA[0-9A-Z]{12,}|-----BEGIN|eyJ[A-Za-z0-9_-]{10,}\.|://[^/\s:@]+:[^/\s@]+@")


def pinned(package: str) -> str:
    """The version of a package in constraints.txt."""
    return re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE).group(1)


def project_version() -> str:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def assert_image_is_pinned(image: str) -> None:
    """A tag that names a version, or a digest; our own image has the project's version."""
    name, _, tag = image.rpartition(":")
    assert name, f"{image} has no tag"
    assert "/" not in tag, f"{image} has no tag"
    assert re.match(r"v?\d+\.\d+", tag), f"{image} is not pinned to a version"
    if name.rpartition("/")[2] == "medmamba":
        assert tag in (f"{project_version()}-cpu", f"{project_version()}-cuda")


def strings(tree: object) -> Iterator[str]:
    """Every string in a parsed YAML document, keys too."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from strings(key)
            yield from strings(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from strings(value)
    elif isinstance(tree, str):
        yield tree
