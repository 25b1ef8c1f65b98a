"""What a recipe consists of: each part is defined beside the component it configures."""

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
    """What is made: data, model, training, search, judgement. How and where is the placement's."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    data: DataConfig = DataConfig()
    """The image set, its splits and shards."""
    model: ModelConfig = MedMambaConfig()
    """The network."""
    train: TrainConfig = TrainConfig()
    """How its weights are found."""
    tune: TuneConfig = TuneConfig()
    """How hyperparameters are searched."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """How the model is judged."""
    registry: RegisterConfig = RegisterConfig()
    """Under which name it is registered."""
    gate: GateConfig = GateConfig()
    """What it must reach to be promoted."""

    def starting_from(self, weights: str) -> Recipe:
        """The recipe whose training starts from the weights of this digest: what identifies its steps."""
        return self.model_copy(update={"train": self.train.model_copy(update={"init": weights})})
