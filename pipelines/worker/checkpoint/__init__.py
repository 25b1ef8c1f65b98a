"""Checkpoints in the store, resuming from them, and the resources used so far."""
