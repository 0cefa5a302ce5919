"""Runs passes in order, checks the graph after each, names the one that failed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import fx

from shadowc.errors import PassError, ShadowcError

#: A pass rewrites a graph module in place and returns whether it changed anything. Settings are
#: bound with `functools.partial`.
Pass = Callable[[fx.GraphModule], bool]


def pass_name(rewrite: Pass) -> str:
    """The name under which a pass is dumped and reported."""
    inner = rewrite.func if isinstance(rewrite, functools.partial) else rewrite
    return str(getattr(inner, "__name__", type(inner).__name__))


def copy_module(module: fx.GraphModule) -> fx.GraphModule:
    """A module with its own graph that shares every tensor with `module`."""
    graph = fx.Graph()
    returned = graph.graph_copy(module.graph, val_map={})
    graph.output(returned)
    return fx.GraphModule(module, graph)


def eliminate_dead_code(graph: fx.Graph) -> bool:
    """Remove what nothing uses, attention included.

    FX by itself keeps ops that may draw random numbers, as attention with dropout would.
    """

    def impure(node: fx.Node) -> bool:
        schema = getattr(node.target, "_schema", None)
        mutates = schema is not None and schema.is_mutable
        return node.op in ("placeholder", "output") or mutates

    return bool(graph.eliminate_dead_code(is_impure_node=impure))


def run_passes(
    module: fx.GraphModule, passes: Sequence[Pass], *, dump: Path | None = None
) -> fx.GraphModule:
    """Run passes on a module, in place.

    Args:
        module: The graph to rewrite.
        passes: In the order in which they run.
        dump: A directory that receives the graph's code after each pass, as `03_mask_mlp.txt`.

    Returns:
        The same module.

    Raises:
        PassError: If a pass fails or leaves a broken graph; names it and those that ran before it.
    """
    done: list[str] = []
    if dump is not None:
        dump.mkdir(parents=True, exist_ok=True)
        (dump / "00_traced.txt").write_text(module.code)
    for step, rewrite in enumerate(passes, start=1):
        name = pass_name(rewrite)
        try:
            if rewrite(module):
                eliminate_dead_code(module.graph)
                module.graph.lint()
                module.recompile()
        except ShadowcError:
            raise
        except Exception as error:
            raise PassError(
                f"pass {name} failed",
                got=f"{type(error).__name__}: {error} (ran before it: {', '.join(done) or 'none'})",
                fix="run again with --dump DIR and report the last graph",
            ) from error
        done.append(name)
        if dump is not None:
            (dump / f"{step:02d}_{name}.txt").write_text(module.code)
    return module
