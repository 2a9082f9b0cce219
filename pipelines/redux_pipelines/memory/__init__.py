"""What fits on a GPU: sizes, plans, and weights that stream from the host."""
