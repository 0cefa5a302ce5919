"""Files from somewhere else: read so that nothing in them can do more than be refused.

An artifact is a directory that a stranger may have made. Here is what is asked of its files before
anything believes them: regular files inside the directory, JSON of one meaning, headers that agree
with the sizes of their files, and Hugging Face files that name no code.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shadowc.errors import ArtifactError

MOST_JSON = 8 << 20
"""Bytes of a JSON file; programs have up to 17 KB a layer."""
_MOST_DEPTH = 32
_MOST_NAMES = 1 << 14
_CHUNK = 1 << 22
_MOST_DIGITS = 32  # transformers writes 10^30 where there is no limit
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,200}(/[A-Za-z0-9_][A-Za-z0-9_.+-]{0,200}){0,4}")
_TOKENS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[{]|[\]}]', re.DOTALL)

#: What an artifact may list: what this package and transformers' tokenizers write. Libraries look
#: for more (adapters, processors, code), and would find it.
_WRITTEN = re.compile(
    r"(report|config|generation_config|genai_config|tokenizer|tokenizer_config|special_tokens_map|"
    r"added_tokens|vocab)\.json|merges\.txt|tokenizer\.model|chat_template\.jinja|"
    r"additional_chat_templates/[A-Za-z0-9_.-]+\.jinja|"
    r"(model|weights)(-\d{5}-of-\d{5})?\.safetensors|(model|weights)\.safetensors\.index\.json|"
    r"predictor\.safetensors|(model|dense)\.onnx|"
    r"programs/(dense|full|exact|prefill|decode|hold|lazy|lazy_hold|catch_up|masked)\.json|"
    r"programs/(prefill|decode)\.pt2|kernels/sm_\d{2,3}/(index\.json|[A-Za-z0-9_-]+\.cubin)"
)

#: What may lie in an artifact without being listed: what people add to a directory they share, and,
#: as regular files, what this package draws or is about to put in the place of something.
_UNLISTED = re.compile(r"\..*|README\.md|LICENSE.*")
_UNLISTED_FILES = re.compile(r"report\.html|(manifest|report)\.json\.new|report\.html\.new")

#: Bytes of a value of each type that a header may name.
ITEM = {"BOOL": 1, "U8": 1, "I32": 4, "I64": 8, "BF16": 2, "F16": 2, "F32": 4, "F64": 8}

#: Keys by which Hugging Face's libraries find code or files elsewhere.
_FORBIDDEN = re.compile(
    r"auto_map|trust_remote_code|custom_generate|custom_pipelines|quantization_config|"
    r"_?(attn|experts)_implementation(_internal)?|.*_files?|.*_path|.*_paths"
)
_HARMLESS_PATHS = ("name_or_path", "_name_or_path")
_MODEL_TYPES = ("shadowc", "opt", "llama")
_TOKENIZERS = re.compile(
    r"TokenizersBackend|PreTrainedTokenizer(Fast)?|(GPT2|Llama|CodeLlama|GPTNeoX)Tokenizer(Fast)?"
)
#: All that GenAI's config says here; it knows more keys, some of which name libraries.
_GENAI = frozenset(
    """
    model type bos_token_id eos_token_id pad_token_id context_length vocab_size decoder
    session_options log_id provider_options cuda filename head_size hidden_size num_attention_heads
    num_hidden_layers num_key_value_heads inputs input_ids attention_mask position_ids
    past_key_names past_value_names outputs logits present_key_names present_value_names search
    do_sample max_length past_present_share_buffer
    """.split()
)
_HUGGING_FACE = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "genai_config.json",
)  # fmt: skip


def damaged(path: Path, expected: object, got: object) -> ArtifactError:
    """The error for a file that is not what it should be."""
    try:
        text = str(got)
    except RecursionError:
        text = "something nested"
    return ArtifactError(
        f"{path} is damaged or not of this version",
        expected=expected,
        got=text[:300],
        fix="compile the artifact again",
    )


# ---------------------------------------------------------------------------- files


def check_name(root: Path, name: object, listing: str) -> str:
    """Raise unless this is the name of a file inside a directory, as this package gives them."""
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise damaged(root / listing, "names of files inside the artifact", repr(name)[:200])
    return name


def check_listing(root: Path, files: Mapping[str, Any], listing: str) -> None:
    """Raise unless a manifest lists files alone that an artifact may have; none is opened."""
    for name in files:
        if _WRITTEN.fullmatch(check_name(root, name, listing)) is None:
            raise damaged(root / listing, "files that compile writes", name)


@contextlib.contextmanager
def opened(root: Path, name: str) -> Iterator[tuple[int, int]]:
    """Open a regular file of a directory, whose name is checked; links are not followed.

    Yields:
        Descriptor, and size in bytes.

    Raises:
        ArtifactError: If it is missing, or a link, a pipe or anything else.
    """
    path, held = root / name, []
    *folders, last = name.split("/")
    kind = "a file, not a link or anything else"
    try:
        try:
            place = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            held.append(place)
            for folder in folders:
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                place = os.open(folder, flags, dir_fd=place)
                held.append(place)
            # O_NONBLOCK: opening a pipe that nobody writes would wait for ever.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(last, flags, dir_fd=place)
            held.append(descriptor)
        except OSError as error:
            wrong = error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO)
            expected = kind if wrong else "a file of the artifact"
            raise damaged(path, expected, error.strerror) from error
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise damaged(path, kind, stat.filemode(found.st_mode))
        yield descriptor, found.st_size
    finally:
        for one in held:
            os.close(one)


def read(root: Path, name: str, most: int = MOST_JSON) -> bytes:
    """A whole file of at most so many bytes."""
    with opened(root, name) as (descriptor, size):
        if size > most:
            raise damaged(root / name, f"at most {most} bytes", size)
        parts = []
        while part := os.read(descriptor, _CHUNK):
            parts.append(part)
    return b"".join(parts)


def check_content(root: Path, name: str, entry: Any) -> None:
    """Raise unless a file has the size and hash that a manifest gives it."""
    if not (
        isinstance(entry, dict)
        and type(entry.get("bytes")) is int
        and isinstance(entry.get("sha256"), str)
    ):
        raise damaged(root / "manifest.json", "bytes and sha256 of every file", name)
    with opened(root, name) as (descriptor, size):
        if size != entry["bytes"]:
            raise damaged(root / name, f"{entry['bytes']} bytes", f"{size} bytes")
        digest = hashlib.sha256()
        while part := os.read(descriptor, _CHUNK):
            digest.update(part)
    if digest.hexdigest() != entry["sha256"]:
        raise damaged(root / name, f"sha256 {entry['sha256'][:64]}", "another content")


def check_listed(root: Path, files: Mapping[str, Any], listing: str) -> None:
    """Raise if a directory holds what its manifest does not list: libraries would find it."""
    folders = {"/".join(name.split("/")[:depth]) for name in files for depth in range(1, 5)}
    waiting, seen = [""], 0
    while waiting:
        folder = waiting.pop()
        try:
            entries = [*os.scandir(root / folder)]
        except OSError as error:
            raise damaged(root / folder, "a directory", error.strerror) from error
        seen += len(entries)
        for entry in entries if seen <= _MOST_NAMES else ():
            name = f"{folder}/{entry.name}".lstrip("/")
            drawn = name not in files and _UNLISTED_FILES.fullmatch(name) is not None
            if drawn and not entry.is_file(follow_symlinks=False):
                raise damaged(root / name, "a file, not a link or anything else", "another kind")
            if drawn or name in files or name == listing or _UNLISTED.fullmatch(name):
                continue
            if name in folders and entry.is_dir(follow_symlinks=False):
                waiting.append(name)
                continue
            raise damaged(root / name, "a file that the manifest lists", "one that it does not")
        if seen > _MOST_NAMES:
            raise damaged(root, f"at most {_MOST_NAMES} files", "more")


# ---------------------------------------------------------------------------- JSON


def loads(text: bytes, path: Path) -> Any:
    """JSON that every reader understands alike.

    Args:
        text: What the file holds.
        path: The file, for errors.

    Raises:
        ArtifactError: It is no JSON, has a key twice, NaN or infinity, an integer that is too long
            for this package, or is nested deeper than anything that this package writes.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key twice")
        return found

    def constant(name: str) -> Any:
        raise ValueError(name)

    def number(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise ValueError(digits[:40])
        return value

    def integer(digits: str) -> int:
        if len(digits) > _MOST_DIGITS:
            raise ValueError(digits[:40])
        return int(digits)

    try:
        decoded, depth = text.decode(), 0
        for token in _TOKENS.finditer(decoded):
            first = token[0][0]
            depth += (first in "[{") - (first in "]}")
            if depth > _MOST_DEPTH:
                raise ValueError(f"nested deeper than {_MOST_DEPTH}")
        return json.loads(
            decoded, object_pairs_hook=once, parse_constant=constant, parse_float=number,
            parse_int=integer,
        )  # fmt: skip
    except (ValueError, RecursionError) as error:
        raise damaged(path, "valid JSON, each key once", error) from error


def read_object(root: Path, name: str, most: int = MOST_JSON) -> dict[str, Any]:
    """The JSON object that a file holds."""
    value = loads(read(root, name, most), root / name)
    if not isinstance(value, dict):
        raise damaged(root / name, "a JSON object", type(value).__name__)
    return value


def seal(value: Mapping[str, Any]) -> str:
    """Checksum of a manifest: of everything in it but `checksum`, however it is laid out."""
    rest = {key: item for key, item in value.items() if key != "checksum"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


# ---------------------------------------------------------------------------- safetensors


def tensors_in(root: Path, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Types and shapes of the tensors of a safetensors file, from its header alone.

    Returns:
        By name: a key of `ITEM`, and the shape.

    Raises:
        ArtifactError: The header is malformed, or does not account for every byte of the file once.
    """
    path = root / name
    with opened(root, name) as (descriptor, size):
        head = os.read(descriptor, 8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(size - 8, MOST_JSON):
            raise damaged(path, "a header inside the file", f"{length} bytes of {size}")
        text = b""
        while len(text) < length and (part := os.read(descriptor, length - len(text))):
            text += part
    header = loads(text, path)
    if not isinstance(header, dict):
        raise damaged(path, "a header of safetensors", type(header).__name__)
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    places: list[tuple[int, int]] = []
    for key, entry in header.items():
        if key == "__metadata__":
            plain = isinstance(entry, dict) and all(isinstance(v, str) for v in entry.values())
            if not plain:
                raise damaged(path, "texts as metadata", entry)
            continue
        fits = isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}
        if not fits or not isinstance(entry["dtype"], str) or entry["dtype"] not in ITEM:
            raise damaged(path, f"type, shape and offsets of {key[:80]!r}", entry)
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not (_are_sizes(shape, 8) and _are_sizes(offsets, 2) and len(offsets) == 2):
            raise damaged(path, f"sizes of {key[:80]!r}", f"{shape}, {offsets}")
        if offsets[1] - offsets[0] != math.prod(shape) * ITEM[entry["dtype"]]:
            raise damaged(path, f"as many bytes of {key[:80]!r} as its shape says", offsets)
        found[key] = entry["dtype"], tuple(shape)
        places.append((offsets[0], offsets[1]))
    end = 0
    for begin, after in sorted(places):
        if begin != end:
            raise damaged(path, f"a tensor that begins at {end}", begin)
        end = after
    if end != size - 8 - length:
        raise damaged(path, f"{end} bytes of tensors", f"{size - 8 - length}")
    return found


def _are_sizes(value: Any, most: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= most
        and all(type(item) is int and 0 <= item < 1 << 48 for item in value)
    )


# ---------------------------------------------------------------------------- Hugging Face


def points_elsewhere(key: str) -> bool:
    """Whether Hugging Face's libraries would find code or files by what a config has under it."""
    return _FORBIDDEN.fullmatch(key) is not None and key not in _HARMLESS_PATHS


def check_hugging_face(root: Path, files: Mapping[str, Any]) -> None:
    """Raise if a config or tokenizer names code, or files elsewhere.

    Loading them is transformers' business; these are the entries by which it would look for code
    (`auto_map`, kernels by `attn_implementation`, tokenizer classes that load others) or open
    another path.
    """
    for name in _HUGGING_FACE:
        if name not in files:
            continue
        path = root / name
        value = read_object(root, name)
        waiting: list[Any] = [value]
        while waiting:
            one = waiting.pop()
            if isinstance(one, list):
                waiting += one
            for key, item in one.items() if isinstance(one, dict) else ():
                forbidden = item is not None and points_elsewhere(key)
                if name == "genai_config.json":
                    forbidden = key not in _GENAI
                if forbidden:
                    raise damaged(path, f"no {key}: an artifact names no code and no path", item)
                waiting.append(item)
        if name == "config.json" and value.get("model_type") not in _MODEL_TYPES:
            got = value.get("model_type")
            raise damaged(path, f"model_type {' or '.join(_MODEL_TYPES)}", got)
        named = value.get("tokenizer_class")
        if named is not None and not (isinstance(named, str) and _TOKENIZERS.fullmatch(named)):
            raise damaged(path, "a tokenizer class of OPT or Llama", named)
        if name == "genai_config.json":
            model = value.get("model")
            decoder = model.get("decoder") if isinstance(model, dict) else None
            model_file = decoder.get("filename") if isinstance(decoder, dict) else None
            if not (isinstance(model_file, str) and model_file in files):
                raise damaged(path, "a model of the artifact as filename", model_file)


def brings_machine_code(manifest: Mapping[str, Any]) -> list[str]:
    """The files of an artifact that hold machine code, by its manifest, which is checked."""
    names = [
        name
        for name in manifest["files"]
        if name.endswith((".cubin", ".pt2", ".so", ".ptx")) or name.startswith("kernels/")
    ]
    if manifest["target"] == "onnx-cuda":
        names += [name for name in manifest["files"] if name.endswith(".onnx")]
    return names
