"""Trains the embedded "mini" model: the classes and folders of FLUX.1-dev + Redux, 20 M weights.

A tool beside the product: it may import ``redux_pipelines`` and is imported by nothing. Start with
``python -m training.train --help`` from the ``weights`` folder; README.md tells the whole story.
"""
