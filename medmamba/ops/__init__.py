"""Operators: each is a contract with a plain PyTorch definition and faster backends that equal it."""
