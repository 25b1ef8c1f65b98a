"""Identifies files that are not supported images; the reason is short and quotes nothing from the file."""

from __future__ import annotations

import re
import zlib

# First bytes -> reason. The first match counts.
_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer, not the file itself: run git lfs pull"),
    (b"\xff\x0a", "JPEG XL, which is not read: save it as PNG"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL, which is not read: save it as PNG"),
    (b"II\xbc\x01", "JPEG XR, which is not read: save it as PNG"),
    (b"\xff\xd8\xff\xf7", "JPEG-LS outside of DICOM, which is not read: save it as PNG"),
    (b"8BPS", "a Photoshop file, which is not read: save it as PNG"),
    (b"gimp xcf", "a GIMP file, which is not read: save it as PNG"),
    (b"\0\0\1\0", "a Windows icon, not an image of a set"),
    (b"v/1\x01", "OpenEXR, which is not read: save it as PNG"),
    (b"#?RADIANCE", "Radiance HDR, which is not read: save it as PNG"),
    (b"SIMPLE  =", "FITS, which is not read: save its images as PNG"),
    (b"NRRD", "NRRD, which is not read: save its slices as PNG or DICOM"),
    (b"\x93NUMPY", "a NumPy array (.npy), not an image: save it as PNG"),
    (b"\x89HDF\r\n\x1a\n", "HDF5, which is not read: save its images as PNG"),
    (b"CDF\1", "NetCDF, which is not read: save its images as PNG"),
    (b"CDF\2", "NetCDF, which is not read: save its images as PNG"),
    (b"MATLAB ", "a MATLAB file (.mat), which is not read: save its images as PNG"),
    (b"%PDF", "a PDF, not an image"),
    (b"%!PS", "PostScript, not an image"),
    (b"{\\rtf", "a text (RTF), not an image"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it"),
    (b"Rar!\x1a\x07", "a RAR archive: unpack it"),
    (b"BZh", "a bzip2 archive: unpack it"),
    (b"\xfd7zXZ\0", "an xz archive: unpack it"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive: unpack it"),
    (b"\x1aE\xdf\xa3", "a video (Matroska or WebM), not an image"),
    (b"\0\0\1\xba", "a video (MPEG), not an image"),
    (b"\0\0\1\xb3", "a video (MPEG), not an image"),
    (b"FLV\1", "a video (Flash), not an image"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "a video (Windows Media), not an image"),
    (b"OggS", "an audio or video file (Ogg), not an image"),
    (b"ID3", "an audio file (MP3), not an image"),
    (b"fLaC", "an audio file (FLAC), not an image"),
    (b"SQLite format 3\0", "a database (SQLite), not an image"),
    (b"PAR1", "a Parquet table, not an image"),
    (b"\x7fELF", "a program, not an image"),
    (b"MZ", "a program, not an image"),
    (b"L\0\0\0\x01\x14\x02\0", "a link of Windows (.lnk), not the file itself"),
    (b"book\0\0\0\0mark", "a link of macOS (alias), not the file itself"),
    (b"!<symlink>", "a link of Cygwin, not the file itself"),
    (b"IntxLNK\1", "a link of Interix, not the file itself"),
    (b"\0\5\x16\7", "a file of macOS beside the image itself (AppleDouble)"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Office document, not an image"),
)
_RIFF = {b"AVI ": "a video (AVI), not an image", b"WAVE": "an audio file (WAV), not an image"}
# Brands of ISO media files.
_AVIF, _HEIC = {b"avif", b"avis"}, {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_NIFTI = "NIfTI, which is not read: save its slices as PNG or DICOM"
_HEAD = 1 << 16
_POINTER = re.compile(rb"[^\r\n\0]{0,4000}/?annex/objects/[^\r\n\0]{1,4000}\n?")
_LINK = re.compile(r"(?:\.{0,2}/)?(?:[^/\n]+/)*[^/\n]+\.(?:png|jpe?g|tiff?|bmp|gif|webp|dcm|jp2)", re.IGNORECASE)


def kind_of(data: bytes) -> str:
    """The kind of a file by its bytes, "" if unknown."""
    head = data[:_HEAD]
    if not data.strip(b"\0"):
        return "only zero bytes: its contents are lost"
    for signature, what in _SIGNATURES:
        if head.startswith(signature):
            return what
    return _by_structure(head, data) or _text_kind(head)


def _by_structure(head: bytes, data: bytes) -> str:
    if head[4:8] == b"ftyp":
        return _media_kind(head)
    if head[:4] == b"RIFF" and head[8:12] in _RIFF:
        return _RIFF[head[8:12]]
    if head[:2] == b"\x1f\x8b":
        return _gzip_kind(data)
    if head[:4] in (b"PK\3\4", b"PK\5\6"):
        return _zip_kind(head)
    if _is_nifti(head):
        return _NIFTI
    if head[:4] in (b"\x5c\1\0\0", b"\0\0\1\x5c"):
        return "an Analyze header, which is not read: save its slices as PNG or DICOM"
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it"
    if head[512:520] == b"\x89HDF\r\n\x1a\n":
        return "HDF5, which is not read: save its images as PNG"
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5") and data.endswith(b"."):
        return "a Python pickle, which is never opened"
    return ""


def _media_kind(head: bytes) -> str:
    size = int.from_bytes(head[:4], "big")
    brands = {head[8:12], *(head[at : at + 4] for at in range(16, min(size, len(head), 256), 4))}
    if brands & _AVIF:
        return "AVIF, which is not read: save it as PNG"
    if brands & _HEIC:
        return "HEIC, which is not read: save it as PNG"
    if b"crx " in brands:
        return "a camera's raw file (CR3), which is not read: save it as PNG"
    return "a video (MP4 or QuickTime), not an image"


def _gzip_kind(data: bytes) -> str:
    try:
        inside = zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(data[:_HEAD], 4096)
    except zlib.error:
        return "a damaged gzip archive"
    if _is_nifti(inside):
        return f"compressed {_NIFTI}"
    return "a compressed tar archive: unpack it" if inside[257:262] == b"ustar" else "a gzip archive: unpack it"


def _zip_kind(head: bytes) -> str:
    if b"[Content_Types].xml" in head[:4096] or b"mimetypeapplication/vnd.oasis" in head[:4096]:
        return "an Office document, not an image"
    first = head[30 : 30 + int.from_bytes(head[26:28], "little")]
    if first.endswith(b".npy"):
        return "NumPy arrays (.npz), not an image: save them as PNG"
    if first.endswith((b"/data.pkl", b"/version", b"/byteorder")):
        return "a PyTorch file, not an image"
    return "a zip archive: unpack it, or name it .zip"


def _is_nifti(head: bytes) -> bool:
    return head[344:348] in (b"n+1\0", b"ni1\0") or head[4:8] in (b"n+2\0", b"ni2\0")


def _text_kind(head: bytes) -> str:
    """The kind of a text file, "" if it is not text."""
    if _POINTER.fullmatch(head):
        return "a git-annex pointer, not the file itself: run git annex get"
    text = _as_text(head)
    start = re.sub(r"\A(?:\s|<\?xml.*?\?>|<!--.*?-->)*", "", text, flags=re.DOTALL)
    lower = start[:4096].lower()
    if re.match(r"<!doctype html|<(?:html|head|body|script|title|meta)\b", lower):
        return "an HTML page, perhaps an error that was saved as an image: get it again"
    if re.match(r"<!doctype svg|<(?:\w+:)?svg\b", lower) or (lower.startswith("<!doctype") and "<svg" in lower):
        return "SVG, which has no pixels: save it as PNG"
    if lower.startswith("<"):
        return "an XML text, not an image"
    if re.match(r"objecttype\s*=|ndims\s*=", lower):
        return "a MetaImage header (.mhd), which is not read: save its slices as PNG or DICOM"
    if re.match(r'[{\[]\s*["{\[\d\]}-]', start):
        return "a JSON text, not an image"
    if start and len(start) < 4096 and _LINK.fullmatch(start.strip()):
        return "a link that was saved as a text, not the file itself"
    lines = start.splitlines()[:5]
    if len(lines) > 1 and any(lines[0].count(mark) and lines[0].count(mark) == lines[1].count(mark) for mark in ",;\t"):
        return "a table (CSV), not an image"
    return "a text, not an image" if start else ""


def _as_text(head: bytes) -> str:
    """The bytes as text, "" if they are not text."""
    encoding = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = head.decode(encoding)
    except UnicodeDecodeError as error:
        if len(head) < _HEAD or error.start < len(head) - 4:  # more than a character cut at the end of the head
            return ""
        text = head[: error.start].decode(encoding, "ignore")
    plain = all(character.isprintable() or character.isspace() for character in text[:4096])
    return text if plain else ""
