"""Kernels that read rows in place, by slot. `cpu` is the native library; each kernel has a reference in plain torch."""
