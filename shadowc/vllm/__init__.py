"""The plugin with which vLLM serves artifacts: see `plugin.py`."""
