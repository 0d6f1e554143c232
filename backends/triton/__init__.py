"""Kernels in Triton, for every device that Triton compiles for. It is no backend: it has no hooks and no name.

A backend registers what `windlass.backends.triton.kernels.triton_kernels` gives. Triton is imported with the modules of
this package that hold kernels, never with this one. With TRITON_INTERPRET=1 the same kernels run on the host.
"""
