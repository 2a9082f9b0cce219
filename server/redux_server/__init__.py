"""The HTTP API, the task store and the workers of FLUX Redux Server.

Importing this package, or any module of it but ``worker_main``, never imports torch: the API
process stays small and starts at once.
"""

__version__ = "0.1.0"
