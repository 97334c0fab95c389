"""The training loop on Accelerate, and what it needs: optimizers, checkpoints, evaluation."""
