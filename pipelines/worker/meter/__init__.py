"""How fast a training is, what it waits for, and what the GPU could do."""
