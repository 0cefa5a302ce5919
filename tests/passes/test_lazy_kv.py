"""Keys and values that wait: golden, equality, refusals, idempotence; and the program they need."""

from functools import partial

import pytest
import torch

from shadowc.config import Policy
from shadowc.errors import PassError
from shadowc.kernels.lazy_qkv import WINDOW
from shadowc.passes.catch_up import catch_up
from shadowc.passes.compact_masks import compact_masks
from shadowc.passes.fuse_norms import fuse_norms
from shadowc.passes.fuse_rms_norm import fuse_rms_norm
from shadowc.passes.fuse_sparse_attention import fuse_sparse_attention
from shadowc.passes.fuse_sparse_mlp import fuse_sparse_mlp
from shadowc.passes.lazy_kv import lazy_kv
from shadowc.passes.lower_linear import lower_linear
from shadowc.passes.manager import run_passes
from shadowc.runtime.program import to_program

ops = torch.ops.shadowc
POLICY = Policy(0.5, 0.0, min_neurons=2)
FULL = torch.float32
BEFORE = (fuse_rms_norm, fuse_sparse_attention, fuse_sparse_mlp, partial(fuse_norms, dtype=FULL))
STATE = ["window_1", "moments_1", "filled_1", "window_2", "moments_2", "filled_2"]


def step(tiny, *passes, policy=POLICY):
    module = tiny.graph("masked", policy)
    return run_passes(
        module, (*BEFORE, partial(compact_masks, policy=policy), lower_linear, *passes)
    )


def nodes(module, op):
    return module.graph.find_nodes(op="call_function", target=getattr(ops, op).default)


def inputs(module):
    return [node.name for node in module.graph.find_nodes(op="placeholder")]


def state_of(tiny):
    """The inputs that a lazy step adds, after no token."""
    shape = tiny.shape
    sizes = {
        "window": (WINDOW, shape.hidden),
        "moments": (WINDOW, 2),
        "filled": (2, shape.kv_heads),
    }
    made = {name: torch.zeros(sizes[name[:-2]]) for name in STATE}
    made |= {name: value.int() for name, value in made.items() if name.startswith("filled")}
    if shape.gated:
        turns = torch.zeros(2, WINDOW, shape.head_dim)
        made = dict([*made.items()][:3]) | {"turns": turns} | dict([*made.items()][3:])
    return made


def test_layers_that_skip_heads_wait(tiny):
    module = step(tiny)
    outputs = module.meta["outputs"]
    run_passes(module, (lazy_kv,))
    (whole,) = nodes(module, "norm_qkv")  # layer 0 keeps all heads
    assert whole.args[-1] is None
    first, *attention = nodes(module, "decode_attention")
    assert None not in first.args[:3]
    assert all(node.args[1:3] == (None, None) for node in attention)
    for lazy, reader in zip(nodes(module, "lazy_qkv"), attention, strict=True):
        assert reader.args[0].args[0] is lazy
        assert lazy.args[14:16] == reader.args[-2:]  # the keep set
        assert lazy.args[16] is reader.args[8]  # position
        assert lazy.args[17:19] == reader.args[3:5] and (lazy.args[17] is None) != tiny.shape.gated
        assert lazy.args[-2:] == reader.args[5:7]  # caches
    names = inputs(module)
    assert names[names.index("position") + 1 : names.index("k_cache_0")] == list(state_of(tiny))
    assert module.meta["outputs"] == (*outputs, "computed_1", "computed_2")


def test_every_step_is_the_same(tiny):
    """Over 60 tokens, with masks that the predictor changes at each."""
    plain, lazy = step(tiny), step(tiny, lazy_kv)
    missing = step(tiny, lazy_kv, catch_up)
    ids, shape, tokens = tiny.ids(batch=1, tokens=60), tiny.shape, 60
    size = (1, shape.kv_heads, tokens, shape.head_dim)
    whole, mine = ([torch.zeros(size) for _ in range(2 * shape.layers)] for _ in range(2))
    state, start = state_of(tiny), torch.zeros(1, dtype=torch.int64)
    waited = 0
    for token in range(tokens):
        position = torch.tensor([token])
        given = (ids[:, token : token + 1], position[None], start, position)
        want = plain(*given, *whole)
        got = dict(zip(lazy.meta["outputs"], lazy(*given, *state.values(), *mine), strict=True))
        torch.testing.assert_close(got["logits"], want[0], atol=1e-4, rtol=1e-4)
        waited = max(waited, int(got["computed_1"].max()), int(got["computed_2"].max()))
    assert waited > 1
    assert not torch.allclose(mine[2], whole[2], atol=1e-4)  # some still wait
    missing(position, *state.values(), *mine)
    for here, there in zip(mine, whole, strict=True):
        torch.testing.assert_close(here, there, atol=1e-4, rtol=1e-4)


def test_what_catches_up_does_nothing_else(tiny):
    module = step(tiny, lazy_kv, catch_up)
    called = [node.target for node in module.graph.nodes if node.op == "call_function"]
    assert called == [ops.catch_up.default] * 2
    caches = [f"{kind}_cache_{layer}" for layer in range(3) for kind in "kv"]
    assert inputs(module) == ["position", *state_of(tiny), *caches]
    program = to_program(module, module.meta["outputs"])
    assert program.outputs == ()
    assert len(program.weights) == 2 * (2 if tiny.shape.gated else 6)


def test_a_second_run_changes_nothing(tiny):
    module = step(tiny)
    for rewrite in (lazy_kv, catch_up):
        assert rewrite(module)
        module.graph.lint()
        module.recompile()
        code = module.code
        assert not rewrite(module)
        module.recompile()
        assert module.code == code


def test_refuses_a_graph_that_skips_no_heads(tiny):
    with pytest.raises(PassError, match=r"(?s)no layer that skips heads.*3 norm_qkv without one"):
        step(tiny, lazy_kv, policy=Policy(0.0, 0.5, min_neurons=2))
    with pytest.raises(PassError, match=r"(?s)no layer that skips heads.*0 norm_qkv"):
        lazy_kv(tiny.graph("masked", POLICY))


def test_refuses_keys_that_something_else_reads(tiny):
    module = step(tiny)
    key = nodes(module, "decode_attention")[1].args[1]
    output = module.graph.output_node()
    output.args = ((*output.args[0], key),)
    with pytest.raises(
        PassError, match=r"(?s)do not go to one attention.*decode_attention_default_1, output"
    ):
        lazy_kv(module)


def test_catching_up_needs_something_that_waits(tiny):
    with pytest.raises(PassError, match="catch_up needs lazy_kv before it"):
        catch_up(step(tiny))
