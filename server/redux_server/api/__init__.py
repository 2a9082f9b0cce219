"""The HTTP API: one process that accepts tasks and answers for them. Loads no torch."""
