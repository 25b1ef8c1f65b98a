"""Operators: each has a contract, a plain PyTorch reference and faster backends that match it."""
