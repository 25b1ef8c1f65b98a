"""Small sets that a table describes, for tests: images without pixels, as only names and labels are read."""

import csv
import io

from data_shards.config import DataConfig
from data_shards.source import open_source


def write(folder, files):
    """The files below the folder; texts as UTF-8."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def table_of(rows, header=("file", "label")):
    """A CSV as text."""
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    return text.getvalue()


def labelled(folder, labels, **fields):
    """The set whose images 0.png, 1.png … have these labels."""
    rows = [(f"{i}.png", label) for i, label in enumerate(labels)]
    write(folder, {name: "" for name, _ in rows} | {"t.csv": table_of(rows)})
    return opened(folder, **fields)


def opened(folder, **fields):
    """The set below the folder, by its table."""
    return open_source(DataConfig(**{"dataset": "mine", "layout": "table", "source": str(folder), **fields}))


def names(images):
    """The class names of each image, in the order of their paths."""
    return [tuple(images.classes[label] for label in row.labels) for row in images.rows]
