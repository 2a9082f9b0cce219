"""What callers and pipelines agree on. Imports no torch."""
