"""DICOM files: recognizing them, header facts for planning, and one frame as a viewer shows it.

Needs the extra `dicom`, imported for the first DICOM file. Only the elements listed here are read, so nothing else from
a header can reach a shard, a reason or a log. Headers are checked against the content before decoding; a file that
contradicts itself is refused.
"""

from __future__ import annotations

import functools
import logging
import sys
import warnings
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from data_shards.config import DicomConfig
from data_shards.decode.dicom.header import first_element, num_frames_there, opened
from data_shards.decode.dicom.objects import object_name
from data_shards.decode.undecodable import UndecodableImage

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

EXTRA = "pip install 'medmamba[dicom]'"
_IMAGE_ENDINGS = {
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".pbm", ".pgm", ".ppm", ".pnm",
    ".jp2", ".j2k", ".jpx",
}  # fmt: skip
_IDENTIFYING = ("BurnedInAnnotation", "RecognizableVisualFeatures")
_OFTEN_BURNED_IN = ("US", "IVUS", "OT", "SC")
_PLANNING = ("SOPClassUID", "ImageType", "NumberOfFrames", "PatientID", "StudyInstanceUID", "Modality", *_IDENTIFYING)
_DECODING = (
    *_IDENTIFYING, "SOPClassUID", "ImageType", "Modality", "NumberOfFrames", "Rows", "Columns", "SamplesPerPixel",
    "PlanarConfiguration", "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
    "PixelPaddingValue", "PixelPaddingRangeLimit", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence",
    "WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence", "PixelPresentation", "PresentationLUTShape",
    "PresentationLUTSequence", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
    "ExtendedOffsetTable", "ExtendedOffsetTableLengths",
    *(f"{color}PaletteColorLookupTableDescriptor" for color in ("Red", "Green", "Blue")),
    *(f"{how}{color}PaletteColorLookupTableData" for color in ("Red", "Green", "Blue") for how in ("", "Segmented")),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Facts:
    """Header facts that planning needs; texts are empty if the header lacks them."""

    num_frames: int = 1
    patient: str = ""
    study: str = ""
    identifying: bool = False
    """The header says that the pixels may show who the patient is."""
    unsaid: bool = False
    """The header does not say so, and the modality often has names burned in, as in pydicom's examples_palette.dcm."""
    not_image: bool = False
    """Another object, such as a radiotherapy dose or a segmentation."""


def named_as_image(name: str) -> bool:
    """Whether a file is named as PNG, JPEG and so on: such files are not opened during planning."""
    return PurePosixPath(name).suffix.lower() in _IMAGE_ENDINGS


def is_dicom(file: BinaryIO) -> bool:
    """Whether a file is DICOM by its first bytes. Rewinds the file."""
    return first_element(file) is not None


@functools.cache
def usable() -> bool:
    """Whether pydicom can be imported; silences its log, which quotes header values."""
    try:
        import pydicom  # noqa: F401
    except ImportError:
        return False
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    return True


def facts(file: BinaryIO) -> Facts:
    """Header facts of a DICOM file; defaults if the header cannot be read.

    Ignore warnings around it: those of pydicom quote header values.
    """
    if not usable():
        return Facts()
    try:
        found = opened(file, _PLANNING)
        return Facts(
            num_frames=num_frames_there(found),
            patient=_text(found.data, "PatientID"),
            study=_text(found.data, "StudyInstanceUID"),
            identifying=_identifying(found.data) is not None,
            not_image=bool(object_name(found.data)),
            unsaid=not _text(found.data, "BurnedInAnnotation") and _text(found.data, "Modality") in _OFTEN_BURNED_IN,
        )
    except Exception:  # reported when the frame is read
        return Facts()


def frame(file: BinaryIO, index: int, config: DicomConfig, *, alone: bool = False) -> np.ndarray:
    """A frame of a DICOM file as displayed: uint8 (H, W), or (H, W, 3) RGB.

    Args:
        file: An open DICOM file.
        index: Number of the frame, from 0.
        config: Display settings.
        alone: The file was planned as one image; files with more frames are refused.

    Raises:
        UndecodableImage: with the reason, which quotes only numbers that describe the pixels.
    """
    if not usable():
        raise UndecodableImage(f"DICOM, which needs the extra dicom: {EXTRA}")
    try:
        # pydicom's warnings about headers quote them; pixels that it would warn about are refused here.
        with warnings.catch_warnings(action="ignore"):
            return _displayed(file, index, config, alone)
    except UndecodableImage:
        raise
    except Exception as error:  # damaged headers raise almost anything, and must not stop a conversion
        raise UndecodableImage(f"damaged DICOM file ({type(error).__name__})") from error


def _displayed(file: BinaryIO, index: int, config: DicomConfig, alone: bool) -> np.ndarray:
    # Lazy, because these modules import pydicom.
    from data_shards.decode.dicom.display import color, gray
    from data_shards.decode.dicom.pixels import layout_of, stored_values
    from data_shards.decode.dicom.tables import palette

    found = opened(file, _DECODING)
    identifying = _identifying(found.data)
    if identifying and config.identifying == "quarantine":
        raise UndecodableImage(
            f"{identifying} is YES: the pixels may show who the patient is (--data.dicom.identifying keep takes them)"
        )
    layout = layout_of(found)
    name = object_name(found.data)
    if name and config.objects == "quarantine":
        raise UndecodableImage(f"a DICOM {name}, which is not an image (--data.dicom.objects keep)"[:120])
    if alone and layout.frames > 1:
        raise UndecodableImage(f"{layout.frames} frames in a DICOM file that is named as a picture: name it .dcm")
    if index >= layout.frames:
        raise UndecodableImage(f"there is no frame {index} of {layout.frames}")
    stored = stored_values(found, layout, index)
    if layout.interpretation in ("MONOCHROME1", "MONOCHROME2"):
        return gray(stored, found.data, index, config, little_endian=layout.little_endian)
    if layout.interpretation == "PALETTE COLOR":
        return palette(stored, found.data, little_endian=layout.little_endian)
    return color(stored, layout.stored)


def _text(data: Dataset, element: str) -> str:
    return sys.intern(str(data.get(element) or "").strip())  # interned: slices of a study have equal values


def _identifying(data: Dataset) -> str | None:
    """The element that marks the pixels as showing who the patient is."""
    said = (element for element in _IDENTIFYING if str(data.get(element) or "").strip().upper() == "YES")
    return next(said, None)
