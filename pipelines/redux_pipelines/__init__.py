"""FLUX.1 + Redux inference: from a picture to its variations.

Knows torch, images and checkpoints; knows no HTTP and no database. This file imports nothing, so
that callers without torch can use ``contract`` and ``images``.
"""
