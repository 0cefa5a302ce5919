"""Loads an artifact and runs it: programs, the static KV cache, the transformers interface."""
