"""What a checkpoint on disk has to look like; knows files, not tensors."""
