"""Names of what an evaluation stores, below `runs/RUN/evaluate/`."""

PREDICTIONS = "predictions.parquet"
"""Of the test split."""
VALIDATION = "predictions-val.parquet"
FILES = {"test": PREDICTIONS, "val": VALIDATION}
STUDY = "evaluation.json"
"""Every figure, interval and curve."""
CALIBRATION = "calibration.json"
"""What was fitted on validation: temperature, thresholds, prediction sets."""
