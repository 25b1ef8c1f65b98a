"""Every recipe is complete, explained field by field, and makes every workflow."""

from typing import get_args

import pytest
from pydantic import BaseModel

from data_shards.catalog import card
from pipelines.console.terminal import Terminal
from pipelines.flow import plan_steps
from pipelines.flow.runner import in_order
from pipelines.override import override
from pipelines.placement import PlacementConfig
from pipelines.recipes import RECIPES, Recipe, recipe
from pipelines.steps.search import TuneStepConfig, recipe_point, search_space
from pipelines.workflows import WORKFLOWS, until


def models_of(kind: type[BaseModel]) -> set[type[BaseModel]]:
    """The model and all models that its fields may hold, however deep."""
    found = {kind}
    for info in kind.model_fields.values():
        for each in (info.annotation, *get_args(info.annotation)):
            if isinstance(each, type) and issubclass(each, BaseModel):
                found |= models_of(each)
    return found


MODELS = sorted(models_of(Recipe) | {PlacementConfig}, key=lambda kind: kind.__name__)


def test_the_recipe_reaches_the_models_whose_help_is_checked():
    names = {kind.__name__ for kind in MODELS}
    assert {"DataConfig", "PhantomConfig", "MedMambaConfig", "ConvNetConfig", "OptimConfig", "SearchSpace"} <= names


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_every_field_has_help_and_is_immutable(kind):
    assert [name for name, info in kind.model_fields.items() if not (info.description or "").strip()] == []
    assert kind.model_config["frozen"]
    assert kind.model_config["extra"] == "forbid"


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_every_recipe_makes_every_workflow(name, workflow, tmp_path):
    from data_shards.store import open_store

    steps = WORKFLOWS[workflow](recipe(name))
    assert all(state.state == "to do" for state in plan_steps(steps, open_store(str(tmp_path)), "run"))
    assert [step.name for step in in_order(steps)][-1] == "promote"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_json_and_validation(name):
    made = recipe(name)
    assert Recipe.model_validate_json(made.model_dump_json()) == made
    assert override(made, {}) == made
    assert RECIPES[name].__doc__


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipes_dataset_is_in_the_catalogue_or_described(name):
    data = recipe(name).data
    assert data.layout != "catalog" or card(data.dataset).classes


def test_an_unknown_recipe_is_told_with_the_nearest_one():
    with pytest.raises(ValueError, match=r"quikstart: unknown recipe; did you mean quickstart\? available:"):
        recipe("quikstart")


def test_until_keeps_a_step_and_what_it_needs():
    release = WORKFLOWS["release"](Recipe())
    assert [step.name for step in until(release, "train")] == ["shard", "tune", "train"]
    assert [step.name for step in until(release, "shard")] == ["shard"]
    with pytest.raises(ValueError, match=r"step .tune. in this workflow; available: shard, train"):
        until(WORKFLOWS["direct"](Recipe()), "tune")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_lies_in_its_own_search_space(name, capsys):
    """So that it is the first trial of its sweep."""
    steps = {step.name: step.config for step in WORKFLOWS["release"](recipe(name))}
    (point,) = first_point(steps["tune"])
    assert point["train.optim.lr"] == recipe(name).train.optim.lr


def test_a_recipe_outside_its_search_space_is_told(capsys):
    config = override(recipe("quickstart"), {"train.optim.lr": 0.1})
    assert first_point({step.name: step.config for step in WORKFLOWS["release"](config)}["tune"]) == []
    assert "train.optim.lr 0.1 is outside tune.space" in capsys.readouterr().err


def first_point(config: TuneStepConfig) -> list[dict]:
    return recipe_point(config, search_space(config), Terminal().say)
