import os
import subprocess
import sys
import threading

import pytest
import torch

import shadowc.kernels.linear  # noqa: F401
from shadowc import native
from shadowc.errors import KernelError

PROGRAM = """
import torch, shadowc.kernels.linear
from shadowc.native import isa
print(torch.ops.shadowc.linear(torch.ones(1, 64), torch.ones(3, 64), None).sum().item(), isa())
"""


OPENMP = """
import os
import torch, shadowc.kernels.linear
from shadowc import native
torch.set_num_threads(3)
x, weight = torch.randn(5, 256), torch.randn(4096, 256)
[(torch.randn(512, 512) @ torch.randn(512, 512)).exp() for _ in range(3)]  # OpenMP's threads start
native.use_openmp()
before = set(os.listdir("/proc/self/task"))
shared = torch.ops.shadowc.linear(x, weight, None)
assert set(os.listdir("/proc/self/task")) == before, "a pool was started"
torch.set_num_threads(1)
print(torch.equal(shared, torch.ops.shadowc.linear(x, weight, None)), len(before))
"""

FIRST = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode

class Calls(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if args and isinstance(args[0], torch.Tensor) and args[0].numel() == 1:
            print(op._opname, args[0].dtype)
        return op(*args, **kwargs or {})

with Calls():
    from shadowc import native
"""


def run(isa: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SHADOWC_ISA": isa}
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_forced_instruction_set():
    done = run("generic")
    assert done.stdout.split() == ["192.0", "generic"], done.stderr


def test_unknown_instruction_set_is_refused():
    done = run("mmx")
    assert done.returncode != 0
    assert "SHADOWC_ISA" in done.stderr and "generic | avx2 | avx512" in done.stderr


def test_threads_of_openmp_take_the_place_of_a_pool():
    done = subprocess.run([sys.executable, "-c", OPENMP], capture_output=True, text=True)
    same, threads = done.stdout.split() or [done.stderr, 0]
    assert same == "True" and int(threads) >= 3


def test_first_calls_of_torch_are_one_threads():
    """What two threads call first may be 3e-4 off, in about one process of 640 (Intel)."""
    done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True)
    names = ("exp", "log", "sqrt", "sin", "cos", "tanh", "erf")
    wanted = {f"{name} torch.{dtype}" for name in names for dtype in ("float32", "float64")}
    assert wanted <= set(done.stdout.splitlines()), done.stderr


def test_missing_library_says_how_to_build_it(monkeypatch, tmp_path):
    native.library.cache_clear()
    monkeypatch.delenv("SHADOWC_LIBRARY", raising=False)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    try:
        with pytest.raises(KernelError, match="build_ext"):
            torch.ops.shadowc.linear(torch.ones(1, 4), torch.ones(4, 4), None)
        (tmp_path / "_native.so").write_bytes(b"not a library")
        with pytest.raises(KernelError, match="cannot be loaded"):
            torch.ops.shadowc.linear(torch.ones(1, 4), torch.ones(4, 4), None)
    finally:
        native.library.cache_clear()


def test_forked_child_has_threads_of_its_own():
    x, weight = torch.randn(1, 256), torch.randn(512, 256)
    want = torch.ops.shadowc.linear(x, weight, None)  # the pool has its workers now
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        same = torch.equal(torch.ops.shadowc.linear(x, weight, None), want)
        os.write(writing, b"same" if same else b"differs")
        os._exit(0)
    os.close(writing)
    assert os.read(reading, 16) == b"same"
    os.waitpid(child, 0)
    os.close(reading)


def test_concurrent_callers():
    x, weight = torch.randn(1, 256), torch.randn(1024, 256)
    want = torch.ops.shadowc.linear(x, weight, None)
    wrong = []

    def work() -> None:
        for _ in range(200):
            if not torch.equal(torch.ops.shadowc.linear(x, weight, None), want):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_more_threads_than_cores():
    """Most come late, and join a job that ends or the next one."""
    x, weight = torch.randn(1, 256), torch.randn(1024, 256)
    want, threads = torch.ops.shadowc.linear(x, weight, None), torch.get_num_threads()
    try:
        torch.set_num_threads(12)
        for _ in range(2000):
            assert torch.equal(torch.ops.shadowc.linear(x, weight, None), want)
    finally:
        torch.set_num_threads(threads)


def test_fields_of_a_call_are_checked():
    with pytest.raises(Exception, match="expected"):
        native.function("rms_norm", "3P 2q f")(0, 0)
