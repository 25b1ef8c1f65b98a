"""DICOM files: which they are, what planning must know of their headers, and one frame as a viewer shows it.

Needs the extra `dicom`, imported when the first DICOM file is met. Only the elements named here are ever read, so
nothing else of a header can reach a shard, a reason or a log. What a file claims is held against what it holds before
anything is decoded: a file that contradicts itself is refused, never guessed at.
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
    *(f"{colour}PaletteColorLookupTableDescriptor" for colour in ("Red", "Green", "Blue")),
    *(f"{how}{colour}PaletteColorLookupTableData" for colour in ("Red", "Green", "Blue") for how in ("", "Segmented")),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Facts:
    """What planning must know of a file; empty texts where its header does not say."""

    num_frames: int = 1
    patient: str = ""
    study: str = ""
    identifying: bool = False
    """The file says that its pixels may show who the patient is."""
    unsaid: bool = False
    """It does not say whether, and is of a kind that often has names burned in (pydicom's examples_palette.dcm has)."""
    not_image: bool = False
    """It is another object, such as a radiotherapy dose or a segmentation."""


def named_as_image(name: str) -> bool:
    """Whether a file's ending says PNG, JPEG and so on: such files are not looked into before they are converted."""
    return PurePosixPath(name).suffix.lower() in _IMAGE_ENDINGS


def is_dicom(file: BinaryIO) -> bool:
    """Whether a file is DICOM by its first bytes. Leaves it at its beginning."""
    return first_element(file) is not None


@functools.cache
def usable() -> bool:
    """Whether pydicom can be imported; quietens its log, which quotes what stands in headers."""
    try:
        import pydicom  # noqa: F401
    except ImportError:
        return False
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    return True


def facts(file: BinaryIO) -> Facts:
    """What planning must know of a DICOM file; a header that cannot be read gives no facts.

    Call it where warnings are ignored: those of pydicom quote what stands in headers.
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
    except Exception:  # whatever is wrong is told when the frame is read
        return Facts()


def frame(file: BinaryIO, index: int, config: DicomConfig, *, alone: bool = False) -> np.ndarray:
    """A frame of a DICOM file as it is displayed: uint8 (H, W), or (H, W, 3) RGB.

    Args:
        file: An open DICOM file.
        index: Which frame, from 0.
        config: How it is displayed.
        alone: The file was planned as one image; more frames are refused.

    Raises:
        UndecodableImage: with the reason; it quotes nothing of the header but numbers that describe the pixels.
    """
    if not usable():
        raise UndecodableImage(f"DICOM, which needs the extra dicom: {EXTRA}")
    try:
        # What pydicom warns of in headers cannot be told (it quotes them), what it warns of in pixels is refused here.
        with warnings.catch_warnings(action="ignore"):
            return _displayed(file, index, config, alone)
    except UndecodableImage:
        raise
    except Exception as error:  # the fault boundary is one image, and damaged headers raise nearly anything
        raise UndecodableImage(f"damaged DICOM file ({type(error).__name__})") from error


def _displayed(file: BinaryIO, index: int, config: DicomConfig, alone: bool) -> np.ndarray:
    from data_shards.decode.dicom.display import colour, grey
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
        return grey(stored, found.data, index, config, little_endian=layout.little_endian)
    if layout.interpretation == "PALETTE COLOR":
        return palette(stored, found.data, little_endian=layout.little_endian)
    return colour(stored, layout.stored)


def _text(data: Dataset, element: str) -> str:
    return sys.intern(str(data.get(element) or "").strip())  # the slices of a study share theirs


def _identifying(data: Dataset) -> str | None:
    """The element that says that the pixels show who the patient is."""
    said = (element for element in _IDENTIFYING if str(data.get(element) or "").strip().upper() == "YES")
    return next(said, None)
