"""The training loop, stages, checkpoints: what the three modules have in common."""
