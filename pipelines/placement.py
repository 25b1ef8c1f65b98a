"""How and where: workers, processors, ZeRO stage, scan backend. Resolved once, recorded, never in an identity."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from pydantic import ConfigDict, Field

from data_shards.renamed import RenamedSettings
from data_shards.store.outage import PATIENCE_S
from pipelines.wording import counted

LEAST_CPUS = 0.25  # workers that share a core wait for each other at every collective
MOST_CPUS = 16.0  # with a GPU, unless more are asked for
# A worker that waits for longer counts as stalled (monitor.SLOW_S).
LONGEST_PATIENCE_S = 900.0


Device = Literal["cpu", "cuda"]


class Node(NamedTuple):
    """What one machine of a Ray has."""

    cpus: float
    gpus: float = 0


@dataclass(frozen=True)
class Demand:
    """What the remaining steps require of the number of workers; `auto` takes no other number."""

    micro_batches: int = 0
    """Micro-batches that a training step may have: their greatest common divisor, which the workers must divide.
    0: any number of workers will do."""
    batches: str = ""
    """The batch sizes that this follows from, as the user wrote them."""
    zero_stage: int = 0
    """The ZeRO stage of the checkpoint from which a training resumes."""
    compile: Literal["on", "off", ""] = ""
    """Whether that training was compiled; empty: there is no checkpoint."""
    ranks: int = 0
    """Workers that wrote a checkpoint that only as many can resume (an old format); 0: any number can."""
    flat: bool | None = None
    """Whether such a checkpoint holds flat parameters; None: it does not matter."""


NO_DEMAND = Demand()


class PlacementConfig(RenamedSettings):
    """What a user may say about the placement; `auto` and 0 are resolved from what Ray has."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    PART: ClassVar[str] = "placement"

    workers: int = Field(0, ge=0)
    """Training workers. 0: one per GPU, fewer where the batches of the recipe cannot be shared evenly among so many, or
    one with all CPUs where there is no GPU."""
    workers_min: int = Field(0, ge=0)
    """With how few workers a training continues where nodes are lost, until there are nodes for all again; only numbers
    that share a step's micro-batches evenly are taken. 0: it waits for nodes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where tensors live. auto: cuda where Ray has a GPU."""
    cpus_per_worker: float = Field(0, ge=0)
    """CPUs (and threads) of each training worker, all on one node. 0: all CPUs of Ray, shared evenly as far as its
    nodes allow, at most 16 with a GPU."""
    zero_stage: Literal["auto", "0", "1", "2", "3"] = "auto"
    """DeepSpeed's ZeRO stage. auto: 0, the fastest while a GPU holds the optimizer's state: 0.3 GB for 40 M parameters.
    A training that resumes keeps its stage."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the training step with torch.compile and replay it as a CUDA graph. auto: on GPUs, except in the trials
    of a sweep and in trainings so short that it does not pay. Not at ZeRO 3. The first time takes about a minute; the
    compiled code is kept in this machine's cache. It changes roundings, so a training that resumes keeps its setting
    unless another is named. In float32 on a GPU the step is only replayed as a CUDA graph, bit-equal to `off`."""
    scan: str = "auto"
    """Backend of the selective scan. auto: the first that can run here; a named one that cannot is an error."""
    concurrent_trials: int = Field(0, ge=0)
    """Trials of a sweep at once. 0: one per GPU, or one per CPU where there is no GPU."""
    cache_gib: float = Field(0, ge=0)
    """GiB that copies of remote shards, and images decoded with a GPU, may take on each machine's disk, shared by its
    workers and trials. 0: half of what is free. Shards that do not fit are read from the store image by image, images
    that do not fit are decoded in each epoch."""
    checkpoint_minutes: float = Field(5, ge=0)
    """A training writes a checkpoint at least so often, and loses at most so much work. 0: only at the ends of
    epochs."""
    checkpoint_steps: int = Field(0, ge=0)
    """Steps after which a checkpoint is written. 0: by time alone."""
    stall_minutes: float = Field(3, gt=0)
    """A training worker that gives no sign of life for so long is ended, and the workers restart, once. Compiling,
    validation and waiting for data may take 15 minutes more."""
    patience_s: float = Field(PATIENCE_S, ge=1, le=LONGEST_PATIENCE_S)
    """Seconds that every step waits for a store on S3 or for MLflow while they are away, before it ends. A training
    continues without MLflow, and what it logs is sent later."""
    prices: str = ""
    """TOML file with the price of an hour of each kind of GPU in US dollars ("NVIDIA H200" = 4.0). A training then
    ends with what it has cost."""


class Placement(RenamedSettings):
    """The resolved placement, as it is in a step's record."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    PART: ClassVar[str] = "placement"

    workers: int
    device: Literal["cpu", "cuda"]
    cpus_per_worker: float
    cpus_per_trial: float = 1
    zero_stage: int
    scan: str
    concurrent_trials: int
    nodes: int
    cache_gib: float = 0
    compile: Literal["auto", "on", "off"] = "off"
    """auto: on where the training is long enough to pay, which a worker decides."""
    flat: bool = False
    """Whether the parameters of an optimizer group are one tensor to DeepSpeed."""
    patience_s: float = PATIENCE_S
    prices: str = ""
    workers_min: int = 0
    checkpoint_minutes: float = 5
    checkpoint_steps: int = 0
    stall_minutes: float = 3

    @property
    def cache_bytes(self) -> int:
        """What copies of remote shards and decoded images may take on a machine's disk; 0: half of what is free."""
        return int(self.cache_gib * 2**30)

    @property
    def backend(self) -> str:
        """The torch.distributed backend."""
        return "nccl" if self.device == "cuda" else "gloo"

    @property
    def threads(self) -> int:
        """Compute threads of one training worker."""
        return max(1, int(self.cpus_per_worker))

    @property
    def loader_workers(self) -> int:
        """Workers of the loader of one training worker: with a GPU all its CPUs but one, else one."""
        return max(1, self.threads - 1) if self.device == "cuda" else 1

    @property
    def summary(self) -> str:
        """In one line, for the user."""
        scan = "auto (decided on a worker)" if self.scan == "auto" else self.scan
        compiled = {"on": "compiled, ", "auto": "compiled if it pays, ", "off": ""}[self.compile]
        return (
            f"{self.workers} x {self.cpus_per_worker:g} CPU on {self.device}, ZeRO {self.zero_stage}, scan {scan}, "
            f"{compiled}{counted(self.concurrent_trials, 'trial')} at once"
        )

    def for_trial(self) -> Placement:
        """The placement inside one trial of a sweep: a world of one that shares the CPUs with the other trials."""
        return self.model_copy(
            update={
                # Trials are short, compiled code takes 10 s to load, and each batch size is compiled again.
                "compile": "off" if self.compile == "auto" else self.compile,
                "workers": 1,
                "zero_stage": 0,
                "cpus_per_worker": self.cpus_per_trial,
                "flat": self.device == "cuda",
            }
        )


def resolve(
    config: PlacementConfig,
    nodes: Sequence[Node],
    demand: Demand = NO_DEMAND,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> Placement:
    """Returns the placement for a Ray of these nodes; where `auto` leaves GPUs idle, `say` gets a line with the reason.

    Raises ValueError (value, rule, remedy) where it is impossible, before any worker starts. Whether a number of
    workers that the user named divides the batches is for the training's own configuration to check.
    """
    num_gpus = _num_gpus(nodes)
    device = config.device if config.device != "auto" else ("cuda" if num_gpus else "cpu")
    if device == "cuda" and not num_gpus:
        raise ValueError(
            "--placement.device cuda: this Ray has no GPU; start it on a machine with one, or leave the device on auto"
        )
    workers = config.workers or _auto_workers(config, nodes, device, demand, say=say)
    if config.workers_min > workers:
        raise ValueError(
            f"--placement.workers-min {config.workers_min}: there can be no more than {counted(workers, 'worker')}; "
            "lower it, or raise --placement.workers"
        )
    needed = config.workers_min or workers  # the others may come later
    cpus = _cpus_per_worker(config, nodes, needed, device)
    if fault := _fault(nodes, needed, cpus, device):
        raise ValueError(fault)
    stage = int(config.zero_stage) if config.zero_stage != "auto" else demand.zero_stage
    if stage == 3 and config.compile == "on":
        raise ValueError(
            "--placement.compile on: ZeRO stage 3 takes the weights apart between uses, which compiled code cannot "
            "follow; use --placement.zero-stage 0, 1 or 2, or leave compile on auto"
        )
    captured = device == "cuda" and stage < 3
    compiled: Literal["auto", "on", "off"] = "auto" if captured else "off"
    if config.compile != "auto":
        compiled = config.compile
    elif demand.compile and captured:
        compiled = demand.compile
    trials, cpus_per_trial = _trials(config, nodes, device)
    return Placement(
        workers=workers,
        device=device,
        cpus_per_worker=cpus,
        cpus_per_trial=cpus_per_trial,
        zero_stage=stage,
        scan=config.scan,
        concurrent_trials=trials,
        nodes=len(nodes),
        cache_gib=config.cache_gib,
        compile=compiled,
        flat=captured if demand.flat is None else demand.flat,
        patience_s=config.patience_s,
        prices=config.prices,
        workers_min=config.workers_min,
        checkpoint_minutes=config.checkpoint_minutes,
        checkpoint_steps=config.checkpoint_steps,
        stall_minutes=config.stall_minutes,
    )


def _auto_workers(
    config: PlacementConfig, nodes: Sequence[Node], device: Device, demand: Demand, *, say: Callable[[str], None]
) -> int:
    """The most workers, at most one per GPU, that the recipe can run on; those of a checkpoint where there is one."""
    most = _num_gpus(nodes) if device == "cuda" else 1

    def fits(count: int) -> bool:
        return not _fault(nodes, count, _cpus_per_worker(config, nodes, count, device), device)

    if demand.ranks and fits(demand.ranks):
        if demand.ranks != most:
            say(
                f"{_of_all(demand.ranks, most, device)}: as many as wrote the checkpoint that the training resumes from"
            )
        return demand.ranks
    roomy = next((count for count in range(most, 1, -1) if fits(count)), 1)
    if roomy < most:
        say(
            f"{_of_all(roomy, most, device)}: the CPUs of this Ray ({_told(nodes)}) are not enough for more workers; "
            f"lower --placement.cpus-per-worker or start Ray with more CPUs to use all"
        )
    even = next(
        count for count in range(roomy, 0, -1) if demand.micro_batches % count == 0 and (count == 1 or fits(count))
    )
    if even < roomy:
        say(
            f"{_of_all(even, most, device)} for training: {demand.batches} cannot be shared evenly by more workers; "
            f"raise the batch size or lower train.micro_batch to use all"
        )
    return even


def _of_all(count: int, most: int, device: Device) -> str:
    return f"{count} of {most} GPUs" if device == "cuda" else counted(count, "worker")


def _cpus_per_worker(config: PlacementConfig, nodes: Sequence[Node], workers: int, device: Device) -> float:
    return config.cpus_per_worker or _share(nodes, workers, device, _num_cpus(nodes))


def _fault(nodes: Sequence[Node], workers: int, cpus: float, device: Device) -> str:
    """Why so many workers, each with so many CPUs, cannot run on the nodes; empty where they can."""
    num_cpus, num_gpus = _num_cpus(nodes), _num_gpus(nodes)
    if device == "cuda" and workers > num_gpus:
        return (
            f"--placement.workers {workers}: one GPU per worker, and this Ray has {num_gpus:g}; "
            f"ask for at most {num_gpus:g}, or add nodes"
        )
    if cpus < LEAST_CPUS:
        return (
            f"--placement.workers {workers}: {cpus:g} of the {num_cpus:g} CPUs of this Ray for each worker, but "
            f"at least {LEAST_CPUS:g} is needed; ask for fewer workers, or start Ray with more CPUs"
        )
    if cpus * workers > num_cpus:
        return (
            f"--placement.workers {workers} x --placement.cpus-per-worker {cpus:g} = {workers * cpus:g} CPUs, "
            f"but this Ray has {num_cpus:g}; lower one of them, or start Ray with more CPUs"
        )
    if (room := _room(nodes, cpus, device)) < workers:
        return (
            f"--placement.workers {workers} x --placement.cpus-per-worker {cpus:g}: a worker is on one node, and the "
            f"nodes of this Ray ({_told(nodes)}) have room for {room} of them on {device}; lower one of them"
        )
    return ""


def _trials(config: PlacementConfig, nodes: Sequence[Node], device: Device) -> tuple[int, float]:
    """Trials of a sweep at once, and the CPUs of each."""
    num_cpus, num_gpus = _num_cpus(nodes), _num_gpus(nodes)
    if device == "cuda" and config.concurrent_trials > num_gpus:
        raise ValueError(
            f"--placement.concurrent-trials {config.concurrent_trials}: one GPU per trial, and this Ray has "
            f"{num_gpus:g}; ask for fewer"
        )
    # A trial is a world of one, so the division of a batch among workers does not limit how many run at once.
    most = config.concurrent_trials or (num_gpus if device == "cuda" else max(1, int(num_cpus)))
    named = config.cpus_per_worker * (config.workers or (num_gpus if device == "cuda" else 1))
    for trials in [most] if config.concurrent_trials else range(most, 0, -1):
        if cpus := _share(nodes, trials, device, min(named, num_cpus) or num_cpus):
            return trials, cpus
    raise ValueError(
        f"--placement.concurrent-trials {most}: the nodes of this Ray ({_told(nodes)}) have no room for so many; "
        "ask for fewer"
    )


def _num_cpus(nodes: Sequence[Node]) -> float:
    return sum(node.cpus for node in nodes)


def _num_gpus(nodes: Sequence[Node]) -> int:
    return sum(int(node.gpus) for node in nodes)


def _share(nodes: Sequence[Node], count: int, device: Device, num_cpus: float) -> float:
    """The most CPUs, of `num_cpus` shared evenly, that each of `count` processes can have on one of the nodes."""
    fair = num_cpus / count if device == "cpu" else min(MOST_CPUS, max(1.0, num_cpus / count))
    # One node is always filled to its last process; which one, and with how many, gives the share.
    shares = {_rounded(min(fair, node.cpus / held)) for node in nodes for held in range(1, count + 1)}
    return max((share for share in shares if share and _room(nodes, share, device) >= count), default=0.0)


def _room(nodes: Sequence[Node], cpus: float, device: Device) -> int:
    """How many processes of so many CPUs, and a GPU each on cuda, fit on the nodes."""
    fitting = [(math.floor(node.cpus / cpus + 1e-9), int(node.gpus)) for node in nodes]
    return sum(min(held) if device == "cuda" else held[0] for held in fitting)


def _rounded(cpus: float) -> float:
    # Half a CPU is a valid Ray request, so that two workers can be tried on a machine with one core.
    return float(int(cpus)) if cpus >= 1 else math.floor(cpus * 100 + 1e-9) / 100


def _told(nodes: Sequence[Node]) -> str:
    return ", ".join(
        counted(node.cpus, "CPU") + (f" and {counted(node.gpus, 'GPU')}" if node.gpus else "") for node in nodes
    )
