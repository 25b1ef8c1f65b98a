"""The trainer of an embedded Ray changes methods that Ray Train still has, and needs no torch in the driver."""

from __future__ import annotations

import inspect

import pytest
from ray.train import ScalingConfig

from pipelines.worker.process_group import Group, GroupConfig
from pipelines.worker.trainer import NEEDLESS, LocalTrainer, _Controller, _FixedPolicy, _WorkerGroup


@pytest.mark.parametrize("changed", [LocalTrainer, _Controller, _FixedPolicy, _WorkerGroup, Group])
def test_each_method_that_is_changed_is_one_of_rays(changed):
    ours = [name for name, value in vars(changed).items() if not name.startswith("__")]
    assert ours
    missing = [name for name in ours if not hasattr(changed.__mro__[1], name)]
    assert missing == [], f"Ray has no such method any more: {missing}"


def test_the_callbacks_that_start_a_needless_process_are_left_out():
    trainer = LocalTrainer(
        lambda config: None, backend_config=GroupConfig("gloo"), scaling_config=ScalingConfig(num_workers=1)
    )
    theirs = super(LocalTrainer, trainer)._create_default_callbacks()
    assert {type(each) for each in theirs} - {type(each) for each in trainer._create_default_callbacks()} == {*NEEDLESS}


def test_a_controller_is_made_from_the_same_arguments_as_rays():
    assert "scaling_policy" in inspect.signature(_Controller.__init__).parameters
