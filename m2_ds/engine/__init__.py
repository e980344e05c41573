"""The training engine: one step algorithm, the loop around it, checkpoints and monitoring."""
