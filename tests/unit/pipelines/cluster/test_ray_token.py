"""The token of an embedded Ray: kept in the user's cache, or where that cannot be written to, in a temporary folder."""

import os
import stat

import pytest

from pipelines.cluster import ray_session


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache's folder, for a user who has named no token."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # so that what is set below is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(ray_session, "temporary_folder", lambda: str(tmp_path))
    return tmp_path / "cache"


def test_a_token_is_made_once_for_the_user_alone(cache):
    path = ray_session._token_file()
    assert path == cache / "medmamba" / "ray-token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    token = path.read_text()
    assert len(token) == 64
    assert ray_session._token_file().read_text() == token
    assert [each.name for each in path.parent.iterdir()] == ["ray-token"]


def test_an_empty_token_that_a_full_disk_left_is_made_again(cache):
    (cache / "medmamba").mkdir(parents=True)
    (cache / "medmamba" / "ray-token").touch()
    ray_session._own_token()
    with open(os.environ["RAY_AUTH_TOKEN_PATH"]) as file:
        assert len(file.read()) == 64


def test_without_a_cache_the_token_is_in_a_temporary_folder(cache, tmp_path):
    cache.write_text("a file where the folder should be")
    ray_session._own_token()
    path = tmp_path / f"medmamba-{os.getuid()}" / "ray-token"
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(path)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_an_empty_cache_name_puts_no_token_in_the_folder(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    ray_session._own_token()
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "home" / ".cache" / "medmamba" / "ray-token")
