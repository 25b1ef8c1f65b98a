"""Small imitations of the sixteen published sets: their archives, file names, tables and oddities, with few images.

What is imitated is what publishers and public code say of each set; no image is anybody's.
"""

from __future__ import annotations

import io
import struct
import uuid
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import openpyxl
from PIL import Image

from data_shards.catalog import card

SIDE = 12
RGB_MEDMNIST = ("pathmnist", "dermamnist", "retinamnist", "bloodmnist")


@dataclass
class Imitation:
    """A set on disk, and what must be found in it."""

    source: Path
    counts: dict[str, int]  # images per class
    groups: dict[str, str] = field(default_factory=dict)  # file name -> group, where there are groups
    splits: dict[str, str] = field(default_factory=dict)  # file name -> published split, where there is one


def image(number: int, mode: str, kind: str = "PNG") -> bytes:
    """A coded noise image, unlike any other number's."""
    channels = {"RGB": 3, "RGBA": 4}.get(mode, 0)
    shape = (SIDE, SIDE + number % 5, channels) if channels else (SIDE, SIDE + number % 5)
    pixels = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
    if mode == "I;16":
        pixels = pixels.astype(np.uint16) * 257
    elif mode == "RGBA":
        pixels[..., 3] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def zip_of(files: Mapping[str, bytes], *, stored: bool = False) -> bytes:
    """A zip with folders as members of their own, as file managers write it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED) as archive:
        for folder in sorted({f"{parent}/" for name in files for parent in Path(name).parents} - {"./"}):
            archive.writestr(folder, b"")
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    """The files below the folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def medmnist(name: str, folder: Path, *, side: int = 28, flat_labels: bool = False) -> Imitation:
    """`<name>.npz` or `<name>_64.npz` and so on: arrays of three splits, every class in each."""
    classes = card(name).classes
    arrays, counts = {}, Counter()
    for split, each in (("train", 3), ("val", 1), ("test", 2)):
        labels = np.tile(np.arange(len(classes), dtype=np.uint8), each)
        shape = (len(labels), side, side, *((3,) if name in RGB_MEDMNIST else ()))
        arrays[f"{split}_images"] = np.random.default_rng(len(shape)).integers(0, 256, shape, dtype=np.uint8)
        arrays[f"{split}_labels"] = labels if flat_labels else labels[:, None]
        counts.update(classes[label] for label in labels)
    path = folder / f"{name}{'' if side == 28 else f'_{side}'}.npz"
    np.savez_compressed(path, **arrays)
    return Imitation(path, dict(counts))


# The columns of metadata.csv in their order there.
PAD_COLUMNS = (
    "patient_id,lesion_id,smoke,drink,background_father,background_mother,age,pesticide,gender,skin_cancer_history,"
    "cancer_history,has_piped_water,has_sewage_system,fitspatrick,region,diameter_1,diameter_2,diagnostic,itch,grew,"
    "hurt,changed,bleed,elevation,img_id,biopsed"
)


def pad_ufes_20(folder: Path, form: str = "one zip") -> Imitation:
    """metadata.csv and three zips of PNGs below images/: in one zip, as single files, or unpacked."""
    parts: list[dict[str, bytes]] = [{}, {}, {}]
    lines, counts, groups = [PAD_COLUMNS], Counter(), {}
    number = 0
    for patient in range(30):
        for photo in range(1 + patient % 3):
            label = card("pad-ufes-20").classes[(patient + (photo > 1)) % 6]
            name = f"PAT_{1500 + patient}_{1700 + number}_{(number * 37) % 1000:03d}.png"
            parts[number % 3][f"imgs_part_{number % 3 + 1}/{name}"] = image(number, ("RGB", "RGBA")[number % 2])
            # Most clinical columns are empty for half of the patients, and UNK for some.
            line = f"PAT_{1500 + patient},{1700 + number},,,,,{40 + patient},,,,,,,,ARM,,,{label},UNK,,,,,,{name},False"
            lines.append(line)
            counts[label] += 1
            groups[name] = f"PAT_{1500 + patient}"
            number += 1
    table = {"metadata.csv": ("\n".join(lines) + "\n").encode()}
    zips = {f"images/imgs_part_{i + 1}.zip": zip_of(part) for i, part in enumerate(parts)}
    if form == "one zip":
        inside = {f"zr7vgbcyr2-1/{name}": data for name, data in (table | zips).items()}
        source = folder / "zr7vgbcyr2-1.zip"
        source.write_bytes(zip_of(inside, stored=True))
    elif form == "single files":
        source = write(folder / "pad-ufes-20", table | zips)
    else:
        unpacked = {f"images/{name}": data for part in parts for name, data in part.items()}
        source = write(folder / "pad-ufes-20", table | unpacked)
    return Imitation(source, dict(counts), groups)


FETAL_COLUMNS = ("Image_name", "Patient_num", "Plane", "Brain_plane", "Operator", "US_Machine", "Train ")


def fetal_planes_db(folder: Path) -> Imitation:
    """One zip: a table with semicolons and a blank after its last name, the same as XLSX, RGBA pictures in Images/."""
    rows, files, counts, groups, splits = [], {}, Counter(), {}, {}
    for patient in range(1, 49):
        for plane in (patient % 6, (patient + 1) % 6):
            label = card("fetal-planes-db").classes[plane]
            name = f"Patient{patient:05d}_Plane{plane + 1}_1_of_1"
            brain = "Trans-thalamic" if label == "Fetal brain" else "Not A Brain"
            rows.append((name, patient, label, brain, "Op. 1", "Voluson E6", patient % 2))
            files[f"Images/{name}.png"] = image(10 * patient + plane, "RGBA")
            counts[label] += 1
            groups[f"{name}.png"] = str(patient)
            splits[f"{name}.png"] = "train" if patient % 2 else "test"
    lines = [";".join(FETAL_COLUMNS), *(";".join(map(str, row)) for row in rows)]
    litter = {"README.md": b"# Fetal_Planes_DB", "__MACOSX/Images/._Patient00001_Plane1_1_of_1.png": b"\0\5\x16\7"}
    tables = {
        "FETAL_PLANES_DB_data.csv": ("\r\n".join(lines) + "\r\n").encode(),
        "FETAL_PLANES_DB_data.xlsx": xlsx([FETAL_COLUMNS, *rows]),
    }
    source = folder / "FETAL_PLANES_ZENODO.zip"
    source.write_bytes(zip_of(files | tables | litter))
    return Imitation(source, dict(counts), groups, splits)


def xlsx(rows) -> bytes:
    """A workbook with the rows on its first sheet, and notes on a second."""
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.create_sheet("notes").append(["not the table"])
    buffer = io.BytesIO()
    book.save(buffer)
    return buffer.getvalue()


def xlsx_by_excel() -> bytes:
    """What Excel itself writes where openpyxl writes otherwise: texts in a part of their own, with runs of formats in
    them; an extent that is too small (some exporters); a formula with its value; a cell of formatting alone."""
    main = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    types = "application/vnd.openxmlformats-officedocument.spreadsheetml"
    package = "http://schemas.openxmlformats.org/package/2006"
    texts = ["file", "label", "patient", "a.png", "<r><t>b</t></r><r><rPr><b/></rPr><t>.png</t></r>", "x"]
    rows = [
        [("s", 0), ("s", 1), ("s", 2)],
        [("s", 3), ("s", 5), ("n", "7.0"), ("n", "")],
        [("s", 4), ("str", '<f>UPPER("y")</f>y'), ("b", 1)],
    ]

    def cell(place: str, kind: str, value: object) -> str:
        formula, _, shown = str(value).rpartition("</f>")
        inside = f"{formula}{'</f>' * bool(formula)}<v>{shown}</v>" if shown else ""
        return f'<c r="{place}" t="{kind}">{inside}</c>'

    lines = [
        f'<row r="{r}">{"".join(cell(f"{chr(65 + c)}{r}", *value) for c, value in enumerate(row))}</row>'
        for r, row in enumerate(rows, 1)
    ]
    strings = "".join(f"<si>{text if text.startswith('<') else f'<t>{text}</t>'}</si>" for text in texts)
    parts = {
        "[Content_Types].xml": f'''<Types xmlns="{package}/content-types">
            <Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>
            <Override PartName="/xl/workbook.xml" ContentType="{types}.sheet.main+xml"/>
            <Override PartName="/xl/worksheets/sheet1.xml" ContentType="{types}.worksheet+xml"/>
            <Override PartName="/xl/sharedStrings.xml" ContentType="{types}.sharedStrings+xml"/></Types>''',
        "_rels/.rels": f'''<Relationships xmlns="{package}/relationships">
            <Relationship Id="r1" Type="{office}/officeDocument" Target="xl/workbook.xml"/></Relationships>''',
        "xl/workbook.xml": f'''<workbook {main} xmlns:r="{office}"><sheets>
            <sheet name="Sheet1" sheetId="1" r:id="r1"/></sheets></workbook>''',
        "xl/_rels/workbook.xml.rels": f'''<Relationships xmlns="{package}/relationships">
            <Relationship Id="r1" Type="{office}/worksheet" Target="worksheets/sheet1.xml"/>
            <Relationship Id="r2" Type="{office}/sharedStrings" Target="sharedStrings.xml"/></Relationships>''',
        "xl/worksheets/sheet1.xml": f"""<worksheet {main}><dimension ref="A1"/>
            <sheetData>{"".join(lines)}</sheetData></worksheet>""",
        "xl/sharedStrings.xml": f"<sst {main}>{strings}</sst>",
    }
    return zip_of({name: text.encode() for name, text in parts.items()})


def cpn_x_ray(folder: Path) -> Imitation:
    """A zip that holds one zip with a space-ridden name, which holds a folder with the class folders."""
    files, counts = _by_class("cpn-x-ray", lambda label, i: f"{label} ({i + 1}).png", ("L", "RGB", "L"))
    litter = {"COVID/.ipynb_checkpoints/COVID (1)-checkpoint.png": b"", ".ipynb_checkpoints/x.png": b""}
    title = "Covid19-Pneumonia-Normal Chest X-Ray Images"
    inner = zip_of({f"{title}/{name}": data for name, data in (files | litter).items()})
    source = folder / "dvntn9yhd2-1.zip"
    source.write_bytes(zip_of({f"dvntn9yhd2-1/{title} Dataset.zip": inner}, stored=True))
    return Imitation(source, counts)


def kvasir(folder: Path) -> Imitation:
    """One zip with a folder of JPEGs per class, named by random numbers."""

    def name(label: str, i: int) -> str:
        return f"{uuid.UUID(int=1000 * len(label) + i)}.{'JPG' if i == 2 else 'jpg'}"

    files, counts = _by_class("kvasir", name, ("RGB",), kind="JPEG")
    source = folder / "kvasir-dataset.zip"
    source.write_bytes(zip_of({f"kvasir-dataset/{where}": data for where, data in files.items()}))
    return Imitation(source, counts)


def class_folders(name: str, folder: Path) -> Imitation:
    """What a private set is asked to look like, and what file managers and notebooks leave in it."""
    files, counts = _by_class(
        name, lambda label, i: f"{label} ({i + 433}).{('png', 'PNG')[i % 2]}", ("L", "RGB", "I;16")
    )
    label = card(name).classes[1]
    litter = {f"{label}/Thumbs.db": b"\xd0\xcf", ".ipynb_checkpoints/a.png": b"", f"{label}/.DS_Store": b""}
    return Imitation(write(folder / name, files | litter), counts)


def _by_class(name: str, file_name, modes: tuple[str, ...], kind: str = "PNG") -> tuple[dict, dict[str, int]]:
    files, counts = {}, Counter()
    for index, label in enumerate(card(name).classes):
        for i in range(7 + index % 3):
            files[f"{label}/{file_name(label, i)}"] = image(100 * index + i, modes[i % len(modes)], kind)
            counts[label] += 1
    return files, dict(counts)


def imitation(name: str, folder: Path) -> Imitation:
    """The set of this name in its published form."""
    if name.endswith("mnist"):
        return medmnist(name, folder, flat_labels=name == "organsmnist")
    own = {"pad-ufes-20": pad_ufes_20, "fetal-planes-db": fetal_planes_db, "cpn-x-ray": cpn_x_ray, "kvasir": kvasir}
    return own[name](folder) if name in own else class_folders(name, folder)


def patched(data: bytes, at: int, values: bytes) -> bytes:
    """The data with other bytes at a place."""
    return data[:at] + values + data[at + len(values) :]


def central_entry(data: bytes, name: str) -> int:
    """Where a member's entry in a zip's table of contents begins."""
    (at,) = struct.unpack_from("<I", data, data.rindex(b"PK\5\6") + 16)
    while data[at : at + 4] == b"PK\1\2":
        lengths = struct.unpack_from("<HHH", data, at + 28)
        if data[at + 46 : at + 46 + lengths[0]] == name.encode():
            return at
        at += 46 + sum(lengths)
    raise LookupError(name)
