"""A finished evaluation as documents: one HTML page per run, one that compares runs, and the model card.

Everything comes from the run's records and its study (`pipelines.evaluation.study`); nothing is measured here.
"""
