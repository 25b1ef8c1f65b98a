"""Settings of data augmentation: the `augment` part of a recipe. Must not import torch, like all of a recipe."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class AugmentConfig(BaseModel):
    """Random changes that keep a label true. Each is drawn from (seed, epoch, image); 0 switches it off."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    crop: float = Field(default=0.0, ge=0.0, le=1.0)
    """Take a random crop with at least this share of the image's area and an aspect ratio between 3:4 and 4:3. Done
    while decoding: a JPEG is decoded only as far and at the scale that the crop needs."""
    hflip: float = Field(default=0.5, ge=0.0, le=1.0)
    """Probability of flipping left and right. Set 0 if the side of the body matters."""
    vflip: float = Field(default=0.0, ge=0.0, le=1.0)
    """Probability of flipping top and bottom. Only for images without an upright orientation, such as histology, cells
    and skin."""
    rot90: bool = False
    """Rotate by 0, 90, 180 or 270 degrees, equally likely. Only for images without an upright orientation."""
    translate: float = Field(default=0.1, ge=0.0, le=0.5)
    """Shift by up to this fraction of the height and of the width."""
    scale: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Enlarge or shrink by a factor of up to 1 + this."""
    rotate: float = Field(default=10.0, ge=0.0, le=180.0)
    """Rotate by up to this many degrees in either direction."""
    brightness: float = Field(default=0.1, ge=0.0, le=1.0)
    """Lighten or darken by up to this fraction of the range from black to white."""
    contrast: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Raise or lower the contrast around the image's mean by a factor of up to 1 + this."""
    erase: float = Field(default=0.0, ge=0.0, le=1.0)
    """Probability of painting over one rectangle (a fifth to two fifths of each side) with the image's mean."""

    pad_crop: int = Field(default=0, ge=0)
    """Shift by up to this many pixels without interpolation: a crop of the padded image. For small images."""
    padding: Literal["reflection", "zeros"] = "reflection"
    """Fill for areas outside the image when it is moved: its mirror image, or black."""
    saturation: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Make colors paler or stronger by a factor of up to 1 + this. Does nothing to gray images."""
    hue: float = Field(default=0.0, ge=0.0, le=180.0)
    """Rotate hues by up to this many degrees in either direction. Does nothing to gray images."""
    augmix: float = Field(default=0.0, ge=0.0, le=1.0)
    """Severity of a mixture of three chains of changes with the image itself (AugMix, arXiv 1912.02781)."""

    @property
    def moves_pixels(self) -> bool:
        """Whether any change needs the image resampled."""
        return bool(
            self.hflip or self.vflip or self.rot90 or self.translate or self.scale or self.rotate or self.pad_crop
        )
