"""What tests of the registry start from: a trained model in a store, and the steps that register and promote it."""

from __future__ import annotations

import hashlib
import io
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data_shards.store import Store
from medmamba.checkpoint import load_model, save_model
from medmamba.config import MedMambaConfig
from medmamba.loss import scores
from medmamba.model import build_model
from medmamba.preprocess import preprocess, resize_uint8
from pipelines.console.terminal import Terminal
from pipelines.evaluation.calibrator import fit
from pipelines.evaluation.predictions import StoredPredictions
from pipelines.steps import promote, register
from pipelines.steps.context import StepContext
from pipelines.steps.promote import GateConfig
from pipelines.steps.register import RegisterConfig

CLASSES = ["no lesion", "ellipse", "spiculated"]
SIDE = 40


def context(store: Store, tracking, run: str, placement=None) -> StepContext:
    return StepContext(store=store, run=run, placement=placement, tracking=tracking, show=Terminal(quiet=True))


def facts(store: Store, run: str, *, auc: float, manifest: str = "m" * 64, channels: int = 3) -> dict[str, dict]:
    """The facts of the steps before `register`, with a small model of random weights where `train` leaves it."""
    torch.manual_seed(0)
    config = MedMambaConfig(variant="nano", num_classes=len(CLASSES))
    card = {"classes": CLASSES, "task": "multiclass", "image_size": SIDE, "channels": channels, "dataset": "phantoms"}
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), build_model(config), config, card=card)
        for name in ("weights.safetensors", "model.json"):
            data = (Path(folder) / name).read_bytes()
            digest.update(data)
            store.put(f"runs/{run}/train/model/{name}", data)
    return {
        "shard": {"dataset": "phantoms", "digest": manifest},
        "train": {"digest": digest.hexdigest(), "model": f"runs/{run}/train/model", "mlflow_run": "t"},
        "evaluate": {"metrics": {"auc": auc, "accuracy": 0.5}, "manifest": manifest, "mlflow_run": "e"},
    }


def calibrate(store: Store, run: str, before: dict[str, dict], temperature: float) -> dict[str, dict]:
    """The facts, with a calibration of the model in the store that has this temperature."""
    draw = np.random.default_rng(0)
    labels = np.eye(len(CLASSES), dtype=np.uint8)[np.arange(90) % len(CLASSES)]
    logits = (labels + draw.normal(size=labels.shape)).astype(np.float32)
    validation = StoredPredictions(
        key=np.arange(90).astype(str),
        group=np.arange(90).astype(str),
        labels=labels,
        scores=scores(torch.from_numpy(logits), "multiclass").numpy(),
        logits=logits,
        task="multiclass",
        classes=tuple(CLASSES),
        split="val",
        manifest="m" * 64,
        model=before["train"]["digest"],
    )
    key = f"runs/{run}/evaluate/calibration.json"
    store.put(key, fit(validation).model_copy(update={"temperature": temperature}).to_json())
    return {**before, "evaluate": {**before["evaluate"], "calibration": key}}


def register_run(around: StepContext, before: dict[str, dict], model: str = "") -> dict:
    out = around.store.at("runs", around.run, "register")
    return register.run(RegisterConfig(model=model), None, out, around, **before)


def promote_run(around: StepContext, registered: dict, **config) -> dict:
    out = around.store.at("runs", around.run, "promote")
    return promote.run(GateConfig(**config), None, out, around, register=registered)


def released(store: Store, tracking, run: str, *, auc: float, model: str = "", manifest: str = "m" * 64, **gate):
    """(facts of register, facts of promote) of one run."""
    around = context(store, tracking, run)
    registered = register_run(around, facts(store, run, auc=auc, manifest=manifest), model)
    return registered, promote_run(around, registered, **gate)


def direct_scores(store: Store, run: str, images: list[np.ndarray], temperature: float = 1.0) -> np.ndarray:
    """The probabilities of the model in the store by this project's own code, without MLflow."""
    folder = store.path(f"runs/{run}/train/model")
    assert folder is not None
    model, _, card = load_model(folder)
    pixels = np.stack([np.broadcast_to(resize_uint8(image, SIDE), (SIDE, SIDE, 3)) for image in images])
    with torch.inference_mode():
        return scores(model(preprocess(torch.from_numpy(pixels))) / temperature, card["task"]).numpy()


def images() -> list[np.ndarray]:
    """Three images of different sizes: grey, colour, and one as small as MedMNIST's."""
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, shape, dtype=np.uint8) for shape in ((50, 70, 1), (64, 48, 3), (28, 28, 1))]


def coded(image: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image.squeeze()).save(buffer, kind)
    return buffer.getvalue()


def given() -> dict[str, np.ndarray]:
    """What LOAD_ELSEWHERE reads: the images as PNG files and as pixels."""
    files = {f"coded{i}": np.frombuffer(coded(image), np.uint8) for i, image in enumerate(images())}
    return files | {f"pixels{i}": image for i, image in enumerate(images())}


# Run in a fresh interpreter that has neither this project's folder nor its editable install on its path.
LOAD_ELSEWHERE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import mlflow.pyfunc, numpy as np, pandas as pd
model = mlflow.pyfunc.load_model(sys.argv[1])
given = np.load(sys.argv[2])
coded = [given[name].tobytes() for name in sorted(given) if name.startswith("coded")]
arrays = [given[name] for name in sorted(given) if name.startswith("pixels")]
frame = model.predict(pd.DataFrame({"image": pd.Series(coded + arrays, dtype=object)}))
direct = model.unwrap_python_model().predict(None, arrays)
assert not {"ray", "deepspeed", "pipelines", "boto3"} & set(sys.modules), sorted(sys.modules)
import medmamba, data_shards
assert all("/code/" in module.__file__ for module in (medmamba, data_shards)), medmamba.__file__
columns = np.array(list(frame.columns), dtype=str)
np.savez(sys.argv[3], frame=frame.to_numpy(), columns=columns, direct=direct.to_numpy())
"""

# The same for a server: answers the requests in the JSON file of its second argument, as MLflow serves a model.
SERVE_ELSEWHERE = """
import json, sys, threading, time, urllib.error, urllib.request
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import mlflow.pyfunc, uvicorn
from mlflow.pyfunc.scoring_server import init

def ask(url, request):
    asked = urllib.request.Request(url, json.dumps(request).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(asked) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)

found = {}
for name, config in (("calibrated", None), ("raw", {"calibrated": False})):
    app = init(mlflow.pyfunc.load_model(sys.argv[1], model_config=config))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    requests = json.load(open(sys.argv[2]))
    found[name] = [ask(f"http://127.0.0.1:{port}/invocations", request) for request in requests]
    server.should_exit = True
    thread.join()
assert not {"ray", "deepspeed", "pipelines"} & set(sys.modules)
json.dump(found, open(sys.argv[3], "w"))
"""
