"""The native library checks what it is told: every refusal by its code, and no crash.

Calls go to the library itself, as another program's would: no launcher has looked at them before.
"""

from __future__ import annotations

import random
import struct

import pytest
import torch

import shadowc.kernels.linear  # noqa: F401
from shadowc.errors import KernelError
from shadowc.native import function, library

B, T, C, F, H, G, D, S, L, N, R = 2, 1, 24, 40, 4, 2, 8, 16, 3, 10, 6
FINE, POSITION, POINTER, SIZE, KEEP_SET, TYPE, MEMORY = range(7)

HUGE = (-1, -(1 << 63), (1 << 46) + 1, 1 << 62, (1 << 63) - 1)
"""Sizes that no tensor can have: each must be refused wherever it stands."""


class Calls:
    """Valid calls of every function: name -> (format, fields), over memory that lives as long."""

    def __init__(self) -> None:
        self.held: list[torch.Tensor] = []
        at = self.tensor
        index = torch.stack([torch.arange(N)] * B).int()
        kept = torch.tensor([N, 0], dtype=torch.int32)
        heads = torch.tensor([[0, 2, 9, 9], [1, 3, 9, 9]], dtype=torch.int32)
        neurons = torch.arange(F, dtype=torch.int32).repeat(B, 1)
        self.sets = {"neurons": neurons, "heads": heads, "two": torch.tensor([2, 2]).int()}
        self.held += [index, kept, *self.sets.values()]
        hs, two = heads.data_ptr(), self.sets["two"].data_ptr()
        ns = neurons.data_ptr()
        zero = torch.zeros(B, dtype=torch.int64)
        self.position = torch.tensor([5])
        self.held += [zero, self.position]
        choice = (at(L * N, R), at(L * N), at(L), at(L, B, N), at(L, B), L, N)
        self.of = {
            "linear": ("4P 3q 2i", [at(B, C), at(F, C), at(F), at(B, F), B, F, C, 2, 0]),
            "qkv": ("12P 6q 2i", [
                at(B, C), at(H * D, C), at(H * D), at(G * D, C), at(G * D), at(G * D, C),
                at(G * D), at(B, H * D), at(B, G * D), at(B, G * D), hs, two,
                B, T, C, H, G, D, 2, 0,
            ]),
            "out_proj": ("5P q 2P 5q 2i", [
                at(B, H * D), at(H * D, C), at(C), at(B, C), at(B, C), H * D, hs, two,
                H, D, B, T, C, 2, 0,
            ]),
            "mlp": ("11P 6q 4i", [
                at(B, C), at(F, C), 0, at(F), at(F, C), at(C), at(B, C), at(B, C), at(B), ns, two,
                F, 1, B, T, C, F, 0, 1, 2, 0,
            ]),
            "attention": ("12P 7q f i", [
                at(B, H * D), at(B, G * D), at(B, G * D), at(B, D), at(B, D), at(B, G, S, D),
                at(B, G, S, D), zero.data_ptr(), self.position.data_ptr(), at(B, H * D), hs, two,
                H, D, B, H, G, D, S, 0.5, 2,
            ]),
            "rms_norm": ("3P 2q f", [at(B, C), at(C), at(B, C), B, C, 1e-5]),
            "select": ("3P 5q 2i", [at(B, L, N), at(L, B, N), at(L, B), B, L, N, 7, 2, 0, 2]),
            "select_above": ("4P 3q i", [at(B, L, N), at(L), at(L, B, N), at(L, B), B, L, N, 2]),
            "choose": ("3P 5P2q 5P2q 3q 2i", [
                at(B, C), at(R, C), at(R), *choice, *choice, B, C, R, 2, 0,
            ]),
        }  # fmt: skip

    def tensor(self, *shape: int) -> int:
        """Address of memory for a tensor, with space around it that must stay as it is."""
        size = torch.Size(shape).numel()
        held = torch.full((size + 64,), 0.25)
        held[:32] = held[-32:] = 7.0
        self.held.append(held)
        return held.data_ptr() + 32 * 4

    def check_borders(self) -> None:
        """Fail if anything was written beside a tensor."""
        for held in self.held:
            if held.dtype is torch.float32:
                assert (held[:32] == 7).all() and (held[-32:] == 7).all()

    def call(self, name: str, values: list[object]) -> int:
        return getattr(library(), f"shadowc_{name}")(struct.pack(self.of[name][0], *values))


@pytest.fixture
def calls():
    made = Calls()
    yield made
    made.check_borders()


NAMES = list(Calls().of)


def kinds(layout: str) -> str:
    """`2P q` -> `PPq`."""
    found, times = "", ""
    for letter in layout.replace(" ", ""):
        if letter.isdigit():
            times += letter
        else:
            found, times = found + letter * int(times or 1), ""
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_right_call_runs(calls, name):
    assert calls.call(name, calls.of[name][1]) == FINE


@pytest.mark.parametrize("name", NAMES)
def test_every_size_is_checked(calls, name):
    layout, values = calls.of[name]
    for place, kind in enumerate(kinds(layout)):
        if (name, place) == ("attention", 13):
            continue  # rows of a head, which attention knows as D
        for size in HUGE if kind == "q" else ():
            wrong = [*values]
            wrong[place] = size
            assert calls.call(name, wrong) in (SIZE, KEEP_SET), (place, size)


OPTIONAL = {
    "linear": {2}, "qkv": {2, 4, 6}, "out_proj": {2, 3}, "mlp": {2, 3, 5, 6},
    "choose": {1, 2, 4, 11},
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_pointer_is_checked(calls, name):
    layout, values = calls.of[name]
    for place, kind in enumerate(kinds(layout)):
        if kind == "P" and place not in OPTIONAL.get(name, ()):
            wrong = [*values]
            wrong[place] = 0
            assert calls.call(name, wrong) == POINTER, place
    assert getattr(library(), f"shadowc_{name}")(None) == POINTER


@pytest.mark.parametrize("name", ["linear", "qkv", "out_proj", "mlp", "choose"])
@pytest.mark.parametrize("dtype", [-1, 3, 1 << 30])
def test_an_unknown_type_is_refused(calls, name, dtype):
    values = calls.of[name][1]
    assert calls.call(name, [*values[:-1], dtype]) == TYPE


def test_an_unknown_activation_is_refused(calls):
    values = [*calls.of["mlp"][1]]
    for activation in (-1, 3):
        values[17] = activation
        assert calls.call("mlp", values) == TYPE


@pytest.mark.parametrize("threads", [0, -5, 1 << 30])
def test_threads_are_checked(calls, threads):
    for name in NAMES:
        layout, values = calls.of[name]
        place = len(values) - (2 if name in ("linear", "qkv", "out_proj", "mlp", "choose") else 1)
        if name != "rms_norm":
            wrong = [*values]
            wrong[place] = threads
            assert calls.call(name, wrong) == SIZE, name


@pytest.mark.parametrize(
    ("index", "count"),
    [
        ([0, 4], 2),  # one past the last
        ([-1, 0], 2),
        ([2, 1], 2),
        ([1, 1], 2),
        ([1, 1 << 30], 2),
        ([0, 1], 5),  # more than there are
        ([0, 1], -1),
        ([0, 1], -(1 << 31)),
    ],
)
@pytest.mark.parametrize("name", ["qkv", "out_proj", "attention"])
def test_a_wrong_keep_set_is_refused(calls, name, index, count):
    calls.sets["heads"][1, :2] = torch.tensor(index, dtype=torch.int32)
    calls.sets["two"][1] = count
    assert calls.call(name, calls.of[name][1]) == KEEP_SET


def test_a_wrong_keep_set_of_neurons_is_refused(calls):
    assert calls.call("mlp", calls.of["mlp"][1]) == FINE
    calls.sets["neurons"][0, 1] = F
    assert calls.call("mlp", calls.of["mlp"][1]) == KEEP_SET
    calls.sets["two"][0] = 1  # what is past the count does not count
    assert calls.call("mlp", calls.of["mlp"][1]) == FINE


@pytest.mark.parametrize("position", [-1, S, 1 << 62, -(1 << 63)])
def test_a_position_outside_of_the_cache_is_refused(calls, position):
    calls.position[0] = position
    assert calls.call("attention", calls.of["attention"][1]) == POSITION


def test_a_start_outside_of_the_cache_is_refused(calls):
    start = torch.tensor([0, S + 1])
    values = [*calls.of["attention"][1]]
    values[7] = start.data_ptr()
    assert calls.call("attention", values) == POSITION


def test_too_little_memory_is_a_refusal_and_not_the_end(calls):
    """64 TiB of scores: no system gives them, and the next call of the thread works."""
    values = [*calls.of["select"][1]]
    values[3:8] = [0, 1 << 15, 1 << 30, 0, 0]  # B = 0: nothing is read
    assert calls.call("select", values) == MEMORY
    assert calls.call("select", calls.of["select"][1]) == FINE


def test_random_arguments_never_crash(calls):
    """3,000 calls with one to three fields replaced; pointers stay or become null."""
    chosen = random.Random(0)
    refused = 0
    for _ in range(3000):
        name = chosen.choice(NAMES)
        layout, values = calls.of[name]
        values, fields = [*values], kinds(layout)
        for place in chosen.sample(range(len(values)), chosen.randint(1, 3)):
            if fields[place] == "P":
                values[place] = 0
            elif fields[place] == "q":
                values[place] = chosen.choice([*HUGE, 0])
            elif fields[place] == "i":
                values[place] = chosen.choice([-1, 0, 1, 2, 3, 1 << 30, -(1 << 31)])
        # A size of 0 can leave other sizes too large for their memory only if nothing is refused.
        if any(value == 0 and kind == "q" for value, kind in zip(values, fields, strict=True)):
            values = [0 if kind == "P" else v for v, kind in zip(values, fields, strict=True)]
        refused += calls.call(name, values) != FINE
    assert refused > 2000


def test_launchers_name_what_was_refused():
    with pytest.raises(KernelError, match="shadowc_rms_norm refuses its arguments"):
        function("rms_norm", "3P 2q f")(0, 0, 0, -1, 1, 0.0)
