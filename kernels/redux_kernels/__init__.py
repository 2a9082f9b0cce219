"""GPU operators of FLUX Redux Server: torch and triton only, no model and no checkpoint.

One operator a file, registered as ``torch.ops.redux.NAME`` and called the same way on every device:
its Triton kernel runs where ``dispatch`` allows it, its ``reference`` everywhere else. This file
imports nothing; callers name what they use, as in ``from redux_kernels.adaln import adaln``.
"""
