"""DeepSpeed behind the few calls the loop needs; one engine for CPU (gloo) and GPU (NCCL)."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from medmamba.checkpoint import save_model
from medmamba.config import ConvNetConfig, MedMambaConfig
from medmamba.model import MedMamba, compiled_parts, exchanged
from medmamba.optim import build_optimizer, parameter_groups
from medmamba.precision import set_precision
from pipelines.placement import Placement
from pipelines.worker.capture import Captured
from pipelines.worker.config import TrainConfig
from pipelines.worker.deepspeed_import import import_deepspeed
from pipelines.worker.flat import FlatParameters, clip_gradients, copy_gradients
from pipelines.worker.objective import Objective, autocast

TAG = "engine"


class Engine:
    """A model, its optimizer and the group of ranks that train it.

    Here DeepSpeed sees the model itself. `FlatEngine` is faster on GPUs.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, placement: Placement) -> None:
        self.config, self.placement = config, placement
        self.device = _device(placement)
        set_precision(config.precision)
        deepspeed = import_deepspeed(placement.device)
        deepspeed.init_distributed(dist_backend=placement.backend, auto_mpi_discovery=False)
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        assert self.ranks == placement.workers, f"{self.ranks} ranks joined, the placement says {placement.workers}"
        self._compiles = placement.compile == "on"
        if self._compiles:
            # A process that trains several trials would keep each one's code and network, and after eight of them run
            # the function uncompiled; what is compiled again comes from the cache on disk.
            torch._dynamo.reset()
        self.model = model.to(self.device)  # weights stay contiguous: DeepSpeed broadcasts and flattens them as bytes
        self._start(deepspeed)

    def set_learning_rate(self, value: float) -> None:
        """Sets the rate of the coming step in every parameter group, each by its own scale."""
        for group in self._optimizer.param_groups:
            # A checkpoint from before there were scales brings groups without one.
            group["lr"] = value * group.get("lr_scale", 1.0)

    def train(
        self, objective: Objective, images_BHWC: torch.Tensor, labels_BC: torch.Tensor, draws_Bn: torch.Tensor
    ) -> torch.Tensor:
        """One micro-batch, forward and backward: returns its loss, which is overwritten by the next call.

        At a step's last micro-batch the gradients are averaged over micro-batches and ranks and the weights change.
        """
        loss = objective.loss(self._forward, images_BHWC, labels_BC, draws_Bn)
        self._engine.backward(loss)
        self._engine.step()
        return loss.detach()

    def infer(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """Logits (B, num_classes), under the precision of the recipe; overwritten by the next call."""
        return self._forward(images_B3HW)

    def save(self, folder: Path) -> None:
        """Every rank writes its share of weights and optimizer state; for resuming only."""
        self._engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote on the same number of ranks and the same ZeRO stage."""
        path, _ = self._engine.load_checkpoint(str(folder), tag=TAG)
        assert path is not None, f"DeepSpeed found no checkpoint in {folder}"

    def save_model(self, folder: Path, config: MedMambaConfig | ConvNetConfig, card: dict) -> None:
        """Rank 0 writes weights.safetensors and model.json; every rank calls it (ZeRO-3 collects its shards)."""
        with self._whole_parameters():
            if self.rank == 0:
                save_model(folder, self.model, config, card=card)

    def gather(self, value: Any) -> list[Any]:
        """The picklable `value` of every rank, in rank order, on every rank."""
        if self.ranks == 1:
            return [value]
        values: list[Any] = [None] * self.ranks
        dist.all_gather_object(values, value)
        return values

    def _start(self, deepspeed: Any) -> None:
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=self.model,
            # A torch optimizer: DeepSpeed's own AdamW would be compiled on first use.
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
        """At stage 3: lets DeepSpeed learn anew in which order the modules need their weights.

        Training and validation differ in it. Without this a training resumed at stage 3 ended in DeepSpeed's "tracing
        error", in the first step after its first validation.
        """
        if self._engine.zero_optimization_stage() == 3:
            coordinator = self._optimizer.parameter_offload.get_param_coordinator()
            if not coordinator.is_invalid_trace():
                coordinator._invalidate_trace()

    def _whole_parameters(self) -> contextlib.AbstractContextManager:
        if self._engine.zero_optimization_stage() < 3:
            return contextlib.nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(self.model.parameters()))


class FlatEngine(Engine):
    """DeepSpeed sees one flat parameter for each group; the loss and its gradients are compiled and captured.

    For GPUs at ZeRO 0 to 2: stage 3 takes parameters away between uses, which a graph cannot follow.
    """

    def train(
        self, objective: Objective, images_BHWC: torch.Tensor, labels_BC: torch.Tensor, draws_Bn: torch.Tensor
    ) -> torch.Tensor:
        """See Engine."""
        if self._flat.gradients is None:
            self._flat.gradients = self._gradients(objective)
        loss = self._engine(images_BHWC, labels_BC, draws_Bn)
        self._engine.backward(loss)
        if self._clips and self._engine.is_gradient_accumulation_boundary():
            # DeepSpeed's own clipping at stage 0 waits for the device twice.
            clip_gradients(self._flat.flats, self.config.optim.clip_norm)
        self._engine.step()
        return loss.detach()

    def infer(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """See Engine."""
        return self._infer(images_B3HW)

    def load(self, folder: Path) -> None:
        """See Engine."""
        super().load(folder)
        self._flat.point()

    def _start(self, deepspeed: Any) -> None:
        optim = self.config.optim
        self._flat = FlatParameters(self.model, parameter_groups(self.model, optim))
        self._clips = optim.clip_norm > 0 and self.placement.zero_stage == 0
        settings = _deepspeed_config(self.config, self.placement)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=self._flat,
            optimizer=build_optimizer(self._flat.flat_groups, optim),
            dist_init_required=False,
            config=settings | ({"gradient_clipping": 0.0} if self._clips else {}),
        )
        if self.ranks == 1 and self.placement.zero_stage == 0:
            self._engine.enable_backward_allreduce = False  # it would copy all gradients twice
        self._flat.point()
        self._infer = self._captured(self._logits)

    def _gradients(self, objective: Objective):
        """What computes the loss of a micro-batch and leaves its gradients in the flat ones."""
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
        """`_loss`, compiled: MedMamba in parts, of which many are the same; another network as a whole."""
        compiler = functools.partial(torch.compile, dynamic=False, options=_compile_options(self.config))
        if not isinstance(self.model, MedMamba):
            return compiler(self._loss(objective))
        parts, loss = compiled_parts(self.model, compiler), self._loss(objective.compiled(compiler))

        def loss_of(*inputs: torch.Tensor) -> torch.Tensor:
            # torch compiles a method anew for each kind of block, and after eight kinds runs it as it is.
            with torch._dynamo.config.patch(recompile_limit=max(8, len(parts))), exchanged(parts):
                return loss(*inputs)

        return loss_of

    @torch.no_grad()
    def _logits(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        with autocast(self.config, self.device):
            return self.model(images_B3HW)

    def _captured(self, run: Any, state: Any = ()) -> Any:
        if self.device.type != "cuda" or not self._compiles:
            return lambda *inputs: run(*(given.to(self.device, non_blocking=True) for given in inputs))
        return Captured(run, self.device, state)


def build_engine(model: nn.Module, config: TrainConfig, placement: Placement) -> Engine:
    """The engine of the placement."""
    return (FlatEngine if placement.flat else Engine)(model, config, placement)


def _compile_options(config: TrainConfig) -> dict[str, Any]:
    # Drop-path then draws what it draws in a training that is not compiled.
    options: dict[str, Any] = {"fallback_random": True}
    if config.precision == "float32" and hasattr(torch._inductor.config, "deterministic"):
        # Kernels chosen by timing them would round differently from one process to the next.
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
    # By default DeepSpeed takes buffers of 5e8 elements, many times the parameters of these networks.
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
        # It waits for the device before and after every step.
        "timers": {"throughput": {"enabled": False}},
    }


def _autocast_config(config: TrainConfig) -> dict[str, Any]:
    if config.precision != "bfloat16":
        return {}
    # `bf16: enabled` would turn BatchNorm's weights to bfloat16 and leave its buffers in float32. Unless the list of
    # modules is empty, stages 1 to 3 also average the gradients of Linear and Conv in bfloat16.
    return {"torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}}
