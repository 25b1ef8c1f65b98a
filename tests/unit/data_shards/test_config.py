"""The data part of a recipe: frozen, whole in itself, and particular about its fields."""

import pytest
from pydantic import ValidationError

from data_shards.config import DataConfig, PhantomConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"datset": "x"}, "Extra inputs are not permitted"),
        ({"dataset": "a/b"}, "becomes a folder"),
        ({"name": ".."}, "becomes a folder"),
        ({"csv": "../labels.csv"}, "inside the source"),
        ({"val_fraction": 0.0}, "greater than 0"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "leave nothing to train on"),
        ({"samples_per_shard": 0}, "greater than or equal to 1"),
        ({"classes": ("a", "a")}, "one class twice"),
        ({"task": "binary"}, "multilabel"),
        ({"duplicates": {"symmetries": "exact", "near": 0}}, "set near above 0"),
        ({"metadata_columns": ("age", "age")}, "each only once"),
        ({"metadata_columns": ("age", "")}, "name each column"),
        ({"metadata_columns": ("height",)}, "rename the column in the table"),
        ({"split_values": ("1",)}, "it says value=split"),
        ({"split_values": ("1=dev",)}, "write for example 1=train 0=test"),
    ],
)
def test_an_unknown_or_impossible_field_is_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        DataConfig(**fields)


def test_a_config_comes_back_from_its_json_and_cannot_be_changed():
    config = DataConfig(classes=("a", "b"), phantoms=PhantomConfig(side=32))
    assert DataConfig.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1
    assert len({config, config.model_copy()}) == 1


@pytest.mark.parametrize("contrast", [(0.7, 0.3), (0.0, 0.5), (0.5, 1.1)])
def test_the_contrast_of_phantoms_is_a_range(contrast):
    with pytest.raises(ValidationError, match="range"):
        PhantomConfig(contrast=contrast)


def test_every_field_explains_itself():
    for model in (DataConfig, PhantomConfig):
        assert [name for name, field in model.model_fields.items() if not field.description] == []
