"""torch.compile and CUDA graphs for a transformer's step."""
