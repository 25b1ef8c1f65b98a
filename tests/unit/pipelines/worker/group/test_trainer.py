"""The trainers change methods that Ray Train still has, and the embedded one starts no needless process."""

from __future__ import annotations

import inspect

import pytest
from ray.train import ScalingConfig

from pipelines.cluster.monitor import Limits
from pipelines.worker.group.process_group import Group, GroupConfig
from pipelines.worker.group.restarts import GroupWatch, RestartPolicy
from pipelines.worker.group.size import GroupSize
from pipelines.worker.group.trainer import (
    NEEDLESS,
    LocalTrainer,
    WatchedTrainer,
    _Controller,
    _LocalWorkerGroup,
    _WorkerGroup,
)

CHANGED = {
    WatchedTrainer: {"_create_default_callbacks", "_initialize_and_run_controller"},
    _Controller: {"worker_group_cls", "_make_and_handle_scaling_decision_for_non_running_worker_group"},
    _WorkerGroup: {"_start"},
    _LocalWorkerGroup: {"_get_worker_runtime_env"},
    GroupSize: {
        "make_decision_for_non_running_worker_group", "make_decision_for_running_worker_group",
        "on_controller_start_worker_group", "after_controller_start", "_get_num_workers_for_resource_request",
    },
    RestartPolicy: {"make_decision"},
    GroupWatch: {"after_worker_group_start", "after_worker_group_poll_status"},
    Group: {"on_start", "on_shutdown"},
}  # fmt: skip


@pytest.mark.parametrize("changed", CHANGED, ids=lambda changed: changed.__name__)
def test_each_method_that_is_changed_is_one_of_rays(changed):
    assert CHANGED[changed] <= vars(changed).keys()
    theirs = [each for each in changed.__mro__[1:] if each.__module__.startswith("ray.")]
    missing = [name for name in CHANGED[changed] if not any(name in vars(each) for each in theirs)]
    assert missing == [], f"Ray has no such method any more: {missing}"


def test_callbacks_that_start_needless_processes_are_left_out():
    def callbacks(kind: type[WatchedTrainer]) -> set[type]:
        trainer = kind(
            lambda config: None, backend_config=GroupConfig("gloo"), scaling_config=ScalingConfig(num_workers=1)
        )
        watched = trainer.watched(None, sizes=[1], limits=Limits(180))
        return {type(each) for each in watched._create_default_callbacks()}

    assert callbacks(WatchedTrainer) - callbacks(LocalTrainer) == {*NEEDLESS}
    assert GroupWatch in callbacks(LocalTrainer)


def test_a_controller_is_made_from_the_same_arguments_as_rays():
    assert {"scaling_policy", "failure_policy"} <= inspect.signature(_Controller.__init__).parameters.keys()
