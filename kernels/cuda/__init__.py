"""Triton kernels and what launches them, one op a file. Free of imports: see CONTRIBUTING.md."""
