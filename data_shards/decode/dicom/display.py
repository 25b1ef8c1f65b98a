"""Stored values of a DICOM frame -> the 8 bits that a viewer shows.

Gray values pass the modality LUT or rescale, then the VOI LUT, or the window, or, without either, a range: for up to 8
stored bits the full range, as in a screenshot; for more bits the range of the frame's values without padding, because
scanners rarely use the full range (emri_small.dcm: 467 of 4095) and the image would be black. MONOCHROME1 is inverted
last. Overlays and shutters are not drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from pydicom.multival import MultiValue

from data_shards.config import DicomConfig
from data_shards.decode.dicom.tables import lookup_table, places, pointwise
from data_shards.decode.undecodable import UndecodableImage

if TYPE_CHECKING:
    from pydicom.dataset import Dataset


def gray(stored: np.ndarray, data: Dataset, frame: int, config: DicomConfig, *, little_endian: bool) -> np.ndarray:
    """The displayed image, uint8 (H, W), from stored values (H, W)."""
    shape = _upper(data, "PresentationLUTShape")
    if shape not in ("", "INVERSE" if _upper(data, "PhotometricInterpretation") == "MONOCHROME1" else "IDENTITY"):
        raise UndecodableImage("PhotometricInterpretation and PresentationLUTShape contradict each other")
    if data.get("PresentationLUTSequence"):
        raise UndecodableImage("PresentationLUTSequence: not supported")
    if _upper(data, "PixelPresentation") in ("COLOR", "MIXED"):
        raise UndecodableImage("grey with a supplemental palette: not supported")
    return pointwise(_Pipeline(data, frame, config, little_endian).shown, stored)


def color(stored: np.ndarray, bits: int) -> np.ndarray:
    """The displayed image, uint8 (H, W, 3), from RGB values with `bits` stored bits."""
    if bits == 8 and stored.dtype == np.uint8:
        return stored
    shown: np.ndarray = np.rint(np.minimum(stored / (2.0**bits - 1), 1) * 255).astype(np.uint8)
    return shown


@dataclass(frozen=True)
class _Pipeline:
    """The steps from stored to displayed gray values, from the header of one frame."""

    data: Dataset
    frame: int
    config: DicomConfig
    little_endian: bool

    def shown(self, values: np.ndarray, present: np.ndarray) -> np.ndarray:
        """The displayed uint8 of each value; `present` marks the values that occur."""
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise UndecodableImage("pixels that are no finite numbers")
        modality = self._modality()
        share = self._share(modality(values), present & ~self._padding(values), modality(self._stored_range()))
        if not np.isfinite(share[present]).all():
            raise UndecodableImage("rescaling or window give no finite numbers")
        shown: np.ndarray = np.rint(share * 255).astype(np.uint8)
        return 255 - shown if _upper(self.data, "PhotometricInterpretation") == "MONOCHROME1" else shown

    def _modality(self) -> Callable[[np.ndarray], np.ndarray]:
        """Maps stored values to the scanner's units (Hounsfield units, optical density, ...) as float64."""
        source = self._of_frame("PixelValueTransformationSequence")
        if tables := source.get("ModalityLUTSequence"):
            first, table, _ = lookup_table(tables[0], self.little_endian, signed=self._signed)
            return lambda values: table[places(values, first, len(table))].astype(np.float64)
        slope, intercept = _float(source, "RescaleSlope", 1.0), _float(source, "RescaleIntercept", 0.0)
        if slope == 0:
            raise UndecodableImage("RescaleSlope is 0")
        return lambda values: values * slope + intercept

    def _share(self, values: np.ndarray, present: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """The brightness of each value, from 0 to 1. `ends`: the smallest and largest storable value, mapped."""
        if self.config.window is not None:
            return _windowed(values, *self.config.window, "LINEAR")
        source = self._of_frame("FrameVOILUTSequence")
        if tables := source.get("VOILUTSequence"):
            item = tables[self._view(len(tables))]
            first, table, bits = lookup_table(item, self.little_endian, signed=bool(ends.min() < 0))
            share: np.ndarray = np.minimum(table[places(values, first, len(table))] / (2.0**bits - 1), 1)
            return share
        centers, widths = (list(_floats(source.get(element))) for element in ("WindowCenter", "WindowWidth"))
        if centers and widths:
            view = self._view(min(len(centers), len(widths)))
            return _windowed(values, centers[view], widths[view], _upper(source, "VOILUTFunction") or "LINEAR")
        self._view(1)
        if (self.data.get("BitsStored") or 64) > 8:
            ends = values[present] if present.any() else ends
        low, high = float(ends.min()), float(ends.max())
        return np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros(values.shape)

    def _view(self, there: int) -> int:
        if self.config.view >= there:
            raise UndecodableImage(f"view {self.config.view} is asked for, counted from 0, but there are {there}")
        return self.config.view

    def _of_frame(self, sequence: str) -> Dataset:
        """The dataset with a frame's attribute: its own functional groups, the shared ones, or the top level."""
        own = self.data.get("PerFrameFunctionalGroupsSequence") or []
        if own and self.frame >= len(own):
            raise UndecodableImage(f"functional groups of {len(own)} frames, but this is frame {self.frame}")
        shared = self.data.get("SharedFunctionalGroupsSequence") or []
        for groups in (*own[self.frame : self.frame + 1], *shared[:1]):
            if found := groups.get(sequence):
                item: Dataset = found[0]
                return item
        return self.data

    @property
    def _signed(self) -> bool:
        return bool(self.data.get("PixelRepresentation"))

    def _stored_range(self) -> np.ndarray:
        """The smallest and largest value of the stored bits; not used for float pixels."""
        bits = self.data.get("BitsStored") or 64
        return np.array([-(2.0 ** (bits - 1)) if self._signed else 0, 2.0 ** (bits - self._signed) - 1])

    def _padding(self, values: np.ndarray) -> np.ndarray:
        """Which values are padding."""
        elements = ("PixelPaddingValue", "PixelPaddingRangeLimit")
        ends = [end for element in elements if isinstance(end := self.data.get(element), int)]
        if "PixelPaddingValue" not in self.data or not ends:
            return np.zeros(values.shape, bool)
        if self._signed:  # many programs write them as unsigned
            ends = [end - (1 << 16) if end >= 1 << 15 else end for end in ends]
        return (values >= min(ends)) & (values <= max(ends))


def _upper(data: Dataset, element: str) -> str:
    return str(data.get(element) or "").strip().upper()


def _float(source: Dataset, element: str, default: float) -> float:
    value = source.get(element)
    return default if value in (None, "") else float(value)


def _floats(value: Any) -> Iterator[float]:

    for number in value if isinstance(value, MultiValue) else (value,):
        if number not in (None, ""):
            yield float(number)


def _windowed(values: np.ndarray, center: float, width: float, function: str) -> np.ndarray:
    """Values through a window, from 0 to 1 (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise UndecodableImage("VOILUTFunction is none of LINEAR, LINEAR_EXACT and SIGMOID")
    if not (np.isfinite(center) and 0 < width < np.inf) or (function == "LINEAR" and width < 1):
        raise UndecodableImage(f"a window of width {width:g} around {center:g}, which shows nothing")
    if function == "SIGMOID":
        sigmoid: np.ndarray = 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -700, 700)))
        return sigmoid
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    if width == 0:
        return (values > center).astype(np.float64)
    return np.clip((values - center) / width + 0.5, 0, 1)
