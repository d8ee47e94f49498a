"""Triton kernels for NVIDIA GPUs, one file each: the kernel, and the function that launches it.

Importing this package imports neither triton nor anything that needs it; `kernels` does. The same kernels run on the
CPU, slowly, when TRITON_INTERPRET=1 is set before triton is imported: that is how they are tested where there is no
GPU.
"""
