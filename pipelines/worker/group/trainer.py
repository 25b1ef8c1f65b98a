"""Ray Train with our own answers to two questions: what starts a group of workers again, and how large it is.

On an embedded Ray it does without the processes that only a cluster needs. Each takes 1 s of CPU and 1 to 2 s of the
wait for the first step: the one that asks for more nodes, the one that clears up behind a lost controller (this Ray
ends with its driver), the one that hands out Ray Data's datasets (there are none) and the launchers that set up an
environment which all processes of this Ray have already.
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
    """Ray's own trainer on a cluster, with our policies. Ctrl-C is for whoever called `fit`."""

    is_local = False

    def watched(self, board: Any, *, sizes: Sequence[int], limits: Limits) -> WatchedTrainer:
        """This trainer, for a group of one of these `sizes`, which works under the eyes of `board`."""
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
    """For a Ray of one machine that was started by this driver."""

    is_local = True

    def _create_default_callbacks(self) -> list[Any]:
        return [each for each in super()._create_default_callbacks() if not isinstance(each, NEEDLESS)]

    def _controller_class(self) -> Any:
        # In the environment that it has as a process of this Ray, so that a process that is there can take it.
        return ray.remote(num_cpus=0)(_LocalController)


class _WorkerGroup(WorkerGroup):
    def _start(self) -> None:
        """Gives back what was taken where the group does not start to work; Ray never gives its places back."""
        try:
            super()._start()
        except BaseException:
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
        """Ends what is left of the group first, as Ray's own comment on this says: its places count as free."""
        if self._worker_group:
            self._shutdown_worker_group()
        return super()._make_and_handle_scaling_decision_for_non_running_worker_group(controller_state)


class _LocalController(_Controller):
    worker_group_cls = _LocalWorkerGroup
