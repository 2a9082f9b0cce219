"""The transformer as a denoiser: our engine, diffusers, and step caches."""
