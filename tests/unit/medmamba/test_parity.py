"""Upstream's arithmetic: scores and every gradient of a small network that upstream's own code computed."""

import numpy as np
import pytest
import torch

from medmamba.checkpoint import load_state, load_upstream
from medmamba.model import build_model
from medmamba.ops.ss2d_scan import backends

# A convolution's bias before a BatchNorm has no influence: its true gradient is zero, the vectors hold noise.
WITHOUT_INFLUENCE = ("conv33conv33conv11.1.bias", "conv33conv33conv11.4.bias")


@pytest.fixture(scope="module")
def vectors(shared_dir):
    with np.load(shared_dir / "fixtures" / "medmamba_parity.npz") as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored}


@pytest.fixture(params=[name for name, why_not in backends("cpu").items() if why_not is None])
def model(request, vectors):
    state, config = load_upstream({name[3:]: value for name, value in vectors.items() if name.startswith("sd/")})
    assert config.resolved_dims == (16, 32, 64, 128)
    assert config.resolved_depths == (1, 1, 2, 1)
    model = build_model(config.model_copy(update={"drop_path": 0.0}), scan=request.param)
    load_state(model, state, where="parity vectors")
    return model


def test_scores_equal_upstreams_in_evaluation(model, vectors):
    assert (model.eval()(vectors["x"]) - vectors["logits_eval"]).abs().max() <= 3e-6


def test_scores_loss_and_gradients_equal_upstream_in_training(model, vectors):
    scores = model.train()(vectors["x"])
    assert (scores - vectors["logits_train"]).abs().max() <= 3e-6
    loss = torch.nn.functional.cross_entropy(scores, vectors["y"])
    assert loss.item() == pytest.approx(vectors["loss"].item(), abs=3e-6)
    loss.backward()
    noise, errors = {}, {}
    for name, parameter in model.named_parameters():
        expected = vectors[f"grad/{name}"]
        if name.endswith(WITHOUT_INFLUENCE):
            noise[name] = parameter.grad.abs().max().item()
        else:
            errors[name] = ((parameter.grad - expected).abs().max() / expected.abs().max()).item()
    assert len(noise) == 10
    assert {name: size for name, size in noise.items() if size >= 1e-6} == {}
    assert {name: error for name, error in errors.items() if error > 1e-4} == {}
