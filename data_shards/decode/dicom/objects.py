"""Tells images from other DICOM objects: doses, segmentations, maps and slide labels also have pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

# Images by definition of the standard, without "Image" in the name.
_ALSO_IMAGES = ("Enhanced US Volume Storage", "DICOS 2D AIT Storage", "DICOS 3D AIT Storage")
# For classes newer than the installed pydicom: by UID prefix.
_STORAGE = "1.2.840.10008.5.1.4.1.1."
_FAMILIES = {
    "9.": "waveform", "11.": "presentation state", "30": "parametric map",
    "66": "segmentation, registration or raw data", "67": "value mapping", "68.": "surface", "78.": "measurement",
    "79.": "report", "80.": "measurement", "81.": "thickness map", "82.": "topography map", "88.": "SR document",
    "90.": "assessment", "91.": "annotation", "104.": "encapsulated document", "200.": "protocol",
    "481.": "radiotherapy object",
}  # fmt: skip
# By Modality, for files without a class or with a private one, and for objects saved as images, such as a segmentation
# as CT or a report as secondary capture.
_MODALITIES = {
    "SEG": "segmentation", "RTDOSE": "RT Dose", "RTSTRUCT": "RT Structure Set", "RTPLAN": "RT Plan",
    "RTRECORD": "RT treatment record", "REG": "registration", "FID": "fiducials", "PR": "presentation state",
    "SR": "SR document", "KO": "key object selection", "DOC": "document", "ECG": "ECG waveform",
    "EEG": "EEG waveform", "HD": "hemodynamic waveform", "AU": "audio", "PLAN": "plan", "RWV": "value mapping",
    "SMR": "stereometric relationship", "M3D": "3D model", "STAIN": "staining", "TEXTUREMAP": "texture map",
    "OPTHMAP": "ophthalmic map", "OPM": "ophthalmic map", "ANN": "annotation",
}  # fmt: skip
# Parts of a whole-slide image other than the full-size tissue, by ImageType; a label shows the patient's name.
_SLIDE, _SLIDE_MODALITY = "1.2.840.10008.5.1.4.1.1.77.1.6", "SM"
_SLIDE_PARTS = {
    "LABEL": "label of a slide", "OVERVIEW": "overview of a slide", "THUMBNAIL": "thumbnail of a slide",
}  # fmt: skip


def object_name(data: Dataset) -> str:
    """The kind of a non-image object, by SOP class, modality or image type; "" for an image.

    A private or unknown class counts as an image, because scanners use such classes for their images, unless the
    modality says otherwise. Returns only names from the standard, never header values.
    """
    uid = str(data.get("SOPClassUID") or "").strip().rstrip("\0")
    modality = str(data.get("Modality") or "").strip().upper()
    return _name_of_class(uid) or _MODALITIES.get(modality, "") or _slide_part(data, uid, modality)


def _name_of_class(uid: str) -> str:
    from pydicom.uid import UID, UID_dictionary

    if uid in UID_dictionary:
        name = UID(uid).name
        return "" if "Image" in name or name in _ALSO_IMAGES else name.removesuffix(" Storage")
    if uid.startswith(_STORAGE):
        family = uid.removeprefix(_STORAGE)
        return next((name for start, name in _FAMILIES.items() if family.startswith(start)), "")
    return ""


def _slide_part(data: Dataset, uid: str, modality: str) -> str:
    if uid != _SLIDE and modality != _SLIDE_MODALITY:
        return ""
    found = data.get("ImageType") or ()
    values = {str(value).strip().upper() for value in ([found] if isinstance(found, str) else found)}
    return next((name for value, name in _SLIDE_PARTS.items() if value in values), "")
