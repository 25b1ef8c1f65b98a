"""Promotions that race, are killed and are paused, and what must hold afterwards; also a command that prints figures.

    python tests/cluster/registry_races.py --two 200 --twenty 20 --paused 20 --registrations 20 --commands 20

Contenders are processes that promote versions of one registered model through the promote step: on MLflow over
PostgreSQL with the store on S3, and through the command line on a folder with SQLite. A trigger in the database keeps
every move of the alias, so that what is held does not depend on what the product writes about itself.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "pipelines"))

from conftest import free_port, service

BINARIES = Path(sys.executable).parent
SHORT_TTL_S = 10.0  # of the leases where contenders are paused; a busy machine renews later than it should
AUDIT = {
    "postgresql": """
        CREATE TABLE moves (id SERIAL PRIMARY KEY, name TEXT, version INTEGER);
        CREATE FUNCTION note_move() RETURNS trigger AS $$
            BEGIN INSERT INTO moves (name, version) VALUES (NEW.name, NEW.version); RETURN NEW; END
        $$ LANGUAGE plpgsql;
        CREATE TRIGGER note_moves AFTER INSERT OR UPDATE ON registered_model_aliases
            FOR EACH ROW EXECUTE FUNCTION note_move();
    """,
    "sqlite": """
        CREATE TABLE moves (id INTEGER PRIMARY KEY, name TEXT, version INTEGER);
        CREATE TRIGGER note_insert AFTER INSERT ON registered_model_aliases
            BEGIN INSERT INTO moves (name, version) VALUES (NEW.name, NEW.version); END;
        CREATE TRIGGER note_update AFTER UPDATE ON registered_model_aliases
            BEGIN INSERT INTO moves (name, version) VALUES (NEW.name, NEW.version); END;
    """,
}


@dataclass(frozen=True)
class Services:
    """Where contenders work: the store, MLflow, its database, and what the environment must hold for both."""

    store: str
    tracking: str
    database: str
    env: dict[str, str]


@contextlib.contextmanager
def postgres_and_s3(folder: Path) -> Iterator[Services]:
    """An MLflow server over a PostgreSQL of its own, and an S3 server."""
    s3, mlflow = free_port(), free_port()
    with contextlib.ExitStack() as stack:
        database = stack.enter_context(postgres(folder / "pg"))
        endpoint, address = f"http://127.0.0.1:{s3}", f"http://127.0.0.1:{mlflow}"
        command = [str(BINARIES / "moto_server"), "-H", "127.0.0.1", "-p", str(s3)]
        stack.enter_context(service(command, url=endpoint, log=folder / "moto.log"))
        env = {"AWS_ENDPOINT_URL_S3": endpoint, "AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
        env |= {"MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true", "AWS_REGION": "us-east-1"}
        env |= {"AWS_DEFAULT_REGION": "us-east-1", "MLFLOW_TRACKING_URI": address}
        os.environ.update(env)
        import boto3

        boto3.client("s3").create_bucket(Bucket="races")
        command = [str(BINARIES / "mlflow"), "server", "--host", "127.0.0.1", "--port", str(mlflow), "--workers", "2"]
        command += ["--backend-store-uri", database, "--artifacts-destination", str(folder), "--serve-artifacts"]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "PATH": f"{BINARIES}{os.pathsep}{os.environ['PATH']}"}
        health = f"{address}/health"
        stack.enter_context(service(command, url=health, env=quiet, log=folder / "mlflow.log", wait_s=240))
        yield _audited(Services("s3://races/store", address, database, env))


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """Address of a database of a PostgreSQL that runs as its own user until the block ends."""
    (binaries,) = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1:]
    user = {"user": "postgres", "group": "postgres"} if os.getuid() == 0 else {}
    folder.mkdir()
    if user:
        import shutil

        shutil.chown(folder, **user)
        for parent in folder.parents:
            if parent.stat().st_uid == os.getuid() and parent != Path("/"):
                parent.chmod(parent.stat().st_mode | 0o011)  # so that the other user may come through
    port = free_port()
    initdb = [str(binaries / "initdb"), "-D", str(folder / "data"), "-A", "trust", "-U", "mlflow"]
    subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL, cwd="/", **user)
    command = [str(binaries / "postgres"), "-D", str(folder / "data"), "-p", str(port), "-k", str(folder)]
    command += ["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-c", "max_connections=200"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd="/", **user)
    try:
        import sqlalchemy

        address = f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
        engine = sqlalchemy.create_engine(address)
        until = time.monotonic() + 60
        while True:
            try:
                engine.connect().close()
                break
            except sqlalchemy.exc.OperationalError:
                assert time.monotonic() < until, "PostgreSQL did not come up"
                time.sleep(0.2)
        engine.dispose()
        yield address
    finally:
        process.send_signal(signal.SIGINT)  # ends its sessions too
        process.wait(30)


def folder_and_sqlite(folder: Path) -> Services:
    """A store in a folder, and MLflow's file in it."""
    from data_shards.store import open_store
    from pipelines.tracking import open_tracking

    store = str(folder / "store")
    tracking = open_tracking(open_store(store))
    return _audited(Services(store, tracking.uri, tracking.uri, {}))


def _audited(services: Services) -> Services:
    import sqlalchemy

    kind = services.database.partition(":")[0].partition("+")[0]
    engine = sqlalchemy.create_engine(services.database)
    connection = engine.raw_connection()
    if kind == "sqlite":
        connection.executescript(AUDIT[kind])
    else:
        connection.cursor().execute(AUDIT[kind])
    connection.commit()
    connection.close()
    engine.dispose()
    return services


def query(services: Services, text: str, **values: Any) -> list[tuple]:
    """The rows of a query of MLflow's database."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(services.database, poolclass=sqlalchemy.NullPool)
    with engine.connect() as connection:
        return [tuple(row) for row in connection.execute(sqlalchemy.text(text), values)]


# --------------------------------------------------------------------------------------------------- contenders


def make_versions(services: Services, model: str, aucs: list[float]) -> list[dict]:
    """A version per AUC, without files; what their register steps would say."""
    from data_shards.store import open_store
    from pipelines.tracking import open_tracking
    from pipelines.tracking.leases import bind_model

    store = open_store(services.store)
    tracking = open_tracking(store, services.tracking)
    bind_model(tracking, model, store, create=True)
    made, source = [], "file:///nowhere" if store.is_local else f"{store.uri}/nowhere"
    for i, auc in enumerate(aucs):
        tags = {"test_auc": repr(auc), "medmamba.manifest": "m" * 64, "medmamba.run": f"{model}-{i}"}
        entry = tracking.client.create_model_version(model, source, tags=tags)
        made.append({"digest": f"{model}-{i}", "model": model, "version": int(entry.version)})
    return made


def promote(services: Services, facts: dict, told: Path, stop_before_move: bool, ttl_s: float) -> None:
    """One contender: the promote step, its facts as JSON in `told`. It may stop itself right before it moves."""
    os.environ.update(services.env)
    import data_shards.store.fenced_lease as fenced
    import pipelines.tracking.promotions as promotions
    from data_shards.store import open_store
    from pipelines.console.terminal import Terminal
    from pipelines.steps import promote as step
    from pipelines.steps.context import StepContext
    from pipelines.tracking import open_tracking

    fenced.fenced_lease.__wrapped__.__kwdefaults__["ttl_s"] = ttl_s
    if stop_before_move:
        move = promotions.move_alias

        def stopped(*arguments: Any) -> None:
            promotions.move_alias = move
            os.kill(os.getpid(), signal.SIGSTOP)
            move(*arguments)

        promotions.move_alias = stopped
    store = open_store(services.store)
    run = facts["digest"]
    context = StepContext(store, run, None, open_tracking(store, services.tracking), Terminal(quiet=True))
    found = step.run(step.GateConfig(), None, store.at("runs", run, "promote"), context, register=facts)
    beside = told.with_suffix(".beside")
    beside.write_text(json.dumps(found))
    beside.replace(told)


def register(services: Services, run: str, before: dict, told: Path) -> None:
    """One contender: the register step of `run`, its facts as JSON in `told`."""
    os.environ.update(services.env)
    from data_shards.store import open_store
    from pipelines.console.terminal import Terminal
    from pipelines.steps import register as step
    from pipelines.steps.context import StepContext
    from pipelines.tracking import open_tracking

    store = open_store(services.store)
    context = StepContext(store, run, None, open_tracking(store, services.tracking), Terminal(quiet=True))
    found = step.run(step.RegisterConfig(model=run), None, store.at("runs", run, "register"), context, **before)
    told.write_text(json.dumps(found))


def command(services: Services, facts: dict, told: Path) -> subprocess.Popen:
    """One contender: the command line, whose standard output is the facts of all steps."""
    line = [sys.executable, "-m", "pipelines", "promote", "--run", facts["digest"], "--store", services.store, "--json"]
    with told.open("wb") as out, told.with_suffix(".err").open("wb") as err:
        return subprocess.Popen(line, stdout=out, stderr=err, cwd=Path(__file__).parents[2])


_fork = None


def contender(*arguments: Any, work: Callable = promote) -> multiprocessing.Process:
    """A process for `work`, forked from one that has imported everything and connected to nothing."""
    global _fork
    if _fork is None:
        _fork = multiprocessing.get_context("forkserver")
        _fork.set_forkserver_preload(["mlflow", "boto3", "pipelines.steps.promote", "pipelines.workflows"])
    process = _fork.Process(target=work, args=arguments)
    process.start()
    return process


# ------------------------------------------------------------------------------------------------------- rounds


def race(
    services: Services, model: str, *, contenders: int, kills: int, folder: Path, chance: random.Random, window_s: float
) -> int:
    """One round on the step itself: starts all, kills some at random moments, gives those again; how many were hit."""
    facts = make_versions(services, model, [round(chance.uniform(0.5, 0.99), 4) for _ in range(contenders)])
    told = [folder / f"{model}-{i}.json" for i in range(contenders)]
    processes = [contender(services, each, path, False, 45.0) for each, path in zip(facts, told, strict=True)]
    hit = 0
    for i in chance.sample(range(contenders), kills):
        time.sleep(chance.uniform(0, window_s / max(1, kills)))
        if processes[i].is_alive():
            os.kill(processes[i].pid, signal.SIGKILL)
            hit += 1
    [process.join(300) for process in processes]
    while left := [i for i in range(contenders) if not told[i].exists()]:
        again = [contender(services, facts[i], told[i], False, 45.0) for i in left]
        [process.join(300) for process in again]
    hold(services, model, facts, [json.loads(path.read_text()) for path in told])
    return hit


def race_registrations(services: Services, run: str, *, folder: Path, chance: random.Random) -> int:
    """One round of five that register one run, of which two are killed; how many were."""
    import registered

    from data_shards.store import open_store

    before = registered.facts(open_store(services.store), run, auc=0.9)
    told = [folder / f"{run}-{i}.json" for i in range(5)]
    processes = [contender(services, run, before, path, work=register) for path in told]
    hit = 0
    for process in chance.sample(processes, 2):
        time.sleep(chance.uniform(0, 6))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            hit += 1
    [process.join(300) for process in processes]
    while left := [path for path in told if not path.exists()]:
        again = [contender(services, run, before, path, work=register) for path in left]
        [process.join(300) for process in again]
    found = {path.read_text() for path in told}
    assert len(found) == 1, f"{run}: registrations of one run differ: {found}"
    made = query(services, "SELECT version FROM model_versions WHERE name = :run", run=run)
    assert made == [(1,)], f"{run}: versions {made}"
    runs = _runs(services, run)
    assert runs == [("FINISHED",)], f"{run}: MLflow runs {runs}"
    return hit


def race_paused(services: Services, model: str, *, folder: Path, chance: random.Random) -> int:
    """One round of five of which two are stopped, one right before it moves the alias; how many were stopped so."""
    facts = make_versions(services, model, [round(chance.uniform(0.5, 0.99), 4) for _ in range(5)])
    told = [folder / f"{model}-{i}.json" for i in range(5)]
    processes = [
        contender(services, each, path, i == 0, SHORT_TTL_S)
        for i, (each, path) in enumerate(zip(facts, told, strict=True))
    ]
    time.sleep(chance.uniform(0, 1.0))
    with contextlib.suppress(ProcessLookupError):
        os.kill(processes[1].pid, signal.SIGSTOP)
    [process.join(120) for process in processes[2:]]
    stopped = int(_is_stopped(processes[0].pid))
    for process in processes[:2]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGCONT)
    until = time.monotonic() + 120
    while processes[0].is_alive() and time.monotonic() < until:  # it may have come to its move only now
        if _is_stopped(processes[0].pid):
            time.sleep(SHORT_TTL_S)
            os.kill(processes[0].pid, signal.SIGCONT)
        time.sleep(0.1)
    [process.join(120) for process in processes]
    hold(services, model, facts, [json.loads(path.read_text()) for path in told], paused=True)
    return stopped


def race_commands(services: Services, model: str, *, folder: Path, chance: random.Random) -> int:
    """One round of five through the command line, of which up to two are killed; how many were.

    One is killed at any moment, most often while it starts, the other while it holds the model's lease.
    """
    from finished_run import finish

    from pipelines.recipes import recipe

    facts = make_versions(services, model, [round(chance.uniform(0.5, 0.99), 4) for _ in range(5)])
    told = [folder / f"{model}-{i}.json" for i in range(5)]
    for each in facts:
        finish(services.store, each["digest"], recipe("quickstart"), workflow="direct", last="register", register=each)
    processes = [command(services, each, path) for each, path in zip(facts, told, strict=True)]
    time.sleep(chance.uniform(0, 5))
    hit = _killed(chance.choice(processes))
    hit += _killed(_holder(services, model, processes, chance.uniform(0, 4)))
    codes = [process.wait(600) for process in processes]
    while left := [i for i in range(5) if codes[i] not in (0, 3)]:
        assert all(codes[i] == -signal.SIGKILL for i in left), [told[i].with_suffix(".err").read_text() for i in left]
        again = {i: command(services, facts[i], told[i]) for i in left}
        codes = [again[i].wait(600) if i in again else code for i, code in enumerate(codes)]
    found = [json.loads(path.read_text())["promote"] for path in told]
    assert [each["verdict"] for each in found] == ["yes" if code == 0 else "no" for code in codes]
    hold(services, model, facts, found)
    return hit


def _killed(process: subprocess.Popen | None) -> int:
    if process is None or process.poll() is not None:
        return 0
    process.kill()
    return 1


def _holder(
    services: Services, model: str, processes: list[subprocess.Popen], wait_s: float
) -> subprocess.Popen | None:
    """Who holds the model's lease `wait_s` after the first did, or next; None where all have ended before."""
    folder = Path(services.store, "leases", "models", model)
    until = None
    while any(process.poll() is None for process in processes):
        claims = sorted(folder.glob("*.json"))
        if claims and until is None:
            until = time.monotonic() + wait_s
        if until is not None and time.monotonic() >= until:
            with contextlib.suppress(OSError, ValueError):  # it is being written, or was just removed
                claim = json.loads(claims[-1].read_text())
                holder = [each for each in processes if each.pid == claim["holder"]["pid"]]
                if holder and not claim["is_over"] and holder[0].poll() is None:
                    return holder[0]
        time.sleep(0.01)
    return None


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def hold(services: Services, model: str, facts: list[dict], found: list[dict], *, paused: bool = False) -> None:
    """What must be true once every contender has a verdict; raises AssertionError naming the round."""
    auc_of = {number: float(auc) for number, auc in query(
        services, "SELECT version, value FROM model_version_tags WHERE name = :model AND key = 'test_auc'", model=model
    )}  # fmt: skip
    moves = [None, *(v for (v,) in query(services, "SELECT version FROM moves WHERE name = :m ORDER BY id", m=model))]
    (now,) = (v for (v,) in query(services, "SELECT version FROM registered_model_aliases WHERE name = :m", m=model))
    about = f"{model}: moves {moves}, AUC {auc_of}, told {[(f['version'], f['verdict'], f['previous']) for f in found]}"
    yes = {(each["previous"], each["version"]) for each in found if each["verdict"] == "yes"}
    steps = list(itertools.pairwise(moves))
    # Every yes was decided against the champion it replaced, and that one was not better.
    assert yes <= set(steps), f"a yes that replaced another than it was compared with: {about}"
    assert all(before is None or auc_of[version] >= auc_of[before] for before, version in yes), about
    for each in found:
        if each["verdict"] == "no":
            assert auc_of[each["version"]] < auc_of[each["previous"]], f"a no against a worse one: {about}"
    if not paused:  # a late write goes back, and then the better one is put there again
        assert all(before is None or auc_of[after] >= auc_of[before] for before, after in steps), f"backwards: {about}"
        assert len(moves) == len(set(moves)), f"moved twice: {about}"
    # The alias is that of the last yes, which is the best of all.
    assert now == max(auc_of, key=lambda number: auc_of[number]), f"the alias is at {now}: {about}"
    assert now in {version for _, version in yes}, about
    assert len(auc_of) == len(facts), about
    for each in facts:
        runs = _runs(services, each["digest"])
        assert runs == [("FINISHED",)], f"runs of {each['digest']}: {runs}"


def _runs(services: Services, run: str) -> list[tuple]:
    """The states of MLflow's runs of a run."""
    text = (
        "SELECT r.status FROM runs r JOIN tags t ON t.run_uuid = r.run_uuid "
        "WHERE t.key = 'medmamba.run' AND t.value = :run AND r.lifecycle_stage = 'active'"
    )
    return query(services, text, run=run)


def rounds(name: str, number: int, one: Callable[[str], int]) -> dict[str, Any]:
    """Runs `one` so many times; prints and returns what happened, also every ten rounds and where it is stopped."""
    began, done, hit, reasons = time.monotonic(), 0, 0, []

    def figures() -> dict[str, int]:
        seconds = round(time.monotonic() - began)
        return {"rounds": done, "wrong": len(reasons), "hit": hit, "seconds": seconds}

    try:
        for i in range(number):
            try:
                hit += one(f"{name}-{i}")
            except AssertionError as error:
                reasons.append(str(error))
                print(f"WRONG {error}", flush=True)
            done += 1
            if done % 10 == 0 and done < number:
                print(f"{name}, so far: {figures()}", flush=True)
    except BaseException:
        print(f"{name}, ended before its {number} rounds were over: {figures()}", flush=True)
        raise
    print(f"{name}: {figures()}", flush=True)
    return {**figures(), "reasons": reasons}


def main() -> int:
    """Runs all rounds that were asked for; exit code 1 where one of them ended wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("two", "twenty", "paused", "registrations", "commands"):
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the services are ended too
    chance, found = random.Random(asked.seed), {}
    with tempfile.TemporaryDirectory(prefix="mm-races-") as name:
        folder = Path(name)
        if asked.two or asked.twenty or asked.paused or asked.registrations:
            with postgres_and_s3(folder) as on:
                same: dict[str, Any] = {"folder": folder, "chance": chance}
                found["two"] = rounds(
                    "two", asked.two, lambda m: race(on, m, contenders=2, kills=m[-1] in "02468", window_s=4.5, **same)
                )
                found["twenty"] = rounds(
                    "twenty", asked.twenty, lambda m: race(on, m, contenders=20, kills=8, window_s=30, **same)
                )
                found["registrations"] = rounds(
                    "registrations", asked.registrations, lambda m: race_registrations(on, m, **same)
                )
                found["paused"] = rounds("paused", asked.paused, lambda m: race_paused(on, m, **same))
        if asked.commands:
            os.environ.pop("MLFLOW_TRACKING_URI", None)
            on_folder = folder_and_sqlite(folder)
            found["commands"] = rounds(
                "commands", asked.commands, lambda m: race_commands(on_folder, m, folder=folder, chance=chance)
            )
    return int(any(each["wrong"] for each in found.values()))


if __name__ == "__main__":
    sys.exit(main())
