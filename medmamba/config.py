"""ModelConfig, which determines a model's tensors: the paper's variants T, S and B, and nano for CPUs and tests."""

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# (dims, depths) of the four stages. T, S and B follow the released code; the paper's table has deeper S and B.
VARIANTS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "T": ((96, 192, 384, 768), (2, 2, 4, 2)),
    "S": ((96, 192, 384, 768), (2, 2, 8, 2)),
    "B": ((128, 256, 512, 1024), (2, 2, 12, 2)),
    "nano": ((24, 48, 96, 192), (1, 1, 1, 1)),
}

WEIGHTS, MODEL = "weights.safetensors", "model.json"  # the files of a model (medmamba.checkpoint)
PATCH = 4  # side of the patch that becomes one position of the first stage, in pixels
# Limits far beyond any trainable model: a model.json may be untrusted, and determines how much memory is allocated.
MOST_STAGES, MOST_CLASSES = 8, 1 << 16
Width = Annotated[int, Field(ge=1, le=8192)]
Depth = Annotated[int, Field(ge=1, le=256)]


class MedMambaConfig(BaseModel):
    """MedMamba (arXiv 2403.03849): convolution and selective scan in parallel in every block."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: Literal["medmamba"] = "medmamba"
    """Which network this is."""
    variant: Literal["T", "S", "B", "nano"] = "nano"
    """Size: T, S and B are the paper's (14, 19 and 40 million parameters), nano (0.5 million) is for CPUs."""
    num_classes: int = Field(default=0, ge=0, le=MOST_CLASSES)
    """Number of scores per image; 0: the number of classes of the dataset."""
    drop_path: float = Field(default=0.1, ge=0, lt=1)
    """Probability of skipping the scan branch of the last block for a training image; grows linearly from 0 at the
    first block."""
    branches: Literal["both", "conv", "scan"] = "both"
    """The active branches of every block; an inactive one passes its channels through unchanged (for ablations)."""
    dims: tuple[Width, ...] = Field(default=(), max_length=MOST_STAGES)
    """Channels of each stage, overriding the variant's: even, and each twice the one before."""
    depths: tuple[Depth, ...] = Field(default=(), max_length=MOST_STAGES)
    """Number of blocks of each stage, overriding the variant's."""
    d_state: int = Field(default=16, ge=1, le=1024)
    """Number of states N of the selective scan per channel."""

    @model_validator(mode="after")
    def _stages_fit(self) -> "MedMambaConfig":
        dims, depths = self.resolved_dims, self.resolved_depths
        if len(dims) != len(depths):
            raise ValueError(f"dims {dims} and depths {depths} must have the same length; set both or neither")
        if dims[0] % 2:
            raise ValueError(f"dims {dims}: a block splits its channels into halves; make the first number even")
        if any(wide != 2 * narrow for narrow, wide in pairwise(dims)):
            raise ValueError(f"dims {dims}: patch merging doubles the channels; make each twice the one before")
        return self

    @property
    def resolved_dims(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return self.dims or VARIANTS[self.variant][0]

    @property
    def resolved_depths(self) -> tuple[int, ...]:
        """Number of blocks of each stage."""
        return self.depths or VARIANTS[self.variant][1]

    @property
    def scan_sizes(self) -> tuple[tuple[int, int, int], ...]:
        """(channels, rank of dt, states) of the scans of each stage; empty without scan branches."""
        if self.branches == "conv":
            return ()
        return tuple((dim, -(-dim // 2 // 16), self.d_state) for dim in self.resolved_dims)

    def last_side(self, image_size: int) -> int:
        """Side of the last stage's maps: every stage after the first halves it, rounding down; may be 0."""
        return image_size // PATCH >> (len(self.resolved_dims) - 1)

    def least_image_size(self, side: int) -> int:
        """The smallest image size whose maps in the last stage have at least this side."""
        return PATCH * side << (len(self.resolved_dims) - 1)

    @property
    def normalizes_batches(self) -> bool:
        """Whether BatchNorm is applied to the maps of every stage."""
        return self.branches != "scan"


class ConvNetConfig(BaseModel):
    """A small residual convolutional network: the baseline for MedMamba."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: Literal["convnet"] = "convnet"
    """Which network this is."""
    num_classes: int = Field(default=0, ge=0, le=MOST_CLASSES)
    """Number of scores per image; 0: the number of classes of the dataset."""
    widths: tuple[Width, ...] = Field(default=(16, 32, 64, 128), min_length=1, max_length=MOST_STAGES)
    """Channels of each stage; every stage after the first halves height and width."""
    blocks: int = Field(default=1, ge=1, le=256)
    """Number of residual blocks per stage."""

    def last_side(self, image_size: int) -> int:
        """Side of the last stage's maps: every stage after the first halves it, rounding up."""
        side = image_size // PATCH
        for _ in self.widths[1:]:
            side = -(-side // 2)
        return side

    def least_image_size(self, side: int) -> int:
        """The smallest image size whose maps in the last stage have at least this side."""
        return PATCH * (((side - 1) << (len(self.widths) - 1)) + 1)

    @property
    def normalizes_batches(self) -> bool:
        """Whether BatchNorm is applied to the maps of every stage."""
        return True


ModelConfig = Annotated[MedMambaConfig | ConvNetConfig, Field(discriminator="kind")]
