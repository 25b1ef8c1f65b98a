"""Sweeps: trials as JSON in the store, suggestions for the next trial, and the adapters for Ray Tune."""
