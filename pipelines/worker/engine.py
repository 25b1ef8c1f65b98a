"""DeepSpeed behind the few calls the loop needs; one engine for CPU (gloo) and GPU (NCCL)."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from medmamba.checkpoint import save_model
from medmamba.config import ConvNetConfig, MedMambaConfig
from medmamba.optim import build_optimizer
from medmamba.precision import set_precision
from pipelines.placement import Placement
from pipelines.worker.config import TrainConfig
from pipelines.worker.deepspeed_import import import_deepspeed

TAG = "engine"


class Engine:
    """A model, its optimiser and the group of ranks that train it."""

    def __init__(self, model: nn.Module, config: TrainConfig, placement: Placement) -> None:
        self.device = _device(placement)
        set_precision(config.precision)
        deepspeed = import_deepspeed(placement.device)
        deepspeed.init_distributed(dist_backend=placement.backend, auto_mpi_discovery=False)
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        assert self.ranks == placement.workers, f"{self.ranks} ranks joined, the placement says {placement.workers}"
        model = model.to(self.device)  # weights stay contiguous: DeepSpeed broadcasts and flattens them as bytes
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model,
            # A torch optimiser: DeepSpeed's own AdamW would be compiled on first use.
            optimizer=build_optimizer(model, config.optim),
            dist_init_required=False,
            config=_deepspeed_config(config, placement),
        )
        self.model: nn.Module = self._engine.module
        self._was_training = self.model.training

    def set_learning_rate(self, value: float) -> None:
        """Sets the rate of the coming step in every parameter group."""
        for group in self._optimizer.param_groups:
            group["lr"] = value

    def forward(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """Logits (B, num_classes), under the precision of the recipe."""
        if self.model.training != self._was_training:
            self._forget_order()
            self._was_training = self.model.training
        return self._engine(images_B3HW)

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of one micro-batch; divided by the number of them, averaged over ranks at the last one."""
        self._engine.backward(loss)

    def step(self) -> None:
        """After each micro-batch; DeepSpeed updates the weights at the step's last one."""
        self._engine.step()

    def save(self, folder: Path) -> None:
        """Every rank writes its share of weights and optimiser state; for resuming only."""
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


def _device(placement: Placement) -> torch.device:
    if placement.device == "cpu":
        torch.set_num_threads(placement.threads)
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _deepspeed_config(config: TrainConfig, placement: Placement) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": config.accumulation(placement.workers),
        "gradient_clipping": config.optim.clip_norm,
        "zero_optimization": {"stage": placement.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if config.precision == "bfloat16":
        # `bf16: enabled` would turn BatchNorm's weights to bfloat16 and leave its buffers in float32.
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return settings
