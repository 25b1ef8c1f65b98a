"""Measures the speed of a training, its waiting times, and how they compare with what the GPU can do."""
