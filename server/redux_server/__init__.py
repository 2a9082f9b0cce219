"""The HTTP API, the task store and the workers of FLUX Redux Server.

Importing this package, or any module of it, imports no torch: what loads or examines a model does
so inside functions. The API process stays small and starts at once.
"""

__version__ = "0.1.0"
