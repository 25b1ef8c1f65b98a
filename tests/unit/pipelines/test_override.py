"""A configuration changes by validated dotted keys, and by nothing else."""

from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict

from medmamba.config import ConvNetConfig
from pipelines.override import ConfigError, difference, flatten, override, validated
from pipelines.placement import PlacementConfig
from pipelines.recipes import Recipe


def test_a_dotted_key_replaces_one_value_and_leaves_the_rest():
    before = Recipe()
    after = override(before, {"train.optim.lr": 3e-4, "data.seed": 7})
    assert (after.train.optim.lr, after.data.seed) == (3e-4, 7)
    assert difference(before.model_dump(), after.model_dump()).keys() == {"train.optim.lr", "data.seed"}
    assert before == Recipe()


def test_no_change_gives_an_equal_configuration():
    assert override(Recipe(), {}) == Recipe()


def test_a_model_of_the_other_kind_keeps_its_kind():
    changed = override(Recipe(model=ConvNetConfig()), {"model.blocks": 2})
    assert changed.model == ConvNetConfig(blocks=2)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train.optim.rate": 1}, r"train\.optim\.rate is not a field of Recipe: did you mean .*train\.optim\."),
        ({"nothing.like.it": 1}, r"nothing\.like\.it is not a field of Recipe"),
        ({"train.epochs.more": 1}, r"train\.epochs\.more is not a field"),
        ({"train.optim.lr": -1.0}, r"^train\.optim\.lr = -1\.0: .* greater than 0$"),
        ({"train.optim.lr": "fast"}, r"^train\.optim\.lr = 'fast': .* valid number"),
        ({"model.drop_path": 3.0}, r"^model\.drop_path = 3\.0: .* less than 1$"),
        ({"model.variant": "X"}, r"^model\.variant = 'X': .*'T', 'S', 'B' or 'nano'$"),
        ({"train.batch_size": 33}, r"^train: batch_size 33 is not a multiple of micro_batch 32"),
        ({"train.sampling": "balanced", "train.class_weights": True}, r"^train: sampling 'balanced' .* use one of the"),
        ({"model.dims": (24, 48)}, r"^model: dims \(24, 48\) and depths"),
        ({"tune.space.lr": (1e-3,)}, r"^tune\.space: lr \(0\.001,\): give the lowest and the highest"),
    ],
    ids=str,
)
def test_an_impossible_change_names_key_value_and_rule(changes, told):
    with pytest.raises(ConfigError, match=told) as error:
        override(Recipe(), changes)
    assert "\n" not in str(error.value)
    assert "pydantic" not in str(error.value)


def test_all_broken_rules_are_told_together():
    with pytest.raises(ConfigError) as error:
        override(Recipe(), {"train.epochs": 0, "data.seed": -1})
    assert {clause.split(" ")[0] for clause in str(error.value).split("; ")} == {"train.epochs", "data.seed"}


def test_a_rule_is_told_with_the_prefix_that_a_person_writes():
    with pytest.raises(ConfigError, match=r"^placement\.workers = -1: "):
        validated(PlacementConfig, {"workers": -1}, prefix="placement")


class Pair(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    kind: Literal["pair"] = "pair"


def test_missing_and_unknown_fields_are_named():
    with pytest.raises(ConfigError, match=r"^name: Field required; nam = 'x': Extra inputs are not permitted$"):
        validated(Pair, {"nam": "x"})


def test_flattened_keys_are_dotted_and_lists_stay_values():
    assert flatten({"a": {"b": {"c": 1}, "d": [1, {"e": 2}]}, "f": {}}) == {"a.b.c": 1, "a.d": [1, {"e": 2}], "f": {}}


def test_a_difference_has_old_and_new_of_each_leaf():
    assert difference({"a": {"b": 1, "c": 2}}, {"a": {"b": 3, "d": 4}, "e": 5}) == {
        "a.b": (1, 3),
        "a.c": (2, None),
        "a.d": (None, 4),
        "e": (None, 5),
    }
