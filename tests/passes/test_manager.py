"""The pass manager: order, dumps, and errors that name the pass."""

import pytest
import torch

from shadowc.errors import PassError
from shadowc.passes.manager import copy_module, eliminate_dead_code, run_passes


def test_a_failure_names_the_pass_and_what_ran_before(tiny_opt):
    def first(module):
        return False

    def second(module):
        raise KeyError("x")

    with pytest.raises(PassError, match=r"pass second failed[\s\S]*ran before it: first"):
        run_passes(copy_module(tiny_opt.traced), (first, second))


def test_a_broken_graph_is_found_after_the_pass_that_broke_it(tiny_opt):
    def breaks(module):
        nodes = [n for n in module.graph.nodes if n.op == "call_function"]
        nodes[0].append(nodes[5])  # moves a node before what it uses
        return True

    with pytest.raises(PassError, match="pass breaks failed"):
        run_passes(copy_module(tiny_opt.traced), (breaks,))


def test_dump_writes_a_numbered_file_a_pass(tiny_opt, tmp_path):
    def changes_nothing(module):
        return False

    run_passes(copy_module(tiny_opt.traced), (changes_nothing,), dump=tmp_path / "d")
    names = sorted(path.name for path in (tmp_path / "d").iterdir())
    assert names == ["00_traced.txt", "01_changes_nothing.txt"]
    assert "aten.linear" in (tmp_path / "d" / names[1]).read_text()


def test_a_copy_shares_tensors_and_not_the_graph(tiny_opt):
    copy = copy_module(tiny_opt.traced)
    before = len(tiny_opt.traced.graph.nodes)
    weight = next(n for n in copy.graph.nodes if n.op == "get_attr" and n.users)
    same = [m.get_parameter(weight.target).data_ptr() for m in (copy, tiny_opt.traced)]
    assert same[0] == same[1]
    copy.graph.output_node().args = ((next(iter(copy.graph.nodes)),),)
    eliminate_dead_code(copy.graph)
    assert len(tiny_opt.traced.graph.nodes) == before


def test_unused_attention_is_dead_code():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    attention = torch.ops.aten.scaled_dot_product_attention.default
    graph.call_function(attention, (x, x, x))
    graph.output(x)
    eliminate_dead_code(graph)
    assert not graph.find_nodes(op="call_function", target=attention)
