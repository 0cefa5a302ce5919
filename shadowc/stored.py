"""Tensors that are made when they are written: safetensors files, one tensor in memory at a time.

The files are those of `safetensors.torch.save_file`, byte for byte. That function takes all tensors
of a file at once and holds a copy of each; a file of some GB is written here from what is mapped.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from shadowc.errors import NumericsError

MAX_SHARD_SIZE = 5 * 10**9
_CHUNK = 1 << 24

#: Names of types in a header; a file's tensors lie in this order, then in that of their names.
_TYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Stored:
    """A tensor as an artifact stores it: a description until somebody asks for it.

    Attributes:
        source: What it is made of; best a tensor that is mapped from a file.
        dtype: Type in which it is stored.
        turned: Whether it is stored transposed.
    """

    source: Tensor
    dtype: torch.dtype
    turned: bool = False

    @staticmethod
    def of(tensor: Tensor) -> Stored:
        """A tensor as it is."""
        return Stored(tensor, tensor.dtype)

    @property
    def shape(self) -> torch.Size:
        """Its shape, as stored."""
        return self.source.shape[::-1] if self.turned else self.source.shape

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize

    def make(self) -> Tensor:
        """The tensor, contiguous; the source itself where that is one already."""
        value = self.source.detach().cpu()
        value = value.t() if self.turned else value
        if value.dtype == self.dtype and value.is_contiguous():
            return value
        return torch.empty(value.shape, dtype=self.dtype).copy_(value)


def save(
    directory: Path,
    name: str,
    tensors: Mapping[str, Stored],
    *,
    max_shard_size: int | None = None,
    advance: Callable[[int], object] = lambda size: None,
    finite: bool = False,
) -> dict[str, str]:
    """Write tensors as `NAME.safetensors`, or as shards with an index as Hugging Face writes them.

    Args:
        directory: Where.
        name: Stem of the files.
        tensors: By name.
        max_shard_size: Most bytes of tensors in a file, but for one that is larger by itself.
        advance: Called with each number of bytes written.
        finite: Whether every number must be finite.

    Returns:
        SHA-256 by file name, of the safetensors files.

    Raises:
        OSError: If a file cannot be written.
        NumericsError: If a number is not finite; names the tensor.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern=name + "{suffix}.safetensors",
        max_shard_size=max_shard_size or max(1, sum(t.nbytes for t in tensors.values())),
    )
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True)
        (directory / f"{name}.safetensors.index.json").write_text(text + "\n")
    return {
        file: save_file(
            directory / file, {key: tensors[key] for key in keys}, advance=advance, finite=finite
        )
        for file, keys in split.filename_to_tensors.items()
    }


def save_file(
    path: Path,
    tensors: Mapping[str, Stored],
    metadata: Mapping[str, str] | None = None,
    advance: Callable[[int], object] = lambda size: None,
    finite: bool = False,
) -> str:
    """Write one file; returns its SHA-256. With `finite` as `save`."""
    rank = {dtype: place for place, dtype in enumerate(_TYPES)}
    names = sorted(tensors, key=lambda name: (rank[tensors[name].dtype], name))
    header: dict[str, object] = {"__metadata__": metadata or {"format": "pt"}}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": _TYPES[tensors[name].dtype],
            "shape": [*tensors[name].shape],
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        head = len(text).to_bytes(8, "little") + text
        digest.update(head)
        file.write(head)
        for name in names:
            made = tensors[name].make()
            if finite and not all_finite(made):
                raise _not_finite(name, tensors[name])
            data = made.reshape(-1).view(torch.uint8).numpy()
            for begin in range(0, len(data), _CHUNK):
                part = data[begin : begin + _CHUNK].data
                digest.update(part)
                file.write(part)
                advance(len(part))
    return digest.hexdigest()


def all_finite(value: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity, without a second tensor of its size."""
    if not (value.is_floating_point() and value.numel()):
        return True
    return all(bool(end.isfinite()) for end in torch.aminmax(value.detach()))  # NaN is both


def _not_finite(name: str, tensor: Stored) -> NumericsError:
    if all_finite(tensor.source):
        return NumericsError(
            f"the weights of {name} do not fit in {tensor.dtype}",
            expected=f"at most {torch.finfo(tensor.dtype).max:.5g}",
            got=f"{float(tensor.source.abs().max()):.5g}",
            fix="compile with --dtype bf16 or fp32",
        )
    return NumericsError(
        f"the weights of {name} are not finite",
        expected="numbers",
        got="NaN" if bool(tensor.source.isnan().any()) else "infinity",
        fix="fetch the checkpoint again",
    )


def load(files: Iterable[Path]) -> dict[str, Tensor]:
    """All tensors of safetensors files by name, memory-mapped: shared with the page cache."""
    found: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return found
