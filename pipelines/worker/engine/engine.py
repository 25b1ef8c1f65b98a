"""Wraps DeepSpeed in the few calls that the training loop needs, for CPU (gloo) and GPU (NCCL)."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from medmamba.model import MedMamba, compiled_parts, exchanged
from medmamba.optim import build_optimizer, parameter_groups
from medmamba.precision import set_precision
from pipelines.placement import Placement
from pipelines.worker.config import TrainConfig
from pipelines.worker.engine.capture import Captured
from pipelines.worker.engine.compile_cache import is_compiled
from pipelines.worker.engine.deepspeed_import import import_deepspeed
from pipelines.worker.engine.first_format import tensors_only
from pipelines.worker.engine.flat import FlatParameters, clip_gradients, copy_gradients
from pipelines.worker.engine.objective import Objective, autocast
from pipelines.worker.engine.optimizer_state import read_moments, write_moments
from pipelines.worker.engine.snapshot import Snapshot, listed_moments, named_moments
from pipelines.worker.engine.step_guard import StepGuard

TAG = "engine"


class Engine:
    """A model, its optimizer and the group of ranks that train it.

    Passes the model itself to DeepSpeed. `FlatEngine` is faster on GPUs.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, placement: Placement) -> None:
        self.config, self.placement = config, placement
        self.device = _device(placement)
        set_precision(config.precision)
        self._deepspeed = import_deepspeed(placement.device)
        self._deepspeed.init_distributed(dist_backend=placement.backend, auto_mpi_discovery=False)
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        assert self.ranks == placement.workers, f"{self.ranks} ranks joined, but the placement has {placement.workers}"
        self.guard = StepGuard(self.device)
        self._captures = placement.compile == "on"
        self._compiles = is_compiled(placement, config.precision)
        if self._compiles:
            # A process that runs several trials would keep the code and network of each, and stop compiling after
            # eight. Recompiling is cheap: the code comes from the cache on disk.
            torch._dynamo.reset()
        self.model = model.to(self.device)  # not channels_last: DeepSpeed broadcasts and flattens weights as bytes
        self._shapes = self._trainable_shapes()  # read now: at ZeRO 3 parameters are empty between their uses
        self._start()

    def set_learning_rate(self, value: float) -> None:
        """Sets the learning rate of the next step, multiplied by each parameter group's own scale."""
        for group in self._optimizer.param_groups:
            # Groups from older checkpoints have no scale.
            group["lr"] = value * group.get("lr_scale", 1.0)

    def train(
        self, objective: Objective, images_BHWC: torch.Tensor, labels_BC: torch.Tensor, draws_Bn: torch.Tensor
    ) -> torch.Tensor:
        """Runs one micro-batch forward and backward; returns its scalar loss, overwritten by the next call.

        At a step's last micro-batch, gradients are averaged over micro-batches and ranks and the weights are updated.
        """
        loss = objective.loss(self._forward, images_BHWC, labels_BC, draws_Bn)
        self._engine.backward(loss)
        self._watch()
        self._step()
        return loss.detach()

    def infer(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """Logits (B, num_classes) in the recipe's precision; overwritten by the next call."""
        return self._forward(images_B3HW)

    def snapshot(self) -> Snapshot | None:
        """Copies the current weights and optimizer state without waiting for the device. None on ranks other than 0.

        Every rank must call it at the same step, after the first: at ZeRO 1 to 3 it gathers the partitions.
        """
        moments, step = read_moments(self._optimizer, self._stage, self._seen_parameters())
        with self._gathered_parameters():
            if self.rank > 0:
                return None
            weights = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        parts = {kind: self._parts(values) for kind, values in moments.items()}
        named = named_moments(list(self._shapes), parts, step)
        ready = torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None
        return Snapshot(weights, named, ready)

    def restore(self, moments: Mapping[str, torch.Tensor]) -> None:
        """Loads a snapshot's optimizer state. The weights must have been in the model when the engine was built.

        Raises ValueError if the moments belong to another network.
        """
        listed, step = listed_moments(moments, self._shapes)
        joined = {kind: self._joined(values) for kind, values in listed.items()}
        write_moments(self._optimizer, self._stage, self._seen_parameters(), joined, step)

    def check_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Asserts that the engine trains exactly these weights; every rank must call it.

        At ZeRO 3 DeepSpeed's own loading once left the initial weights in place without an error.
        """
        with self._gathered_parameters():
            held = self.model.state_dict()
            differing = [name for name, value in weights.items() if not value.equal(held[name].cpu())]
        assert not differing, f"weights that differ from the checkpoint's after loading: {differing[:3]}"

    def load_old(self, folder: Path) -> None:
        """Restores a checkpoint in this project's first format, on the same number of ranks and the same ZeRO stage."""
        with tensors_only():
            path, _ = self._engine.load_checkpoint(str(folder), tag=TAG)
        assert path is not None, f"DeepSpeed found no checkpoint in {folder}"

    def gather(self, value: Any) -> list[Any]:
        """The picklable `value` of every rank, in rank order, on every rank."""
        if self.ranks == 1:
            return [value]
        values: list[Any] = [None] * self.ranks
        dist.all_gather_object(values, value)
        return values

    def _watch(self) -> None:
        """At a step's last micro-batch, checks whether the averaged gradients are finite (see step_guard)."""
        if self._stage == 0 and self._engine.is_gradient_accumulation_boundary():
            self.guard.watch(self._optimizer, self._seen_parameters())

    def _step(self) -> None:
        self._engine.step()
        if self._stage > 0:
            self.guard.note(skipped=self._optimizer.overflow)

    def _trainable_shapes(self) -> dict[str, torch.Size]:
        return {name: each.shape for name, each in self.model.named_parameters() if each.requires_grad}

    @property
    def _stage(self) -> int:
        return self.placement.zero_stage

    def _seen_parameters(self) -> list[nn.Parameter]:
        """The parameters that DeepSpeed updates."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _parts(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Converts tensors shaped like `_seen_parameters` to tensors shaped like the network's own, as in `_shapes`."""
        return list(values)

    def _joined(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The inverse of `_parts`."""
        return list(values)

    def _start(self) -> None:
        self._engine, self._optimizer, _, _ = self._deepspeed.initialize(
            model=self.model,
            # A torch optimizer, because DeepSpeed compiles its own AdamW on first use.
            optimizer=build_optimizer(parameter_groups(self.model, self.config.optim), self.config.optim),
            dist_init_required=False,
            config=_deepspeed_config(self.config, self.placement) | _autocast_config(self.config),
        )
        if self._compiles:
            self.model.compile(dynamic=False)
        self._was_training = self.model.training

    def _forward(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        if self.model.training != self._was_training:
            self._forget_order()
            self._was_training = self.model.training
        return self._engine(images_B3HW)

    def _forget_order(self) -> None:
        """At ZeRO 3, makes DeepSpeed record again in which order the modules use their weights.

        Training and validation use different orders. Without this, a training resumed at stage 3 failed with
        DeepSpeed's "tracing error" in the first step after its first validation.
        """
        if self._engine.zero_optimization_stage() == 3:
            coordinator = self._optimizer.parameter_offload.get_param_coordinator()
            if not coordinator.is_invalid_trace():
                coordinator._invalidate_trace()

    def _gathered_parameters(self) -> contextlib.AbstractContextManager[object]:
        if self._engine.zero_optimization_stage() < 3:
            return contextlib.nullcontext()
        return self._deepspeed.zero.GatheredParameters(list(self.model.parameters()))


class FlatEngine(Engine):
    """Passes one flat parameter per group to DeepSpeed; compiles and captures the loss and its gradients.

    For GPUs at ZeRO 0 to 2: stage 3 releases parameters between uses, which a CUDA graph cannot follow.
    """

    def train(
        self, objective: Objective, images_BHWC: torch.Tensor, labels_BC: torch.Tensor, draws_Bn: torch.Tensor
    ) -> torch.Tensor:
        """See Engine."""
        if self._flat.gradients is None:
            self._flat.gradients = self._gradients(objective)
        loss = self._engine(images_BHWC, labels_BC, draws_Bn)
        self._engine.backward(loss)
        self._watch()
        if self._clips and self._engine.is_gradient_accumulation_boundary():
            # DeepSpeed's clipping at stage 0 waits for the device twice.
            clip_gradients(self._flat.flats, self.config.optim.clip_norm)
        self._step()
        return loss.detach()

    def infer(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """See Engine."""
        return self._infer(images_B3HW)

    def load_old(self, folder: Path) -> None:
        """See Engine."""
        super().load_old(folder)
        self._flat.point()

    def _seen_parameters(self) -> list[nn.Parameter]:
        return list(self._flat.flats)

    def _parts(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return self._flat.split(values)

    def _joined(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return self._flat.joined(values)

    def _start(self) -> None:
        optim = self.config.optim
        self._flat = FlatParameters(self.model, parameter_groups(self.model, optim))
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        ordered = [names[parameter] for parameter in self._flat.parameters_of_network]
        self._shapes = {name: self._shapes[name] for name in ordered}
        self._clips = optim.clip_norm > 0 and self.placement.zero_stage == 0
        settings = _deepspeed_config(self.config, self.placement)
        self._engine, self._optimizer, _, _ = self._deepspeed.initialize(
            model=self._flat,
            optimizer=build_optimizer(self._flat.flat_groups, optim),
            dist_init_required=False,
            config=settings | ({"gradient_clipping": 0.0} if self._clips else {}),
        )
        if self.ranks == 1 and self.placement.zero_stage == 0:
            self._engine.enable_backward_allreduce = False  # it would copy all gradients twice
        self._flat.point()
        self._infer = self._captured(self._logits)

    def _gradients(self, objective: Objective) -> Callable[..., torch.Tensor]:
        """Returns a function that computes a micro-batch's loss and writes its gradients into the flat ones."""
        parameters, views = self._flat.parameters_of_network, self._flat.gradient_views
        loss_of = self._compiled_loss(objective) if self._compiles else self._loss(objective)

        def run(images: torch.Tensor, labels: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                loss = loss_of(images, labels, draws)
                found = torch.autograd.grad(loss, parameters)
            copy_gradients(views, found)
            return loss.detach()

        return self._captured(run, state=list(self.model.buffers()))

    def _loss(self, objective: Objective) -> Callable[..., torch.Tensor]:
        def network(images_B3HW: torch.Tensor) -> torch.Tensor:
            with autocast(self.config, self.device):
                return self.model(images_B3HW)

        return functools.partial(objective.loss, network)

    def _compiled_loss(self, objective: Objective) -> Callable[..., torch.Tensor]:
        """`_loss`, compiled: MedMamba part by part, because many parts are the same; other networks in one piece."""
        compiler = functools.partial(torch.compile, dynamic=False, options=_compile_options(self.config))
        if not isinstance(self.model, MedMamba):
            return compiler(self._loss(objective))
        parts, loss = compiled_parts(self.model, compiler), self._loss(objective.compiled(compiler))

        def loss_of(*inputs: torch.Tensor) -> torch.Tensor:
            # torch compiles a method once per kind of block, and by default stops compiling after eight kinds.
            with torch._dynamo.config.patch(recompile_limit=max(8, len(parts))), exchanged(parts):
                return loss(*inputs)

        return loss_of

    @torch.no_grad()
    def _logits(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        with autocast(self.config, self.device):
            return self.model(images_B3HW)

    def _captured(self, run: Any, state: Any = ()) -> Any:
        if self.device.type != "cuda" or not self._captures:
            return lambda *inputs: run(*(given.to(self.device, non_blocking=True) for given in inputs))
        return Captured(run, self.device, state)


def build_engine(model: nn.Module, config: TrainConfig, placement: Placement) -> Engine:
    """The engine that fits the placement: `FlatEngine` or `Engine`."""
    return (FlatEngine if placement.flat else Engine)(model, config, placement)


def _compile_options(config: TrainConfig) -> dict[str, Any]:
    # Drop-path must draw the same numbers as without compilation.
    options: dict[str, Any] = {"fallback_random": True}
    if config.precision == "float32" and hasattr(torch._inductor.config, "deterministic"):
        # Kernels chosen by timing would round differently in each process.
        options["deterministic"] = True
    return options


def _device(placement: Placement) -> torch.device:
    if placement.device == "cpu":
        torch.set_num_threads(placement.threads)
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _deepspeed_config(config: TrainConfig, placement: Placement) -> dict[str, Any]:
    # DeepSpeed's default of 5e8 elements is many times the size of these networks.
    bucket = 50_000_000
    return {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": config.accumulation(placement.workers),
        "gradient_clipping": config.optim.clip_norm,
        "zero_optimization": {
            "stage": placement.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        # The throughput timer waits for the device before and after every step.
        "timers": {"throughput": {"enabled": False}},
    }


def _autocast_config(config: TrainConfig) -> dict[str, Any]:
    if config.precision != "bfloat16":
        return {}
    # `bf16: enabled` would convert BatchNorm's weights to bfloat16 but leave its buffers in float32. The list of
    # modules is empty because stages 1 to 3 would otherwise average the gradients of Linear and Conv in bfloat16.
    return {"torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}}
