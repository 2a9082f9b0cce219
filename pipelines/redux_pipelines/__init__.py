"""FLUX.1 + Redux inference: from a picture to its variations.

Knows torch, images and checkpoints; knows no HTTP and no database. This file imports nothing, so
that torch-free callers can use ``redux_pipelines.contract.types`` and ``redux_pipelines.images.rgb``.
"""
