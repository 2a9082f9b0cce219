"""Attention with a bias per key: backends, their tests, and the choice."""
