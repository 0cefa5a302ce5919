"""Names in an exported model, as Optimum and ONNX Runtime GenAI expect them."""

MODEL, DENSE = "model.onnx", "dense.onnx"
"""The artifact's model, and the same weights with nothing skipped: the baseline."""

INPUTS = ("input_ids", "attention_mask", "position_ids")
PAST, PRESENT = "past_key_values.{}.{}", "present.{}.{}"
KINDS = ("key", "value")

KERNELS = "kernels"
"""The tensor of a model for GPUs that its custom nodes read: see `plan.py`."""
