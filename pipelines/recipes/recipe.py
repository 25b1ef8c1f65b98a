"""The recipe: each part is defined next to the component that it configures."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from data_shards.config import DataConfig
from medmamba.config import MedMambaConfig, ModelConfig
from pipelines.steps.evaluate import EvaluateConfig
from pipelines.steps.promote import GateConfig
from pipelines.steps.register import RegisterConfig
from pipelines.steps.search import TuneConfig
from pipelines.worker.config import TrainConfig


class Recipe(BaseModel):
    """What is made: data, model, training, search, evaluation. The placement says how and where."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    data: DataConfig = DataConfig()
    """The image set, its splits and shards."""
    model: ModelConfig = MedMambaConfig()
    """The network."""
    train: TrainConfig = TrainConfig()
    """How the network is trained."""
    tune: TuneConfig = TuneConfig()
    """How hyperparameters are searched."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """How the model is evaluated."""
    registry: RegisterConfig = RegisterConfig()
    """The name under which the model is registered."""
    gate: GateConfig = GateConfig()
    """What the model must reach to be promoted."""

    def starting_from(self, weights: str) -> Recipe:
        """The recipe with a training that starts from the weights of this digest, which identifies its steps."""
        return self.model_copy(update={"train": self.train.model_copy(update={"init": weights})})
