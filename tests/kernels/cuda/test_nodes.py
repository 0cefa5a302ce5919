"""ONNX models for GPUs, run here: real plans, launcher and ONNX Runtime, interpreted kernels.

A driver of our own (`fake_cuda.cpp`) takes what the library launches: its memory is the host's, its
machine code the name of a kernel, which Triton's interpreter runs. So what the nodes compute can be
compared with their functions, and all of it is tested but the machine code.
"""

import os
import subprocess
import sys

if "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

import ctypes
import dataclasses
import struct
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch

import shadowc.onnx
from shadowc import cuda
from shadowc.compiler import build_programs
from shadowc.config import Policy
from shadowc.passes.manager import copy_module
from shadowc.runtime.session import Session
from shadowc.targets import load_target

tl = pytest.importorskip("triton.language")
onnxruntime = pytest.importorskip("onnxruntime")
from shadowc.onnx import plan  # noqa: E402
from shadowc.onnx.export import export, save  # noqa: E402
from shadowc.onnx.names import KERNELS, MODEL  # noqa: E402

INTERPRETED = type(tl.sum).__name__ == "InterpretedFunction"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")

SLOTS = 32
SPARSE = Policy(0.5, 0.5, min_neurons=2)
POLICIES = {
    "global": SPARSE,
    "threshold": dataclasses.replace(SPARSE, selection="threshold"),
    "static": SPARSE,
    "exact": Policy(0.0, 0.0),
}
TYPES = {name: dtype for dtype, name in cuda._TYPES.items()}
LAUNCHED = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, *[ctypes.c_uint] * 3, ctypes.POINTER(ctypes.c_void_p)
)


@pytest.mark.skipif(INTERPRETED, reason="the tests run right here")
def test_all_of_this_interpreted(interpreted_alone):
    interpreted_alone()


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """The driver, found by its name by whoever looks for it later."""
    file = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    source = Path(__file__).with_name("fake_cuda.cpp")
    command = ["g++", "-std=c++20", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", file]
    subprocess.run([*command, source], check=True)
    loaded = ctypes.CDLL(str(file))
    loaded.fake_library(ctypes.CDLL(str(shadowc.onnx.library_path())).RegisterCustomOps)
    loaded.file = file
    return loaded


class Gpu:
    """Interprets what is launched."""

    def __init__(self, driver, arch=90):
        self.driver, self.kernels, self.launches, self.errors = driver, {}, [], []
        self.callback = LAUNCHED(self.launch)
        self.arch(arch)

    def arch(self, arch):
        self.driver.fake_cuda(self.callback, arch)

    def compile(self, kernel, spec, arch):
        self.kernels[spec.key] = spec, kernel
        return cuda.Image(spec, arch, spec.name, spec.key.encode() + b"\0", 0, 2)

    def launch(self, key, x, y, z, parameters):
        spec, kernel = self.kernels[key.decode()]
        self.launches.append((spec.name, (x, y, z)))
        if self.errors:  # an exception cannot leave a callback
            return
        try:
            kinds = [(name, kind) for name, kind in spec.signature if kind != "constexpr"]
            given = {
                name: argument(kind, parameters[place]) for place, (name, kind) in enumerate(kinds)
            }
            kernel[(x, y, z)](**given, **dict(spec.constants))
        except Exception as error:
            self.errors.append(error)

    def open(self, directory, library=True):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        if library:
            options.register_custom_ops_library(str(self.driver.file))
        return onnxruntime.InferenceSession(
            str(directory / MODEL), options, providers=["CPUExecutionProvider"]
        )


def argument(kind, address):
    raw = ctypes.string_at(address, 8)
    if kind[0] != "*":
        return struct.unpack({"i32": "i4x", "i64": "q", "fp32": "f4x"}[kind], raw)[0]
    (pointer,) = struct.unpack("Q", raw)
    room = (ctypes.c_char * 8).from_address(pointer)
    return torch.frombuffer(room, dtype=TYPES[kind[1:]])[:1]


@pytest.fixture
def gpu(driver, monkeypatch):
    """A GPU of few programs, each with a short stretch of the cache: the interpreter is slow."""
    small = dataclasses.replace(
        cuda.PROFILES["h100"], multiprocessors=2, attention_slots=16, attention_splits=2
    )
    monkeypatch.setitem(cuda.PROFILES, "h100", small)
    monkeypatch.setattr(plan, "FAMILIES", {"h100": 90})
    made = Gpu(driver)
    monkeypatch.setattr(cuda, "compile_kernel", made.compile)
    return made


def exported(tiny, directory, case="global", dtype=torch.float32, target="onnx-cuda"):
    policy, calibration = POLICIES[case], tiny.calibration
    if case == "static":
        calibration = dataclasses.replace(calibration, predictor="static", weights={})
    built = build_programs(
        copy_module(tiny.traced), tiny.loaded, calibration, policy, load_target(target), dtype
    )
    session = Session(
        tiny.shape, policy, built.programs, built.packed, built.keep, SLOTS, built.predictor_bytes
    )
    safetensors.torch.save_file(built.packed, directory / "model.safetensors")
    save(export(session, cuda=target == "onnx-cuda"), directory)
    onnx.save(onnx.load(directory / MODEL), directory / MODEL)  # aligned as in a GPU's memory
    return directory


def run(model, ids, slots, chunks=(6, 1, 1)):
    """All results of every chunk; the cache grows, or is memory of so many slots."""
    past = {
        i.name: np.zeros((len(ids), i.shape[1], slots, i.shape[3]), np.float32)
        for i in model.get_inputs()
        if i.name.startswith("past")
    }
    names, found, first = [o.name for o in model.get_outputs()], [], 0
    for size in chunks:
        inputs = {
            "input_ids": ids[:, first : first + size].numpy(),
            "attention_mask": np.ones((len(ids), first + size), np.int64),
            "position_ids": np.tile(np.arange(first, first + size), (len(ids), 1)),
        }
        results = dict(zip(names, model.run(None, inputs | past), strict=True))
        past = {k.replace("present", "past_key_values"): v for k, v in results.items()
                if k.startswith("present")}  # fmt: skip
        found.append(results)
        first += size
    return found


def compare(found, wanted, tolerance):
    for step, (one, other) in enumerate(zip(found, wanted, strict=True)):
        for name, value in other.items():
            got = one[name][:, :, : value.shape[2]] if name.startswith("present") else one[name]
            if value.dtype == np.float32:
                error = np.abs(got - value).max()
                assert error < tolerance, (step, name)
            else:
                assert np.array_equal(got, value), (step, name)


@interpreted
@pytest.mark.parametrize(
    ("case", "slots"), [("global", 0), ("threshold", SLOTS), ("static", SLOTS), ("exact", 0)]
)
def test_nodes_mean_what_their_functions_mean(tiny, case, slots, gpu, tmp_path):
    """Logits, cache, keep sets and rows, the cache growing or in memory for all of it."""
    if case == "exact" and tiny.shape.gated:
        pytest.skip("SwiGLU has no exact zeros")
    directory = exported(tiny, tmp_path, case)
    ids = tiny.ids(1)
    wanted = run(gpu.open(directory, library=False), ids, 0)
    assert not gpu.launches
    found = run(gpu.open(directory), ids, slots)
    assert not gpu.errors, gpu.errors
    steps, layers = 2, tiny.shape.layers
    names = [name for name, _ in gpu.launches]
    assert names.count("attention_kernel") == names.count("mlp_kernel") == steps * layers
    compare(found, wanted, 2e-4)


@interpreted
def test_half_precision_weights(tiny, gpu, tmp_path):
    """Only the functions round what they multiply with."""
    directory, ids = exported(tiny, tmp_path, "static", torch.float16), tiny.ids(1)
    wanted = run(gpu.open(directory, library=False), ids, 0)
    found = run(gpu.open(directory), ids, 0)
    assert not gpu.errors, gpu.errors
    compare([{"logits": step["logits"]} for step in found],
            [{"logits": step["logits"]} for step in wanted], 3e-2)  # fmt: skip


@interpreted
def test_several_rows_run_every_unit(tiny, gpu, tmp_path):
    directory, ids = exported(tiny, tmp_path), tiny.ids(2)
    found = run(gpu.open(directory), ids, 0, (6, 1, 1, 1))
    assert not gpu.launches and found[-1]["neuron_keep"].all()
    for row in range(2):
        alone = run(gpu.open(directory), ids[row : row + 1], 0, (9,))[0]["logits"][0, -1]
        assert np.allclose(found[-1]["logits"][row, -1], alone, atol=2e-4)


@interpreted
def test_padding_on_the_left_and_elsewhere(tiny_opt, gpu, tmp_path):
    """Slots in front are not seen; a gap gives no number at all."""
    directory = exported(tiny_opt, tmp_path)
    inputs = {"input_ids": np.array([[7]]), "position_ids": np.array([[4]])}
    results = {}
    for library in (False, True):
        model = gpu.open(directory, library)
        past = {i.name: np.ones((1, i.shape[1], 7, i.shape[3]), np.float32) * 0.1
                for i in model.get_inputs() if i.name.startswith("past")}  # fmt: skip
        for mask in ((0, 0, 0, 1, 1, 1, 1, 1), (1, 1, 0, 1, 1, 1, 1, 1)):
            given = past | inputs | {"attention_mask": np.array([mask], np.int64)}
            results[library, mask[0]] = model.run(["logits"], given)[0]
    assert not gpu.errors, gpu.errors
    assert np.allclose(results[True, 0], results[False, 0], atol=2e-4)
    assert np.isnan(results[True, 1]).all() and not np.isnan(results[False, 1]).any()


# Bad input ---------------------------------------------------------------------------------------


def edited(directory, change):
    """The model with another tensor of kernels, and a node to look at."""
    model = onnx.load(directory / MODEL, load_external_data=False)
    (branching,) = [n for n in model.graph.node if n.op_type == "If"]
    (step,) = [a.g for a in branching.attribute if a.name == "else_branch"]
    (tensor,) = step.initializer
    assert tensor.name == KERNELS
    change(tensor, step)
    (directory / MODEL).write_bytes(model.SerializeToString())


@interpreted
def test_another_gpu(tiny_opt, gpu, tmp_path):
    directory = exported(tiny_opt, tmp_path)
    gpu.arch(100)
    with pytest.raises(Exception, match="has kernels for sm_90, this GPU is sm_100"):
        gpu.open(directory)


@interpreted
def test_a_model_for_cpus(tiny_opt, gpu, tmp_path):
    directory = exported(tiny_opt, tmp_path, target="onnx-cpu")
    with pytest.raises(Exception, match="brings no kernels for a GPU; compile it with --target"):
        gpu.open(directory)


@interpreted
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-8], "is truncated"),
        (lambda data: b"shadowc2" + data[8:], "of another version of shadowc"),
    ],
)
def test_damaged_kernels(tiny_opt, gpu, tmp_path, change, message):
    directory = exported(tiny_opt, tmp_path)

    def damage(tensor, step):
        tensor.raw_data = change(tensor.raw_data)
        del tensor.dims[:]
        tensor.dims.append(len(tensor.raw_data))

    edited(directory, damage)
    gpu.arch(91)  # where no kernels of that name are known yet
    with pytest.raises(Exception, match=message):
        gpu.open(directory)


@interpreted
def test_another_plan_than_the_nodes(tiny_opt, gpu, tmp_path):
    directory = exported(tiny_opt, tmp_path)

    def swap(tensor, step):
        node = next(n for n in step.node if n.op_type == "SparseMLP")
        next(a for a in node.attribute if a.name == "plan").i = 99

    edited(directory, swap)
    with pytest.raises(Exception, match="the model has no such plan"):
        gpu.open(directory)
