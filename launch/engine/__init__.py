"""The training engine: DeepSpeed, optimizers, learning rates, averaged weights."""
