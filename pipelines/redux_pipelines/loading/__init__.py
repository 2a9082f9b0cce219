"""From checkpoints to a pipeline."""
