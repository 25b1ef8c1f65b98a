"""Predictions: files, folders, archives, objects and splits in; class probabilities of a registered model out."""
