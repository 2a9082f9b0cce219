"""What a step is conditioned on: the prompt's and the pictures' tokens."""
