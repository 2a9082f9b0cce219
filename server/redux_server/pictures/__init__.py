"""Pictures that callers send: inline, by URL, or uploaded. Decoded in a child."""
