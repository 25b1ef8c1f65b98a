"""Small DICOM files of our own making for the tests; importing it needs pydicom."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

PATIENT = {"PatientName": "Doe^Jane^Quirky", "PatientID": "PAT-0815-X", "StudyInstanceUID": "1.2.826.0.1.77.4711.1"}


def header(pixels: np.ndarray, syntax: str = ExplicitVRLittleEndian, **elements: Any) -> Dataset:
    """A whole data set for pixels (H, W), (H, W, 3) or, with `NumberOfFrames`, (n, H, W[, 3]); None drops an element.

    `PixelData` may be given as a list of codestreams, one per frame.
    """
    frames = "NumberOfFrames" in elements and pixels.ndim == (4 if pixels.shape[-1] == 3 else 3)
    rows, columns = pixels.shape[1:3] if frames else pixels.shape[:2]
    samples = 3 if pixels.ndim == (4 if frames else 3) else 1
    bits = pixels.dtype.itemsize * 8
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    given = {
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.7", "SOPInstanceUID": generate_uid(entropy_srcs=["test"]),
        "Modality": "OT", **PATIENT, "SamplesPerPixel": samples,
        "PhotometricInterpretation": "RGB" if samples == 3 else "MONOCHROME2", "Rows": rows, "Columns": columns,
        "BitsAllocated": bits, "BitsStored": bits, "HighBit": bits - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        **({"PlanarConfiguration": 0} if samples == 3 else {}), "PixelData": pixels.tobytes(), **elements,
    }  # fmt: skip
    if "BitsStored" in elements and "HighBit" not in elements and elements["BitsStored"]:
        given["HighBit"] = elements["BitsStored"] - 1
    for element, value in given.items():
        if value is not None:
            setattr(data, element, encapsulate(value) if element == "PixelData" and isinstance(value, list) else value)
    if "PixelData" in data:
        if isinstance(given["PixelData"], list):
            data["PixelData"].VR, data["PixelData"].is_undefined_length = "OB", True
        else:
            data["PixelData"].VR = "OB" if bits == 8 else "OW"
    return data


def written(data: Dataset) -> bytes:
    """The file, with preamble and file meta."""
    buffer = io.BytesIO()
    data.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def dicom_file(pixels: np.ndarray, syntax: str = ExplicitVRLittleEndian, **elements: Any) -> bytes:
    """`header`, written."""
    return written(header(pixels, syntax, **elements))


def item(**elements: Any) -> Dataset:
    """An item of a sequence."""
    data = Dataset()
    for element, value in elements.items():
        setattr(data, element, value)
    return data
