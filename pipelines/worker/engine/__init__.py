"""One step of a training: DeepSpeed, gradients, compiled parts, statistics of BatchNorm, and its state as tensors."""
