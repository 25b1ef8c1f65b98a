"""Columns of a table kept for figures by subgroup: typed, aligned with the index, checked, and in no shard."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from table_sets import opened, table_of, write
from tiny_sets import coded, pixels

from data_shards.config import DataConfig
from data_shards.convert import convert, key_map
from data_shards.index import METADATA
from data_shards.manifest import MANIFEST, ManifestError, open_dataset
from data_shards.plan import config_digest
from data_shards.shard import write_shard
from data_shards.store import open_store
from data_shards.verify import verify

HEADER = ("file", "label", "age", "sex", "dose", "site", "code", "empty")
COLUMNS = HEADER[2:]


def rows_of(num: int = 24) -> list[tuple[str, ...]]:
    """Images of two classes; every fifth without age, sex and dose."""
    rows = []
    for i in range(num):
        missing = i % 5 == 4
        age = "" if missing else str(20 + i)
        sex, dose = ("nan", "unknown") if missing else ("fm"[i % 2], f"{i / 4}")
        rows.append((f"{i:02d}.png", "ab"[i % 2], age, sex, dose, "Ünıt, 1" if i < 9 else "none", f"{i:03d}", ""))
    return rows


def values_of(rows) -> dict[str, tuple]:
    """What is expected of each image."""
    return {
        file: (int(age) if age else None, sex if sex != "nan" else None, None if dose == "unknown" else float(dose))
        for file, _, age, sex, dose, *_ in rows
    }


def xlsx(rows) -> bytes:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in [HEADER, *rows]:
        book.active.append([int(cell) if i == 2 and cell.isdigit() else cell for i, cell in enumerate(row)])
    data = io.BytesIO()
    book.save(data)
    return data.getvalue()


def write_set(folder, rows, *, kind="csv", images=None):
    """The set, whose images are noise unless `images` has other bytes for one."""
    files = {row[0]: coded(pixels(i)) for i, row in enumerate(rows)} | (images or {})
    table = {"t.xlsx": xlsx(rows)} if kind == "xlsx" else {"t.csv": table_of(rows, HEADER)}
    return write(folder, {**files, **table})


def config_of(folder, **changes) -> DataConfig:
    settings = {"dataset": "mine", "layout": "table", "source": str(folder), "metadata_columns": COLUMNS}
    return DataConfig(**{**settings, "samples_per_shard": 5, "max_quarantine": 0.2, **changes})


def found_in(store, config) -> dict[str, dict[str, object]]:
    """File -> its metadata, from all splits."""
    dataset, places = open_dataset(store), {key: where for key, where, _ in key_map(config)}
    found = {}
    for split in ("train", "val", "test"):
        columns = dataset.metadata(split)
        for i, key in enumerate(dataset.index(split).key.tolist()):
            found[places[key]] = {name: values[i] for name, values in columns.items()}
    return found


@pytest.mark.parametrize("kind", ["csv", "xlsx"])
def test_values_arrive_typed_with_their_images(tmp_path, kind):
    config = config_of(write_set(tmp_path / "set", rows_of(), kind=kind))
    store = open_store(str(tmp_path / "out"))
    convert(config, store)
    found = found_in(store, config)
    assert {file: (each["age"], each["sex"], each["dose"]) for file, each in found.items()} == values_of(rows_of())
    assert {each["site"] for each in found.values()} == {"Ünıt, 1", "none"}
    assert found["07.png"]["code"] == "007"
    assert {each["empty"] for each in found.values()} == {None}
    kinds = pq.read_schema(io.BytesIO(store.get(METADATA)))
    assert [str(kinds.field(name).type) for name in COLUMNS] == ["int64", "string", "double", *["string"] * 3]
    assert verify(store).problems == []


def test_complete_columns_of_numbers_are_arrays_of_numbers(tmp_path):
    rows = [(*row[:2], str(i), "f", f"{i}.5", "s", "c", "e") for i, row in enumerate(rows_of())]
    store = open_store(str(tmp_path / "out"))
    convert(config_of(write_set(tmp_path / "set", rows)), store)
    columns = open_dataset(store).metadata("train")
    assert (columns["age"].dtype, columns["dose"].dtype, columns["sex"].dtype) == (np.int64, np.float64, object)


def test_no_value_is_in_a_shard_index_manifest_or_report(tmp_path):
    rows = [(*row[:3], "secret-sex", *row[4:]) for row in rows_of()]
    store = open_store(str(tmp_path / "out"))
    convert(config_of(write_set(tmp_path / "set", rows)), store)
    assert [key for key in store.list() if b"secret-sex" in store.get(key)] == [METADATA]


def test_only_the_version_differs_with_and_without_metadata(tmp_path):
    folder = write_set(tmp_path / "set", rows_of())
    with_it, without = (open_store(str(tmp_path / name)) for name in ("with", "without"))
    convert(config_of(folder), with_it)
    convert(config_of(folder, metadata_columns=()), without)
    for key in without.list("shards/"):
        assert with_it.get(key) == without.get(key)
    one, two = (json.loads(store.get(MANIFEST)) for store in (with_it, without))
    assert one.pop("config_sha256") != two.pop("config_sha256")
    assert one == two
    assert config_digest(config_of(folder, metadata_columns=())) != config_digest(config_of(folder))
    assert open_dataset(without).metadata("test") == {}
    assert without.head(METADATA) is None


def test_dropped_and_quarantined_images_have_no_metadata(tmp_path):
    rows = rows_of()
    images = {"03.png": b"not an image", "06.png": coded(pixels(8))}  # 06 is 08
    config = config_of(write_set(tmp_path / "set", rows, images=images), duplicates={"within": "drop"})
    store = open_store(str(tmp_path / "out"))
    facts = convert(config, store)
    assert (facts["quarantine"], facts["dropped"]) == (1, 1)
    expected = values_of(rows)
    found = found_in(store, config)
    assert set(found) == set(expected) - {"03.png", "08.png"}
    assert all((each["age"], each["sex"], each["dose"]) == expected[file] for file, each in found.items())
    assert verify(store).problems == []


def test_a_resumed_conversion_writes_the_same_metadata(tmp_path):
    config = config_of(write_set(tmp_path / "set", rows_of()))
    store, fresh = open_store(str(tmp_path / "out")), open_store(str(tmp_path / "fresh"))

    def killed(task, items):
        if task is write_shard:
            yield task(items[0])
            raise KeyboardInterrupt
        yield from map(task, items)

    with pytest.raises(KeyboardInterrupt):
        convert(config, store, run_tasks=killed)
    assert store.head(METADATA) is None
    convert(config, store)
    convert(config, fresh)
    assert store.get(METADATA) == fresh.get(METADATA)


def test_metadata_of_an_attempt_with_other_columns_do_not_stay(tmp_path):
    config = config_of(write_set(tmp_path / "set", rows_of()), metadata_columns=())
    store = open_store(str(tmp_path / "out"))
    store.put(METADATA, b"of an attempt")
    convert(config, store)
    assert open_dataset(store).metadata("train") == {}


def test_a_missing_column_and_a_long_text_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no column 'device' .*--data\.metadata-columns$"):
        opened(write_set(tmp_path / "one", rows_of()), metadata_columns=("device",))
    rows = [(*row[:5], "x" * 257, *row[6:]) for row in rows_of()]
    with pytest.raises(ValueError, match=r"'site' in line 2 of t\.csv has 257 bytes"):
        opened(write_set(tmp_path / "two", rows), metadata_columns=("site",))


def test_a_cell_per_column_however_large_the_table(tmp_path):
    rows = [(*row[:5], "x" * 256, *row[6:]) for row in rows_of()]
    store = open_store(str(tmp_path / "out"))
    convert(config_of(write_set(tmp_path / "set", rows)), store)
    assert set(open_dataset(store).metadata("val")["site"]) == {"x" * 256}


@pytest.mark.parametrize("damage", ["truncated", "keys", "twice", "columns", "types", "gone"])
def test_verify_reports_metadata_that_are_not_the_datasets(tmp_path, damage):
    store = open_store(str(tmp_path / "datasets" / "mine" / "default"))
    convert(config_of(write_set(tmp_path / "set", rows_of())), store)
    table = pq.read_table(io.BytesIO(store.get(METADATA)))
    changed = {
        "keys": table.slice(1),
        "twice": pa.concat_tables([table.slice(1), table.slice(1, 1)]),
        "columns": table.drop_columns(["age"]),
        "types": table.set_column(1, "age", pa.array([[1]] * len(table))),
    }
    data = store.get(METADATA)[:-9]
    if damage in changed:
        buffer = io.BytesIO()
        pq.write_table(changed[damage], buffer, store_schema=False)
        data = buffer.getvalue()
    if damage == "gone":
        store.delete(METADATA)
    else:
        store.put(METADATA, data)
    problems = verify(store).problems
    assert len(problems) == 1
    assert METADATA in problems[0]
    if damage not in ("columns", "gone"):
        with pytest.raises(ManifestError, match="not the metadata of this dataset"):
            open_dataset(store).metadata("train")
