"""Some rounds of promotions and registrations that race, are killed and are paused (registry_races.py does more)."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "pipelines"))
import registry_races as races

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def services(tmp_path_factory):
    if not list(Path("/usr/lib/postgresql").glob("*/bin/postgres")):
        pytest.skip("PostgreSQL is not installed (Debian's postgresql)")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "")  # given back at the end
        with races.postgres_and_s3(tmp_path_factory.mktemp("races")) as on:
            yield on


@pytest.fixture
def about(tmp_path):
    return {"folder": tmp_path, "chance": random.Random(0)}


@pytest.mark.parametrize("number", range(5))
def test_the_better_of_two_promotions_wins_even_if_one_is_killed(services, about, number):
    races.race(services, f"two-{number}", contenders=2, kills=number % 2, window_s=4.5, **about)


def test_the_best_of_twenty_promotions_wins_with_eight_killed(services, about):
    races.race(services, "twenty", contenders=20, kills=8, window_s=30, **about)


@pytest.mark.parametrize("number", range(2))
def test_a_promotion_paused_before_its_move_keeps_a_better_one(services, about, number):
    races.race_paused(services, f"paused-{number}", **about)


def test_five_registrations_with_two_killed_make_one_version(services, about):
    races.race_registrations(services, "registered", **about)


def test_the_best_of_five_commands_wins_with_two_killed(about, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    races.race_commands(races.folder_and_sqlite(tmp_path), "commands", **about)
