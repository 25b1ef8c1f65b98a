"""The training step: DeepSpeed, gradients, compilation, BatchNorm statistics, and the state as tensors."""
