"""GPU operators of FLUX Redux Server: torch and triton only, no model and no checkpoint.

One operator a file, registered as ``torch.ops.redux.NAME`` and called the same way on every device:
its Triton kernel runs where ``dispatch`` allows it, its ``reference`` everywhere else. Kernels read
128 bits at a time where strides are multiples of 16 elements, as FLUX's are; others are right, but
slow. This file imports nothing; callers name what they use, as in ``from redux_kernels.adaln import
adaln``.
"""
