"""Where a model's weights lie: in files beside it, within their sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shadowc import foreign


def check_model(file: Path) -> None:
    """Raise unless all external data of a model is inside regular files of its own directory.

    ONNX Runtime maps what the model names; it checks less, and not in every version.

    Args:
        file: The model.

    Raises:
        ArtifactError: If it cannot be parsed, or names a file or a place elsewhere.
    """
    import onnx

    with foreign.opened(file.parent, file.name):
        try:
            model = onnx.load(str(file), load_external_data=False)
        except Exception as error:  # protobuf has errors of its own
            raise foreign.damaged(file, "a model of ONNX", error) from error
    sizes: dict[str, int] = {}
    trained = [g for one in model.training_info for g in (one.initialization, one.algorithm)]
    for tensor in _tensors([model.graph, *model.functions, *trained]):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        name = foreign.check_name(file.parent, entries.get("location"), file.name)
        if "/" in name:
            raise foreign.damaged(file, "external data beside the model", name)
        if name not in sizes:
            with foreign.opened(file.parent, name) as (_, size):
                sizes[name] = size
        try:  # without a length it is as long as its shape says
            size = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            needed = math.prod(tensor.dims) * size
            offset, length = int(entries.get("offset", "0")), int(entries.get("length", needed))
        except (ValueError, KeyError, TypeError) as error:
            raise foreign.damaged(file, "numbers as offset and length", error) from error
        least = min(offset, length, *tensor.dims, 0)
        if least < 0 or offset + max(length, needed) > sizes[name]:
            got = f"{length} bytes from {offset} of {sizes[name]}"
            raise foreign.damaged(file, f"external data inside {name}", got)


def _tensors(graphs: list[Any]) -> Iterator[Any]:
    """Every tensor of graphs and functions, and of the graphs in their nodes."""
    while graphs:
        graph = graphs.pop()
        yield from getattr(graph, "initializer", ())
        for sparse in getattr(graph, "sparse_initializer", ()):
            yield from (sparse.values, sparse.indices)
        defaults = getattr(graph, "attribute_proto", ())  # of a function
        for attribute in (*defaults, *(one for node in graph.node for one in node.attribute)):
            yield attribute.t
            yield from attribute.tensors
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            graphs += [attribute.g, *attribute.graphs]
