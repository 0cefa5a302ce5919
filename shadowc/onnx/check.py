"""Where a model's weights lie: in files beside it, within their sizes."""

from __future__ import annotations

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
    for tensor in _tensors([model.graph, *model.functions]):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        name = foreign.check_name(file.parent, entries.get("location"), file.name)
        if "/" in name:
            raise foreign.damaged(file, "external data beside the model", name)
        if name not in sizes:
            with foreign.opened(file.parent, name) as (_, size):
                sizes[name] = size
        try:
            offset, length = (int(entries.get(key, "0")) for key in ("offset", "length"))
        except ValueError as error:
            raise foreign.damaged(file, "numbers as offset and length", error) from error
        if offset < 0 or length < 0 or offset + length > sizes[name]:
            got = f"{length} bytes from {offset} of {sizes[name]}"
            raise foreign.damaged(file, f"external data inside {name}", got)


def _tensors(graphs: list[Any]) -> Iterator[Any]:
    """Every tensor of graphs and functions, and of the graphs in their nodes."""
    while graphs:
        graph = graphs.pop()
        yield from getattr(graph, "initializer", ())
        for sparse in getattr(graph, "sparse_initializer", ()):
            yield from (sparse.values, sparse.indices)
        for node in graph.node:
            for attribute in node.attribute:
                yield attribute.t
                yield from attribute.tensors
                for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                    yield from (sparse.values, sparse.indices)
                graphs += [attribute.g, *attribute.graphs]
