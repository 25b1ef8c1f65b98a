"""Baselines: what a model without any idea of shape reaches on the same features."""

from __future__ import annotations

import numpy as np

# Neighbouring pixels say nearly the same: scikit-learn's default of 1 overfits them and would make a yardstick that
# is easy to beat (28x28 pixels, test AUC at 1 and at 0.01: breastmnist 0.801, 0.828; pneumoniamnist 0.920, 0.927).
INVERSE_PENALTY = 0.01
# On 32 threads the fits took 24 to 45 s and 12 minutes of CPU, four times as long as on two: the products are small.
THREADS = 2


def logistic_regression(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, classes: int) -> np.ndarray:
    """Scores (n, classes) of a logistic regression on standardised features, for the rows of `test_x`.

    `train_x`, `test_x`: one row per sample, further axes (pixels) are flattened. `train_y`: class indices (n,) or
    multi-hot labels (n, classes); one independent regression per label where some row has not exactly one.
    Raises ValueError for a class that no training row shows.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    train, test = (np.reshape(x, (len(x), -1)).astype(np.float32) for x in (train_x, test_x))
    labels = np.asarray(train_y)
    if labels.ndim == 2 and (labels.sum(1) == 1).all():
        labels = labels.argmax(1)
    columns = [labels] if labels.ndim == 1 else list(labels.T)
    predicted = []
    for column in columns:
        expected = np.arange(classes) if labels.ndim == 1 else np.arange(2)
        if not np.array_equal(np.unique(column), expected):
            raise ValueError(
                f"training labels show classes {np.unique(column).tolist()} of {expected.tolist()}: "
                "the yardstick needs every class in training; draw the split again"
            )
        model = make_pipeline(StandardScaler(), LogisticRegression(C=INVERSE_PENALTY, max_iter=1000))
        with threadpool_limits(THREADS):
            predicted.append(model.fit(train, column).predict_proba(test))
    return predicted[0] if labels.ndim == 1 else np.stack([p[:, 1] for p in predicted], axis=1)
