"""The graph rewrites, one a file, and the manager that runs a tuple of them in order.

`compiler.py` writes the order down; nothing registers itself.
"""
