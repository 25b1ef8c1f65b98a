"""Two at once: one version a run, one champion, one driver; what was written late is put back; one store a model."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict, replace

import pytest
import registered

from data_shards.store import open_store
from data_shards.store.claims import Claim
from data_shards.store.fenced_lease import LostLeaseError
from data_shards.store.holder import Holder, this_process
from pipelines.steps.promote import DECISION
from pipelines.tracking import make_once, open_tracking
from pipelines.tracking.leases import STORE_ID_TAG, STORE_TAG, OtherStoreError, bind_model, driver_lease
from pipelines.tracking.promoted import describe_promotion
from pipelines.tracking.promotions import Promotion
from pipelines.tracking.registry import by_alias, by_number, find_versions, move_alias, versions

ELSEWHERE = Holder("another-host", 7, "another boot pid:[1]", 12345)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return open_store(str(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def tracking(store):
    return open_tracking(store)


@pytest.fixture
def model(request):
    """A registered model of the test's own."""
    return hashlib.sha256(request.node.name.encode()).hexdigest()[:12]


@pytest.fixture
def version_of(store, tracking):
    """Makes a version with a test AUC, without the model's files; returns the facts of its register step."""

    def made(model: str, run: str, auc: float) -> dict:
        bind_model(tracking, model, store, create=True)
        tags = {"test_auc": repr(auc), "medmamba.manifest": "m" * 64, "medmamba.run": run, "medmamba.digest": run}
        entry = tracking.client.create_model_version(model, "file:///nowhere", tags=tags)
        return {"model": model, "version": int(entry.version), "model_digest": run}

    return made


def promote(store, tracking, facts: dict, **gate) -> dict:
    return registered.promote_run(registered.context(store, tracking, facts["model_digest"]), facts, **gate)


def champion_of(tracking, model):
    version = by_alias(tracking, model, "champion")
    return version and version.number


def at_once(*calls):
    """Runs the calls in threads that start together; returns their results in order."""
    results, together = [None] * len(calls), threading.Barrier(len(calls))

    def call(i):
        together.wait()
        results[i] = calls[i]()

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(calls))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    return results


def moves(store, model) -> list[dict]:
    return [json.loads(store.get(key)) for key in store.list(f"promotions/{model}/")]


def dead_process() -> Holder:
    return replace(this_process(), pid=2**22 + 1)


def test_every_concurrent_promotion_beats_its_compared_champion(store, tracking, model, version_of):
    aucs = [0.9, 0.6, 0.8, 0.7]
    facts = [version_of(model, f"{model}-{i}", auc) for i, auc in enumerate(aucs)]
    found = at_once(*(lambda each=each: promote(store, tracking, each) for each in facts))
    yes = [each for each in found if each["verdict"] == "yes"]
    auc_of = {each["version"]: auc for each, auc in zip(facts, aucs, strict=True)}
    assert champion_of(tracking, model) == facts[0]["version"]
    by_previous = {each["previous"]: each for each in yes}
    assert len(by_previous) == len(yes), "two were promoted over one champion"
    chain = [None]
    while chain[-1] in by_previous:
        chain.append(by_previous[chain[-1]]["version"])
    assert (len(chain), chain[-1]) == (len(yes) + 1, facts[0]["version"])
    assert [auc_of[number] for number in chain[1:]] == sorted(auc_of[number] for number in chain[1:])
    for no in (each for each in found if each["verdict"] == "no"):
        assert auc_of[no["version"]] < auc_of[no["previous"]]


def test_concurrent_registrations_of_a_run_make_one_version(store, tracking, model):
    before = registered.facts(store, model, auc=0.9)
    around = registered.context(store, tracking, model)
    first, second = at_once(*[lambda: registered.register_run(around, before, model)] * 2)
    assert first == second
    assert len(versions(tracking, model)) == 1
    runs = tracking.client.search_runs([tracking.experiment_id], f"tags.`medmamba.run` = '{model}'")
    assert [run.info.status for run in runs] == ["FINISHED"]


def test_a_registration_paused_early_leaves_no_second_version(store, tracking, model, monkeypatch):
    from pipelines.steps import register

    around, before, real = registered.context(store, tracking, model), registered.facts(store, model, auc=0.9), []

    def late(*arguments):
        monkeypatch.setattr(register, "create_version", real[0])
        _taken_over(store, model)
        around.store.delete(f"runs/{model}/register/version.asked")
        real.append(registered.register_run(around, before, model))
        return real[0](*arguments)

    real.append(register.create_version)
    monkeypatch.setattr(register, "create_version", late)
    found = registered.register_run(around, before, model)
    assert found == real[1]
    assert [version.number for version in versions(tracking, model)] == [found["version"]] == [1]


def test_a_version_is_found_again_only_if_its_digest_is_the_same(store, tracking, model):
    around = registered.context(store, tracking, model)
    before = registered.facts(store, model, auc=0.9)
    first = registered.register_run(around, before, model)
    for key in (f"runs/{model}/train/model/model.json",):  # trained again into the same folder: another model
        data = store.get(key).replace(b'"dataset": "phantoms"', b'"dataset": "phantom2"')
        assert data != store.get(key)
        store.put(key, data)
    digest = hashlib.sha256()
    for name in ("weights.safetensors", "model.json"):
        digest.update(store.get(f"runs/{model}/train/model/{name}"))
    other = {**before, "train": {**before["train"], "digest": digest.hexdigest()}}
    second = registered.register_run(around, other, model)
    assert second["version"] != first["version"]
    assert by_number(tracking, model, second["version"]).tags["medmamba.digest"] == digest.hexdigest()


def test_a_version_with_lost_or_changed_files_is_restored(store, tracking, model):
    around = registered.context(store, tracking, model)
    before = registered.facts(store, model, auc=0.9)
    first = registered.register_run(around, before, model)
    (weights,) = (key for key in store.list("mlflow-artifacts") if first["mlflow_run"] in key and "weights" in key)
    good = store.get(weights)
    for damage in (lambda: store.delete(weights), lambda: store.put(weights, good[:-1] + b"\x01")):
        damage()
        assert registered.register_run(around, before, model) == first
        assert store.get(weights) == good
    assert len(versions(tracking, model)) == 1


@pytest.mark.parametrize("status", ["PENDING_REGISTRATION", "FAILED_REGISTRATION"])
def test_a_version_that_mlflow_does_not_call_ready_is_not_taken(store, tracking, model, status):
    import sqlalchemy

    around = registered.context(store, tracking, model)
    before = registered.facts(store, model, auc=0.9)
    first = registered.register_run(around, before, model)
    engine = sqlalchemy.create_engine(tracking.uri)
    with engine.begin() as connection:
        connection.execute(
            sqlalchemy.text("UPDATE model_versions SET status = :status WHERE name = :name"),
            {"status": status, "name": model},
        )
    engine.dispose()
    with pytest.raises(ValueError, match=f"{status}, not READY"):
        registered.promote_run(around, first)
    second = registered.register_run(around, before, model)
    assert (first["version"], second["version"]) == (1, 2)
    assert registered.promote_run(around, second)["verdict"] == "yes"


def test_a_number_mlflow_gave_to_another_run_is_not_promoted(store, tracking, model, version_of):
    ours = version_of(model, f"{model}-a", 0.9)
    tracking.client.delete_registered_model(model)
    theirs = version_of(model, f"{model}-b", 0.5)
    assert theirs["version"] == ours["version"]
    with pytest.raises(ValueError, match=f"is not the model that this run registered .it has run '{model}-b'"):
        promote(store, tracking, ours)
    assert champion_of(tracking, model) is None


def test_a_late_alias_is_put_back_by_the_next_promotion(store, tracking, model, version_of):
    late, better, worst = (version_of(model, f"{model}-{i}", auc) for i, auc in enumerate((0.7, 0.9, 0.5)))
    _left_begun(store, tracking, late, number=1, holder=ELSEWHERE)
    assert promote(store, tracking, better)["verdict"] == "yes"
    move_alias(tracking, by_number(tracking, model, late["version"]), "champion")  # its request comes now
    found = promote(store, tracking, worst)
    assert (found["verdict"], found["previous"]) == ("no", better["version"])
    assert champion_of(tracking, model) == better["version"]


def test_an_alias_that_a_person_moved_back_is_left_there(store, tracking, model, version_of):
    first, better, worst = (version_of(model, f"{model}-{i}", auc) for i, auc in enumerate((0.7, 0.9, 0.5)))
    promote(store, tracking, first)
    promote(store, tracking, better)
    move_alias(tracking, by_number(tracking, model, first["version"]), "champion")
    assert promote(store, tracking, worst)["previous"] == first["version"]
    assert champion_of(tracking, model) == first["version"]


def test_a_killed_processs_move_is_waited_for_then_forgotten(store, tracking, model, version_of):
    killed, next_one = version_of(model, f"{model}-a", 0.7), version_of(model, f"{model}-b", 0.9)
    _left_begun(store, tracking, killed, number=1, holder=dead_process())
    version = by_number(tracking, model, killed["version"])
    timer = threading.Timer(1.0, move_alias, (tracking, version, "champion"))  # MLflow carries it out after its death
    timer.start()
    found = promote(store, tracking, next_one)
    timer.join()
    assert (found["verdict"], found["previous"]) == ("yes", killed["version"])
    assert [move["state"] for move in moves(store, model)] == ["moved", "moved"]
    # Its own step, given again, has not been promoted over: it is compared with the champion of now.
    assert promote(store, tracking, killed)["verdict"] == "no"


def test_a_process_paused_before_its_request_decides_again(store, tracking, model, version_of, monkeypatch):
    """The pause is the worst one: after the last look at the lease, before the request."""
    import pipelines.tracking.promotions as promotions

    paused, better = version_of(model, f"{model}-a", 0.7), version_of(model, f"{model}-b", 0.9)
    real, taken = promotions.move_alias, []

    def late(tracking, version, alias):
        if version.number == paused["version"] and not taken:
            taken.append(_taken_over(store, model))
            promote(store, tracking, better)
        real(tracking, version, alias)

    monkeypatch.setattr(promotions, "move_alias", late)
    found = promote(store, tracking, paused)
    assert (found["verdict"], found["previous"]) == ("no", better["version"])
    assert champion_of(tracking, model) == better["version"]
    run = tracking.client.get_run(found["mlflow_run"])
    assert (run.info.status, run.data.tags["medmamba.verdict"]) == ("FINISHED", "no")


def _taken_over(store, model) -> None:
    """Somebody has taken the lease while its holder was paused, and given it back."""
    (key,) = store.list(f"leases/models/{model}/")
    number = int(key.rpartition("/")[2].removesuffix(".json")) + 1
    claim = replace(Claim("token", ELSEWHERE, "2026-01-01T00:00:00+00:00", 45.0), is_over=True)
    store.put(f"leases/models/{model}/{number:08d}.json", json.dumps(asdict(claim)).encode())


def _left_begun(store, tracking, facts: dict, *, number: int, holder: Holder) -> None:
    """What a process leaves that stopped between noting a promotion and moving the alias."""
    created = bind_model(tracking, facts["model"], store)
    decision = {
        "verdict": "yes", "reason": "r", "forced": False, "alias": "champion",
        "version": facts["version"], "previous": None, "metric": "auc",
    }  # fmt: skip
    promotion = Promotion(number, decision, store.at("runs", facts["model_digest"], "promote").uri, holder)
    key = f"{facts['model']}/{created}/champion/{number:08d}.json"
    store.put(f"promotions/{key}", json.dumps(asdict(promotion)).encode())
    claim = Claim("token", holder, "2026-01-01T00:00:00+00:00", 45.0, is_over=True)
    store.put(f"leases/models/{facts['model']}/{number:08d}.json", json.dumps(asdict(claim)).encode())


@pytest.mark.parametrize("damage", [b"", b'{"verdict": "yes"', b"[]", b"null", b'{"verdict": "yes"}', b"\xff"])
def test_a_damaged_decision_file_is_read_from_the_promotions(store, tracking, model, version_of, damage):
    first, second = version_of(model, f"{model}-a", 0.8), version_of(model, f"{model}-b", 0.9)
    promote(store, tracking, first)
    decided = promote(store, tracking, second)
    store.put(f"runs/{model}-b/promote/{DECISION}", damage)
    assert promote(store, tracking, second) == decided
    assert decided["previous"] == first["version"]


def test_a_decision_about_another_version_is_not_carried_out(store, tracking, model, version_of):
    first, second = version_of(model, f"{model}-a", 0.9), version_of(model, f"{model}-b", 0.8)
    promote(store, tracking, first)
    forged = {
        "verdict": "yes", "reason": "-", "forced": False, "alias": "champion",
        "version": 99, "previous": first["version"], "metric": "auc",
    }  # fmt: skip
    store.put(f"runs/{model}-b/promote/{DECISION}", json.dumps(forged).encode())
    assert promote(store, tracking, second)["verdict"] == "no"
    assert champion_of(tracking, model) == first["version"]


def test_a_model_belongs_to_the_store_that_registered_it_first(store, tracking, model, version_of, tmp_path):
    facts = version_of(model, f"{model}-a", 0.9)
    other = open_store(str(tmp_path / "other"))
    with pytest.raises(
        OtherStoreError, match=rf"belongs to the store .*{store.uri}.*{other.uri}.*--registry.model NAME"
    ):
        registered.promote_run(registered.context(other, tracking, f"{model}-a"), facts)
    before = registered.facts(other, f"{model}-b", auc=0.95)
    with pytest.raises(OtherStoreError):
        registered.register_run(registered.context(other, tracking, f"{model}-b"), before, model)
    assert len(versions(tracking, model)) == 1
    assert champion_of(tracking, model) is None


def test_an_earlier_releases_model_is_bound_by_its_promotion(store, tracking, model, version_of, tmp_path):
    facts = version_of(model, f"{model}-a", 0.9)
    for tag in (STORE_TAG, STORE_ID_TAG):
        tracking.client.delete_registered_model_tag(model, tag)
    other = open_store(str(tmp_path / "other"))
    registered.promote_run(registered.context(other, tracking, f"{model}-a"), facts)
    with pytest.raises(OtherStoreError):
        promote(store, tracking, facts)


def test_a_store_is_the_same_under_another_address(store, tracking, model, tmp_path):
    created = bind_model(tracking, model, store, create=True)
    moved = tmp_path / "moved"
    moved.symlink_to(store.path("x").parent)
    assert bind_model(tracking, model, open_store(str(moved))) == created


def test_a_killed_registrations_run_is_ended_by_the_next_holder(store, tracking, model, version_of):
    facts = version_of(model, f"{model}-a", 0.9)
    left = tracking.client.create_run(tracking.experiment_id).info.run_id
    claim = Claim("token", dead_process(), "2026-01-01T00:00:00+00:00", 45.0, about={"mlflow_run": left})
    store.put(f"leases/models/{model}/00000001.json", json.dumps(asdict(claim)).encode())
    promote(store, tracking, facts)
    assert tracking.client.get_run(left).info.status == "KILLED"


def test_a_killed_drivers_run_is_ended_by_the_next_driver(store, tracking, model):
    sweep = tracking.step_run(store.at("runs", model, "tune"), run=model, step="tune")
    trial = tracking.trial_run(sweep, "t1")
    other = tracking.step_run(store.at("runs", f"{model}-b", "train"), run=f"{model}-b", step="train")
    tracking.close_killed(store.at("runs", model))
    found = {run_id: tracking.client.get_run(run_id).info.status for run_id in (sweep, trial, other)}
    assert found == {sweep: "KILLED", trial: "KILLED", other: "RUNNING"}
    assert tracking.step_run(store.at("runs", model, "tune"), run=model, step="tune") == sweep


def test_what_was_asked_for_by_a_killed_process_is_waited_for(tmp_path):
    out, made = open_store(str(tmp_path)), []

    def killed():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_once(out, "asked", find=lambda: None, make=killed)
    threading.Timer(1.0, made.append, ("by the request of the killed one",)).start()
    found = make_once(out, "asked", find=lambda: made[0] if made else None, make=lambda: pytest.fail("made twice"))
    assert found == "by the request of the killed one"
    assert list(out.list()) == []


def test_a_recorded_approval_says_when_and_where_the_alias_is(store, tracking, model, version_of):
    from pipelines.flow import Record

    first, second = version_of(model, f"{model}-a", 0.8), version_of(model, f"{model}-b", 0.9)
    facts = promote(store, tracking, first)
    record = Record(facts, {}, 1.0, "", "2026-11-30T12:34:56.000+00:00", {}, "", {})
    then = f"decided on 2026-11-30 12:34 UTC: version 1 of {model} was promoted to champion, replacing no version"
    assert describe_promotion(record, store, "r") == f"{then}, and it is still the champion"
    promote(store, tracking, second)
    assert describe_promotion(record, store, "r") == (
        f"{then}; the alias champion is now at version 2, and this command changed nothing; `medmamba promote --run r "
        "--force` moves it back"
    )
    tracking.client.delete_registered_model_alias(model, "champion")
    assert "no version has the alias champion now" in describe_promotion(record, store, "r")


def test_a_driver_whose_run_was_taken_over_is_told_by_whom(tmp_path):
    # A short lease, so that the loss is noticed soon.
    script = """
import sys, time
from data_shards.store.fenced_lease import LostLeaseError
from data_shards.store import open_store
from pipelines.tracking import leases
import data_shards.store.fenced_lease as fenced
fenced.fenced_lease.__wrapped__.__kwdefaults__["ttl_s"] = 2.0
try:
    with leases.driver_lease(open_store(sys.argv[1]), "r", wait_s=0, say=print):
        print("held", flush=True)
        time.sleep(60)
except LostLeaseError as error:
    print(error)
"""
    store = open_store(str(tmp_path / "store"))
    process = subprocess.Popen([sys.executable, "-c", script, store.uri], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    claim = Claim("token", ELSEWHERE, "2026-01-01T00:00:00+00:00", 45.0)
    store.put("leases/runs/r/00000002.json", json.dumps(asdict(claim)).encode())
    said, _ = process.communicate(timeout=30)
    assert said.startswith("run 'r' was taken over by process 7 on another-host while this process was paused")


def test_a_second_driver_learns_who_works_since_when_and_remedy(tmp_path):
    store, said = open_store(str(tmp_path)), []
    with (
        driver_lease(store, "night", wait_s=0, say=said.append) as check,
        pytest.raises(ValueError) as refused,
        driver_lease(store, "night", wait_s=0, say=said.append),
    ):
        pass
    assert not isinstance(refused.value, LostLeaseError)
    text = str(refused.value)
    assert text.startswith(f"run 'night' has been held by process {os.getpid()} on ")
    assert all(part in text for part in (" since 20", "wait until it has finished", "--wait-s", "--run NAME"))
    assert callable(check)


def test_versions_are_found_by_all_of_their_tags(tracking, model, version_of):
    version_of(model, "a", 0.5)
    second = version_of(model, "b", 0.5)
    tags = {"medmamba.manifest": "m" * 64, "medmamba.digest": "b"}
    assert [version.number for version in find_versions(tracking, model, tags)] == [second["version"]]
    assert find_versions(tracking, model, {**tags, "medmamba.digest": "c"}) == []
