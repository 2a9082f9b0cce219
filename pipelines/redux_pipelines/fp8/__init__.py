"""Linear layers in fp8: weights, products, and their start-up test."""
