"""Ray Train with this project's own policies for restarts and for the group's size.

On an embedded Ray it skips the processes that only a cluster needs. Each costs 1 s of CPU and delays the first step by
1 to 2 s: the one that requests nodes, the one that cleans up after a lost controller (an embedded Ray ends with its
driver), the one that serves Ray Data's datasets (unused here), and the launchers that set up an environment which all
processes of this Ray already have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from pipelines.cluster.monitor import Limits
from pipelines.worker.group.restarts import GroupWatch, RestartPolicy
from pipelines.worker.group.size import NODE_ID, GroupSize

NEEDLESS = (DatasetsCallback, PlacementGroupCleanerCallback)


class WatchedTrainer(DataParallelTrainer):
    """Ray's trainer for a cluster, with this project's policies. Ctrl-C is left to the caller of `fit`."""

    is_local = False

    def watched(self, board: Any, *, sizes: Sequence[int], limits: Limits) -> WatchedTrainer:
        """Sets the allowed group `sizes`, the `board` that monitors the group and its stall `limits`; returns self."""
        self._board, self._sizes, self._limits = board, sizes, limits
        return self

    def _create_default_callbacks(self) -> list[Any]:
        return [*super()._create_default_callbacks(), GroupWatch(self._board, self._limits)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        gpus = bool(self.scaling_config.use_gpu)
        arguments["failure_policy"] = RestartPolicy(self._board, gpus=gpus)
        arguments["scaling_policy"] = GroupSize(
            self.scaling_config, self._sizes, self._board, asks_for_nodes=not self.is_local
        )
        controller: Any = self._controller_class().remote(**arguments)
        ray.get(controller.run.remote())
        return ray.get(controller.get_result.remote())

    def _controller_class(self) -> Any:
        here = {NODE_ID: ray.get_runtime_context().get_node_id()}
        environment = {"RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0", **get_env_vars_to_propagate()}
        return ray.remote(num_cpus=0, label_selector=here, runtime_env={"env_vars": environment})(_Controller)


class LocalTrainer(WatchedTrainer):
    """For a single-machine Ray that this driver has started."""

    is_local = True

    def _create_default_callbacks(self) -> list[Any]:
        return [each for each in super()._create_default_callbacks() if not isinstance(each, NEEDLESS)]

    def _controller_class(self) -> Any:
        # Without a runtime_env of its own, so that an idle worker process can run it.
        return ray.remote(num_cpus=0)(_LocalController)


class _WorkerGroup(WorkerGroup):
    def _start(self) -> None:
        """Releases the group's resources if it fails to start; Ray itself never would."""
        try:
            super()._start()
        except BaseException:  # broad: also on Ctrl-C; raised again below
            if self._worker_group_state is not None:
                self._worker_group_state.shutdown()
                self._clear_state()
            raise


class _LocalWorkerGroup(_WorkerGroup):
    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> dict[str, Any]:
        return dict(custom_runtime_env)


class _Controller(TrainController):
    worker_group_cls = _WorkerGroup

    def _make_and_handle_scaling_decision_for_non_running_worker_group(self, controller_state: Any) -> Any:
        """Shuts down what is left of the group first, so that its resources count as free."""
        if self._worker_group:
            self._shutdown_worker_group()
        return super()._make_and_handle_scaling_decision_for_non_running_worker_group(controller_state)


class _LocalController(_Controller):
    worker_group_cls = _LocalWorkerGroup
