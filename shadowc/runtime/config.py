"""What an artifact's `config.json` says, so that transformers and vLLM load it as what it is.

An artifact's weights are packed: as the checkpoint's own model type they would load as noise. So
its `model_type` is `shadowc`, which a runtime without this package refuses. ONNX Runtime's servers
know model types by name, and read weights from the graph alone: those artifacts keep theirs (and
name the files of their weights otherwise, see `artifact.weights_stem`).
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedConfig

from shadowc.foreign import points_elsewhere

MODEL_TYPE, ARCHITECTURE = "shadowc", "ShadowcForCausalLM"
ONNX_ARCHITECTURE = "ShadowcOnnx"


class ShadowcConfig(PreTrainedConfig):  # type: ignore[misc]
    """The fields of the checkpoint's config, under a model type of our own.

    Attributes:
        base_model_type: The checkpoint's model type.
    """

    model_type = MODEL_TYPE
    base_model_type: str = "opt"
    use_cache: bool = False  # `model(ids)` scores all tokens; `generate` asks for a cache itself


def artifact_config(config: PreTrainedConfig, target: str, max_seq_len: int) -> PreTrainedConfig:
    """The config of an artifact: what points elsewhere (GGUF files have a path) is left out.

    Args:
        config: The checkpoint's.
        target: The artifact's target.
        max_seq_len: S, the compiled length; what servers refuse longer requests by.
    """
    if target.startswith("onnx-"):
        own = copy.deepcopy(config)
        own.architectures = [ONNX_ARCHITECTURE]
        for key in filter(points_elsewhere, own.to_dict()):
            delattr(own, key)
        return own
    fields: dict[str, Any] = {k: v for k, v in config.to_dict().items() if not points_elsewhere(k)}
    base = fields.pop("model_type")
    changed = {
        "architectures": [ARCHITECTURE],
        "max_position_embeddings": max_seq_len,
        "use_cache": False,
    }
    return ShadowcConfig(**(fields | changed), base_model_type=base)
