"""The Ray that a driver works on: the one at RAY_ADDRESS, else an embedded one that ends with the driver."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_shards.store import Store
from data_shards.store.disk import full_disk, is_full, says_full, temporary_folder
from pipelines.cluster.dashboard import dashboard_with_node
from pipelines.cluster.reaper import Process, children, ended_with_driver, is_alive
from pipelines.cluster.scan_choice import ScanChoice
from pipelines.cluster.shipment import PASSED_VARIABLES, refuse_secrets
from pipelines.faults import RESUME, causes, unwrapped
from pipelines.placement import NO_DEMAND, Demand, Node, Placement, PlacementConfig, resolve

# An embedded Ray has one of each; it does not survive the end of either.
SERVERS = {"gcs_server": "its GCS", "raylet": "its raylet"}
CONNECT_TIMEOUT_S = 8.0
WATCH_S = 0.5
JOIN_WAIT_S = 300.0
# Set before Ray is imported. Each can be overridden from outside.
DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent anywhere
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # ray.train.report waits for this poll: 2 s an epoch by default
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",  # a preempted node may be gone within seconds
    "RAY_worker_niceness": "0",  # workers at nice 15 starve on a shared machine
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the future default; without it every task prints a warning
    "RAY_DEDUP_LOGS": "0",
    "RAY_TRAIN_ENABLE_V2": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # MLflow has the records; no CSV and TensorBoard files
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",  # inside a job, Ray rejects a driver that repeats one of the job's variables
    # libgomp's threads spin 300,000 times at every barrier. With other load on the cores, a training step of nano then
    # takes seconds instead of 40 ms; with a short spin it does not, and is not slower on an idle machine.
    "GOMP_SPINCOUNT": "2000",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Tune's handler takes Ctrl-C as the end of the sweep
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",  # how long an ended trial may take before the next one reuses its process
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # nobody reads what Tune saves
}
# The same, only for an embedded Ray: a cluster is configured by whoever started it.
OWN_DEFAULTS = {
    # Makes Ray use 127.0.0.1 as the node's address, to which all its servers bind. Any other way to set the address
    # (`_node_ip_address`, `--node-ip-address`) turns loopback into a routable address.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_enable_metrics_collection": "false",  # else the agent serves metrics to all local users, without a token
    # A process that asks whether a node is about to be preempted: this machine is not.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",  # Ray Train's own controller would cause this warning
}


class RaySessionError(ValueError):
    """Ray did not start on this machine; the message says why and what to do."""


def connect(*, num_cpus: int | None = None, lost: Callable[[str], None] | None = None) -> None:
    """Connects to the Ray at RAY_ADDRESS, or starts an embedded one. Does nothing if already connected.

    `lost` is called, in a thread, with the name of a server of the embedded Ray that ends before `ray.shutdown`.
    Raises RaySessionError if an embedded Ray does not start, ValueError if no Ray answers at RAY_ADDRESS or if a
    variable to be passed on contains a secret.
    """
    address = os.environ.get("RAY_ADDRESS")
    prepare()
    import ray

    if ray.is_initialized():
        return
    quiet = {"logging_level": logging.ERROR, "log_to_driver": os.environ.get("MEDMAMBA_WORKER_LOGS") == "1"}
    if not address:
        _bind_to_loopback()
        # The dashboard is needed: without it a trial that ASHA stops never frees its resources.
        try:
            with ended_with_driver(), dashboard_with_node():
                ray.init(address="local", num_cpus=num_cpus, include_dashboard=True, **quiet)  # type: ignore[arg-type]
        except Exception as error:  # Ray raises bare Exceptions, or OSError for a full disk
            raise RaySessionError(_not_started(error)) from error
        _take_sigterm_back()
        if lost is not None:
            _watch_servers(lost)
        return
    _check_answers(address)
    passed = {name: os.environ[name] for name in (*PASSED_VARIABLES, *DEFAULTS) if name in os.environ}
    refuse_secrets(passed)
    try:
        # RAY_ADDRESS is passed too: with two Rays on a host, a worker must not find the other one.
        ray.init(address=address, runtime_env={"env_vars": {**passed, "RAY_ADDRESS": address}}, **quiet)  # type: ignore[arg-type]
    except (ConnectionError, RuntimeError) as error:
        raise ValueError(_no_ray(address, str(error).splitlines()[0])) from None
    _take_sigterm_back()


def prepare() -> None:
    """Sets the variables that Ray reads when it is imported; call it before any import of Ray."""
    address = os.environ.get("RAY_ADDRESS")
    for name, value in (DEFAULTS if address else {**DEFAULTS, **OWN_DEFAULTS}).items():
        os.environ.setdefault(name, value)
    if not address:
        _own_token()


def begin_choice(
    config: PlacementConfig, sizes: Sequence[tuple[int, int, int]] = (), dtypes: Sequence[str] = ()
) -> ScanChoice | None:
    """Starts to find the scan backend of the embedded Ray that `connect` will start; None if RAY_ADDRESS is set.

    `sizes` and `dtypes` are of the scans that will run; see ScanChoice.
    """
    if os.environ.get("RAY_ADDRESS"):
        return None
    prepare()
    device = config.device if config.device != "auto" else ("cuda" if this_machine().gpus else "cpu")
    return ScanChoice(config.scan, device, sizes, dtypes)


def _bind_to_loopback() -> None:
    from ray._private import ray_constants

    # Ray reads the variable only when it is imported, which may have been before it was set.
    ray_constants.ENABLE_RAY_CLUSTER = os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] != "0"


def _not_started(error: BaseException) -> str:
    """Why Ray did not start on this machine, and what to do."""
    temporary = os.environ.get("RAY_TMPDIR") or temporary_folder()
    if is_full(temporary) or any(says_full(each) for each in causes(error)):
        return f"Ray did not start: {full_disk(temporary, 'its files')}, or set RAY_TMPDIR to a folder on another disk"
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"Ray did not start on this machine ({line[:200]}): it may be overloaded or out of memory; stop other "
        f"programs, then {RESUME}"
    )


def _watch_servers(lost: Callable[[str], None]) -> None:
    """Calls `lost`, in a thread, with the name of a server of the embedded Ray soon after it has ended.

    Without its GCS, Ray ends the driver after 60 s, in native code and without a useful message; without its raylet it
    notices after 30 s, and the work hangs until then.
    """
    own = {process: name for process, name in children().items() if name in SERVERS}
    threading.Thread(target=_watch, args=(own, lost), daemon=True).start()


def _watch(own: dict[Process, str], lost: Callable[[str], None]) -> None:
    import ray

    gone: list[str] = []
    while not gone:
        time.sleep(WATCH_S)
        gone = [name for process, name in own.items() if not is_alive(process)]
        if not ray.is_initialized():  # ray.shutdown disconnects before it ends the servers
            return
    lost(SERVERS[gone[0]])


def _take_sigterm_back() -> None:
    """Restores Python's handler: Ray's core replaces it by one that prints a stack and aborts after 3 s of clean-up."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def place(
    config: PlacementConfig,
    store: Store,
    demand: Demand = NO_DEMAND,
    *,
    say: Callable[[str], None] = lambda text: None,
    choice: ScanChoice | None = None,
) -> Placement:
    """Returns the placement on the connected Ray, with the name of the scan backend that runs on a worker.

    `choice` gives that backend if it was started for the same name and device. Waits, with a message, if a cluster has
    no CPU yet. Raises ValueError if the placement is impossible, or if nodes cannot share a local store.
    """
    placement = _resolved(config, store, demand, _nodes(say), say)
    chosen = choice.result() if choice and (choice.name, choice.device) == (placement.scan, placement.device) else None
    return placement.model_copy(update={"scan": chosen or _scan_backend(placement)})


def preview(
    config: PlacementConfig,
    store: Store,
    demand: Demand = NO_DEMAND,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> Placement:
    """The placement that `place` would return, except that the scan backend is not resolved.

    Asks the Ray at RAY_ADDRESS; without one, counts this machine's CPUs and GPUs as an embedded Ray would, without
    starting one. Raises what `place` raises, and does not wait for nodes.
    """
    if os.environ.get("RAY_ADDRESS"):
        connect()
        nodes = _nodes(say, wait_s=0)
    else:
        nodes = [this_machine()]
    return _resolved(config, store, demand, nodes, say)


def this_machine() -> Node:
    """The resources of an embedded Ray here: the CPUs of the container, the GPUs of CUDA_VISIBLE_DEVICES."""
    os.environ.setdefault("RAY_DISABLE_DOCKER_CPU_WARNING", "1")  # the container's share of the CPUs is intended
    from ray._private.resource_and_label_spec import ResourceAndLabelSpec

    found = ResourceAndLabelSpec().resolve(is_head=True)
    return Node(found.num_cpus or 0, found.num_gpus or 0)


def _resolved(
    config: PlacementConfig, store: Store, demand: Demand, nodes: list[Node], say: Callable[[str], None]
) -> Placement:
    if len(nodes) > 1 and store.is_local:
        raise ValueError(
            f"store {store.uri} is a local folder, which the {len(nodes)} nodes of this Ray do not share; "
            f"use --store s3://BUCKET/PREFIX"
        )
    return resolve(config, nodes, demand, say=say)


def _nodes(say: Callable[[str], None], wait_s: float = JOIN_WAIT_S) -> list[Node]:
    """The nodes of the connected Ray, once one has a CPU: a job may start before its cluster's workers."""
    import ray

    deadline, is_reported = time.monotonic() + wait_s, False
    while True:
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if any(node.get("CPU") for node in alive):
            return [Node(node.get("CPU", 0), node.get("GPU", 0)) for node in alive]
        if time.monotonic() > deadline:
            raise ValueError(
                f"this Ray has no CPU after {wait_s:g} s; add worker nodes "
                f"(infra/kuberay: minReplicas above 0), or start its head with --num-cpus"
            )
        if not is_reported:
            say(f"this Ray has no CPU yet; waiting up to {wait_s:g} s for a worker node")
            is_reported = True
        time.sleep(min(1.0, wait_s))


def _scan_backend(placement: Placement) -> str:
    """The backend for `placement.scan` on a worker; ValueError if it cannot run there."""
    import ray

    gpus = 1 if placement.device == "cuda" else 0
    task: Any = ray.remote(num_cpus=min(1.0, placement.cpus_per_worker), num_gpus=gpus)(_resolve_backend)
    with unwrapped():
        return ray.get(task.remote(placement.scan, placement.device))


def _resolve_backend(name: str, device: str) -> str:
    from medmamba.ops.ss2d_scan import resolve_backend

    return resolve_backend(name, device)


def _check_answers(address: str) -> None:
    """Raises ValueError if nothing listens at the address, at once; Ray's own client needs two minutes for that."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        return  # "auto", or another form of address that only Ray can resolve
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ValueError(_no_ray(address, error.strerror or str(error))) from None


def _no_ray(address: str, reason: str) -> str:
    return (
        f"RAY_ADDRESS={address}: no Ray answers there ({reason}); "
        f"start it, correct the address, or unset RAY_ADDRESS to use an embedded one"
    )


def _own_token() -> None:
    # Other users of this machine can reach Ray's ports, so even the embedded one requires a token. Without these two
    # variables Ray would create ~/.ray/auth_token, which changes how other Rays of this user start.
    if "RAY_AUTH_MODE" in os.environ or "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        return
    path = _token_file()
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)


def _token_file() -> Path:
    """A file with this user's token, created if missing; in the temporary folder if the cache is not writable."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medmamba"
    try:
        return _kept_token(cache)
    except OSError as error:
        if says_full(error):
            raise
        spare = Path(temporary_folder()) / f"medmamba-{os.getuid()}"
        spare.mkdir(exist_ok=True, mode=0o700)
        if spare.stat().st_uid != os.getuid():
            raise ValueError(
                f"Ray's token cannot be stored in {cache} ({error.strerror}), nor in {spare}, which belongs to another "
                "user; set XDG_CACHE_HOME to a folder of yours"
            ) from None
        return _kept_token(spare)


def _kept_token(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path, part = folder / "ray-token", folder / f"ray-token.{os.getpid()}"
    if path.is_file() and path.stat().st_size == 0:  # left by a full disk; Ray does not start with an empty token
        path.unlink(missing_ok=True)
    if not path.is_file():
        try:
            with open(os.open(part, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "w") as file:
                file.write(secrets.token_hex(32))
            with contextlib.suppress(FileExistsError):  # another process was faster
                os.link(part, path)
        finally:
            part.unlink(missing_ok=True)
    return path
