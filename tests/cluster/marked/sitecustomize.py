"""Marks in a training, for tests that kill it in a phase: Python imports this before anything else.

Where MEDMAMBA_TEST_MARKS names a file, every process that has this folder on its PYTHONPATH appends lines of
"time pid rank mark" to it when it comes to a phase. At the mark that the file `<name>.pause` beside it names, it waits
half a second, so that a kill from outside falls into that phase.
"""

import functools
import importlib.abc
import importlib.util
import os
import sys
import time

PAUSE_S = 0.5
PAUSES = ("begin", "third-step", "writing", "validating")
MARKS = os.environ.get("MEDMAMBA_TEST_MARKS", "")


def mark(*words):
    """Appends a line."""
    name = "-".join(str(word) for word in words)
    line = f"{time.time():.3f} {os.getpid()} {os.environ.get('RANK', '0')} {name}\n"
    file = os.open(MARKS, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, line.encode())
    os.close(file)
    if name in PAUSES and name == _read(MARKS + ".pause"):
        time.sleep(PAUSE_S)


def _read(path):
    try:
        with open(path) as file:
            return file.read()
    except FileNotFoundError:
        return ""


def marked(function, name):
    """The function, which sets a mark when it begins."""

    @functools.wraps(function)
    def call(*arguments, **options):
        mark(name)
        return function(*arguments, **options)

    return call


def change_loop(loop):
    """A training that begins (its ranks have met and the network is built), and each validation."""
    loop.train_loop = marked(loop.train_loop, "begin")
    loop.validate = marked(loop.validate, "validating")


def change_launch(launch):
    """Each step of each rank."""
    progress = launch.RayReporter.progress

    def call(self, **values):
        mark("step", values["epoch"], values["step"])
        if values["step"] == 3:
            mark("third-step")
        return progress(self, **values)

    launch.RayReporter.progress = call


def change_store(store):
    """The third of a checkpoint's five files: two are in the store, and the one that makes it valid is not."""
    for kind in [each for each in vars(store).values() if isinstance(each, type) and "put" in vars(each)]:
        kind.put = _marked_put(kind.put)


def _marked_put(put):
    @functools.wraps(put)
    def call(self, key, *arguments, **options):
        if key.startswith("checkpoints/") and key.endswith("moments.safetensors"):
            mark("writing")
        return put(self, key, *arguments, **options)

    return call


CHANGES = {
    "pipelines.worker.loop": change_loop,
    "pipelines.worker.launch": change_launch,
    "data_shards.store.folder": change_store,
    "data_shards.store.s3.store": change_store,
}


class Finder(importlib.abc.MetaPathFinder):
    """Changes a module right after it was imported."""

    def find_spec(self, name, path, target=None):
        """The module as the others find it."""
        if name not in CHANGES:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = _changing(spec.loader.exec_module, CHANGES[name])
        return spec


def _changing(execute, change):
    def call(module):
        execute(module)
        change(module)

    return call


if MARKS:
    sys.meta_path.insert(0, Finder())
