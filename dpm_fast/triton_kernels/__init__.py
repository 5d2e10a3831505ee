"""Triton kernels: the GPU path that needs no compiler. Each file holds one op, by its stem."""
