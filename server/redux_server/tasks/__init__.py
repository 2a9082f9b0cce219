"""Tasks: what they are, and the store that accepts, claims and ends them."""
