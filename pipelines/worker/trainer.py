"""Ray Train on an embedded Ray, without the processes that only a cluster needs.

Each takes 1 s of CPU and 1 to 2 s of the wait for the first step: the one that asks for more nodes, the one that clears
up behind a lost controller (this Ray ends with its driver), the one that hands out Ray Data's datasets (there are none)
and the launchers that set up an environment which all processes of this Ray have already.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

NEEDLESS = (DatasetsCallback, PlacementGroupCleanerCallback)


class LocalTrainer(DataParallelTrainer):
    """Ray's own trainer, for a Ray of one machine that was started by this driver."""

    def _create_default_callbacks(self) -> list[Any]:
        return [each for each in super()._create_default_callbacks() if not isinstance(each, NEEDLESS)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        # In the environment that it has as a process of this Ray, so that a process that is there can take it.
        arguments["scaling_policy"] = _FixedPolicy(self.scaling_config)  # type: ignore[arg-type]
        controller: Any = ray.remote(num_cpus=0)(_Controller).remote(**arguments)
        self._register_sigint_handler(controller)
        ray.get(controller.run.remote())
        return ray.get(controller.get_result.remote())


class _FixedPolicy(FixedScalingPolicy):
    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        """Asks nobody for nodes."""

    def _maybe_send_resource_request(self) -> None:
        pass


class _WorkerGroup(WorkerGroup):
    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> dict[str, Any]:
        return dict(custom_runtime_env)


class _Controller(TrainController):
    worker_group_cls = _WorkerGroup
