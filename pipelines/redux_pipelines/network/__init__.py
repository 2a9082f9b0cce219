"""FLUX.1's transformer, layer by layer."""
