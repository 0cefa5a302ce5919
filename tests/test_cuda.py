"""The launch layer without a GPU: what is recorded, compiled, written, read and refused.

Triton's interpreter and its compiler cannot share a process. These tests need the compiler: where
TRITON_INTERPRET is set they run in a process of their own.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from shadowc import cuda
from shadowc.errors import KernelError, OptionError

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
here = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET is set: runs in its own process")

SOURCE = '''
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LIFT = tl.constexpr(2.0)


@triton.jit
def scaled(x, scale):
    """Multiplies."""
    return x * scale * LIFT


@triton.jit
def add_kernel(
    x_ptr, b_ptr, out_ptr, n, scale, BLOCK: tl.constexpr, ACT: tl.constexpr = "none",
    PDL: tl.constexpr = False,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x = scaled(tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32), scale)
    if b_ptr is not None:
        x += tl.load(b_ptr + i, mask=i < n, other=0.0)
    if ACT == "relu":
        x = tl.maximum(x, 0.0)
    tl.store(out_ptr + i, x, mask=i < n)


@triton.jit
def plain_kernel(x_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + i, 1.0, mask=i < n)


@triton.jit
def greedy_kernel(x_ptr, w_ptr, ROWS: tl.constexpr, COLS: tl.constexpr):
    i, k = tl.arange(0, ROWS), tl.arange(0, COLS)
    x = tl.load(x_ptr + i[:, None] * COLS + k[None, :])
    w = tl.load(w_ptr + k[:, None] * ROWS + i[None, :])
    tl.store(x_ptr + i[:, None] * ROWS + i[None, :], tl.dot(x, w).to(tl.float16))


@triton.jit
def wrong_kernel(x_ptr, SIZE: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, SIZE), nowhere)


@triton.jit
def typed_kernel(x_ptr, n: tl.int64, SIZE: tl.constexpr):
    tl.store(x_ptr, n)
'''


def load_module(path: Path, source: str = SOURCE) -> SimpleNamespace:
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    pytest.importorskip("triton")
    return load_module(tmp_path_factory.mktemp("kernels") / "some_kernels.py")


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    cuda.clear_images()
    cuda.use("h100")
    yield
    cuda.clear_images()
    cuda.use(None)


def meta(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def add(kernel, x=None, b=None, n=64, scale=1.0, grid=(1,), **options):
    x = meta(64) if x is None else x
    out = torch.zeros(64, device=x.device)
    cuda.launch(kernel, grid, x, b, out, n, scale, **{"BLOCK": 64, **options})


def record(kernel, **options) -> tuple[cuda.KernelSpec, object]:
    with cuda.recording() as noted:
        add(kernel, **options)
    ((key, (spec, found)),) = noted.items()
    assert key == spec.key
    return spec, found


def compiled(kernel, arch: int = 90, **options) -> cuda.Image:
    return cuda.compile_kernel(kernel, record(kernel, **options)[0], arch)


@pytest.mark.skipif(not INTERPRETED, reason="the tests run right here")
def test_all_of_this_with_the_compiler():
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_INT", "PYTEST"))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# --- Profiles ----------------------------------------------------------------------------------


def test_profiles_know_the_targets():
    assert set(cuda.PROFILES) == {"a100", "h100", "h200", "l4", "rtx4090"}
    assert all(name == known.name for name, known in cuda.PROFILES.items())
    assert all(known.pdl == (known.arch >= 90) for known in cuda.PROFILES.values())


def test_unknown_profile_lists_the_known_ones():
    with pytest.raises(OptionError, match=r"(?s)'h101'.*a100 \| h100 \| h200 \| l4 \| rtx4090"):
        cuda.find_profile("h101")
    with pytest.raises(OptionError, match="h101"):
        cuda.use("h101")


@pytest.mark.parametrize(
    ("device", "capability", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", (8, 0), "a100"),
        ("NVIDIA H100 80GB HBM3", (9, 0), "h100"),
        ("NVIDIA H200", (9, 0), "h200"),
        ("NVIDIA L4", (8, 9), "l4"),
        ("NVIDIA L40S", (8, 9), "l4"),  # by its capability: the name is another
        ("NVIDIA GeForce RTX 4090", (8, 9), "rtx4090"),
        ("NVIDIA GH200 480GB", (9, 0), "h100"),
        ("NVIDIA B200", (10, 0), "h100"),
        ("Tesla T4", (7, 5), "h100"),
    ],
)
def test_profile_of_the_device(monkeypatch, device, capability, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: capability)
    cuda._profile_of.cache_clear()
    cuda.use(None)
    assert cuda.profile().name == expected
    cuda._profile_of.cache_clear()
    fits = cuda.PROFILES[expected].names(device)
    assert fits == (device not in ("NVIDIA L40S", "NVIDIA GH200 480GB", "NVIDIA B200", "Tesla T4"))
    if fits:
        cuda.check_device(expected, allow_jit=False)
    else:
        with pytest.raises(KernelError, match=rf"(?s)expected: {expected}.*got: {device}"):
            cuda.check_device(expected, allow_jit=False)
        cuda.check_device(expected, allow_jit=True)


def test_another_gpu_is_told_its_own_target(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: "NVIDIA H200")
    with pytest.raises(KernelError, match="--target h200.*allow_jit=True"):
        cuda.check_device("h100", allow_jit=False)


def test_use_sets_the_profile():
    cuda.use("l4")
    assert cuda.profile() is cuda.PROFILES["l4"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine with no GPU")
@pytest.mark.parametrize("allow_jit", [False, True])
def test_without_a_gpu(allow_jit):
    cuda.use(None)
    assert cuda.profile().name == "h100"
    with pytest.raises(KernelError, match="no GPU is available"):
        cuda.check_device("h100", allow_jit)


# --- Recording ---------------------------------------------------------------------------------


@here
def test_recording_gives_the_same_key_twice(kernels):
    spec, kernel = record(kernels.add_kernel)
    assert kernel is kernels.add_kernel
    assert spec == record(kernels.add_kernel)[0]
    # Values are not part of it.
    assert spec.key == record(kernels.add_kernel, n=1, scale=0.5)[0].key
    assert spec.signature[:5] == (
        ("x_ptr", "*fp16"),
        ("b_ptr", "constexpr"),
        ("out_ptr", "*fp32"),
        ("n", "i32"),
        ("scale", "fp32"),
    )
    assert spec.constants == (("b_ptr", None), ("BLOCK", 64), ("ACT", "none"), ("PDL", False))
    assert spec.aligned == ("x_ptr", "out_ptr")
    assert spec.parameters == ("pointer", "pointer", "i32", "fp32")


@here
def test_every_difference_gives_another_key(kernels):
    kernel = kernels.add_kernel
    keys = [
        record(kernel, **options)[0].key
        for options in (
            {},
            {"BLOCK": 128},
            {"ACT": "relu"},
            {"ACT": 1},
            {"ACT": True},
            {"ACT": None},
            {"x": meta(64, dtype=torch.bfloat16)},
            {"x": meta(65)[1:]},
            {"b": meta(64, dtype=torch.float32)},
            {"n": 1 << 31},
            {"warps": 8},
            {"pdl": True},
        )
    ]
    assert len(set(keys)) == len(keys)
    # 16 bytes further on is as good as the start.
    assert record(kernel, x=meta(72)[8:])[0].key == keys[0]


@here
def test_keys_depend_on_the_sources_and_not_on_their_place(kernels, tmp_path):
    key = record(kernels.add_kernel)[0].key
    moved = load_module(tmp_path / "moved.py", "\n\n# elsewhere" + SOURCE)
    assert record(moved.add_kernel)[0].key == key
    changes = ("x * scale * LIFT", "scale * x * LIFT"), ("2.0", "3.0"), ("0.0)", "-0.0)")
    for number, change in enumerate(changes):
        other = load_module(tmp_path / f"other{number}.py", SOURCE.replace(*change))
        assert record(other.add_kernel)[0].key != key


@here
def test_a_kernel_needs_no_triton_to_find_its_image(kernels):
    assert record(kernels.add_kernel.fn)[0] == record(kernels.add_kernel)[0]


@here
def test_pdl_only_where_gpu_and_kernel_have_it(kernels):
    assert record(kernels.add_kernel, pdl=True)[0].pdl
    cuda.use("a100")
    spec, _ = record(kernels.add_kernel, pdl=True)
    assert not spec.pdl
    assert dict(spec.constants)["PDL"] is False
    cuda.use("h100")
    with cuda.recording() as noted:
        cuda.launch(kernels.plain_kernel, (1,), meta(4), 4, BLOCK=16, pdl=True)
    assert [spec.pdl for spec, _ in noted.values()] == [False]


@here
def test_an_empty_grid_launches_nothing(kernels):
    with cuda.recording() as noted:
        add(kernels.add_kernel, grid=(1, 0))
    assert not noted


@here
def test_arguments_that_do_not_fit_are_refused(kernels):
    kernel = kernels.add_kernel
    with cuda.recording():
        with pytest.raises(KernelError, match=r"(?s)expected: 5: x_ptr, b_ptr.*got: 1"):
            cuda.launch(kernel, (1,), meta(4), BLOCK=64)
        with pytest.raises(KernelError, match=r"(?s)constants given to add_kernel.*got: BLOK"):
            cuda.launch(kernel, (1,), meta(4), None, meta(4), 1, 1.0, BLOK=64)
        for value in (True, 1 << 64, "text", meta(4, dtype=torch.complex64)):
            with pytest.raises(KernelError, match="argument 'n' of add_kernel"):
                add(kernel, n=value)
        with pytest.raises(KernelError, match="constant 'BLOCK' of add_kernel"):
            add(kernel, BLOCK=torch.float16)
        with pytest.raises(KernelError, match="typed_kernel cannot be launched"):
            cuda.launch(kernels.typed_kernel, (1,), meta(4), 4, SIZE=4)


@here
def test_recordings_nest_and_end(kernels):
    with cuda.recording() as outer:
        with cuda.recording() as inner:
            add(kernels.add_kernel)
        add(kernels.add_kernel, BLOCK=32)
    assert [dict(s.constants)["BLOCK"] for s, _ in (*inner.values(), *outer.values())] == [64, 32]
    cuda.allow_jit(False)
    with pytest.raises(KernelError, match="missing in the artifact"):
        add(kernels.add_kernel)


# --- Compiling ---------------------------------------------------------------------------------


@here
@pytest.mark.parametrize("target", ["a100", "l4", "h100"])
def test_compiles_for_gpus_that_are_not_here(kernels, target):
    cuda.use(target)
    arch = cuda.profile().arch
    image = compiled(kernels.add_kernel, arch, pdl=True, b=meta(64, dtype=torch.float32), n=1 << 40)
    assert image.cubin[:4] == b"\x7fELF"
    assert (image.entry, image.arch, image.warps) == ("add_kernel", arch, 4)
    assert image.pdl == (arch == 90)
    assert image.spec.parameters == ("pointer", "pointer", "pointer", "i64", "fp32")
    assert image.scratch == 2  # Triton 3.6: global and profile scratch
    assert b"some_kernels" not in image.cubin  # no path of this machine


@here
def test_the_same_source_gives_the_same_code(kernels, tmp_path):
    moved = load_module(tmp_path / "moved.py", "\n\n" + SOURCE)
    assert compiled(kernels.add_kernel).cubin == compiled(moved.add_kernel).cubin


@here
def test_threads_may_compile_at_once(kernels, monkeypatch):
    monkeypatch.delenv("TRITON_DISABLE_LINE_INFO", raising=False)
    with cuda.recording() as noted:
        for block in (16, 32, 64, 128, 256):
            add(kernels.add_kernel, BLOCK=block)
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda one: cuda.compile_kernel(one[1], one[0], 90), noted.values())
        images = list(found)
    assert [image.key for image in images] == list(noted)
    assert not any(b"some_kernels" in image.cubin for image in images)
    assert "TRITON_DISABLE_LINE_INFO" not in os.environ  # what Triton compiles later has lines


@here
def test_too_much_shared_memory_is_refused_where_it_is_too_much(kernels):
    with cuda.recording() as noted:
        matrices = meta(128, 256), meta(256, 128)
        cuda.launch(kernels.greedy_kernel, (1,), *matrices, ROWS=128, COLS=256, warps=8)
    ((spec, kernel),) = noted.values()
    assert cuda.compile_kernel(kernel, spec, 90).shared > 99 << 10
    with pytest.raises(KernelError, match="greedy_kernel needs too much shared memory for sm_89"):
        cuda.compile_kernel(kernel, spec, 89)


@here
def test_what_does_not_compile_says_which_and_why(kernels):
    with cuda.recording() as noted:
        cuda.launch(kernels.wrong_kernel, (1,), meta(64), SIZE=64)
    ((spec, kernel),) = noted.values()
    with pytest.raises(KernelError, match=r"(?s)wrong_kernel cannot be compiled for sm_90.*nowher"):
        cuda.compile_kernel(kernel, spec, 90)
    with pytest.raises(KernelError, match="not the one that was recorded"):
        cuda.compile_kernel(kernels.add_kernel, spec, 90)


@here
def test_without_triton_the_fix_is_named(kernels, monkeypatch):
    spec, kernel = record(kernels.add_kernel)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(KernelError, match=r"pip install 'shadowc\[triton\]'"):
        cuda.compile_kernel(kernel, spec, 90)
    with pytest.raises(KernelError, match=r"pip install 'shadowc\[triton\]'"):
        add(kernel)


# --- Images on disk ----------------------------------------------------------------------------


@pytest.fixture
def saved(kernels, tmp_path):
    images = [compiled(kernels.add_kernel), compiled(kernels.add_kernel, BLOCK=128, pdl=True)]
    cuda.save_images(tmp_path, [*images, images[0]])
    return tmp_path, images


def edit(directory: Path, change) -> None:
    path = directory / "kernels/sm_90/index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


@here
def test_images_come_back_as_they_were(saved):
    directory, images = saved
    files = {path.name for path in (directory / "kernels/sm_90").iterdir()}
    assert files == {"index.json", *(f"add_kernel-{image.key}.cubin" for image in images)}
    cuda.load_images(directory, 90)
    assert {image.key: image for image in images} == cuda._IMAGES
    before = (directory / "kernels/sm_90/index.json").read_bytes()
    cuda.save_images(directory, reversed(images))
    assert (directory / "kernels/sm_90/index.json").read_bytes() == before


@here
def test_a_kernel_that_is_missing_is_named(kernels, saved):
    cuda.load_images(saved[0], 90)
    with pytest.raises(KernelError, match=r"(?s)add_kernel is missing.*allow_jit=True"):
        add(kernels.add_kernel, BLOCK=256)  # images are there, so nothing is compiled unasked
    cuda.allow_jit(True)
    if not torch.cuda.is_available():
        with pytest.raises(KernelError, match="kernel add_kernel needs a GPU"):
            add(kernels.add_kernel, BLOCK=256)
        with pytest.raises(KernelError, match="kernels need a GPU"):
            add(kernels.add_kernel)


@here
def test_another_gpu_has_no_images(saved):
    with pytest.raises(KernelError, match=r"(?s)sm_80/index.json.*there are kernels for sm_90"):
        cuda.load_images(saved[0], 80)
    shutil.copytree(saved[0] / "kernels/sm_90", saved[0] / "kernels/sm_80")
    with pytest.raises(KernelError, match=r"(?s)sm_80/index.json.*expected: arch 80.*got: 90"):
        cuda.load_images(saved[0], 80)


def first(name: str, value: object):
    return lambda index: index["images"][0].__setitem__(name, value)


@here
@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.clear(),
        lambda index: index.update(schema=2),
        lambda index: index.update(images={}),
        lambda index: index.update(images=[1]),
        lambda index: index.update(triton=None),
        lambda index: index["images"][0].pop("shared"),
        lambda index: index["images"][0].update(more=1),
        lambda index: index["images"][0]["signature"].append(["x"]),
        first("key", "0" * 20),
        first("file", "../../somewhere.cubin"),
        first("entry", "a b"),
        first("shared", 1 << 30),
        first("shared", -1),
        first("shared", True),
        first("scratch", 100),
        first("parameters", ["pointer"]),
        first("warps", 3),
        first("warps", 8),
        first("pdl", 0),
        first("name", "../x"),
        first("source", ""),
        first("signature", [["x_ptr", "*fp16"], ["n", "i31"]]),
        first("signature", [[{}, "*fp16"]]),
        first("constants", [[[], 1]]),
        first("aligned", [1]),
        first("aligned", ["x_ptr"]),
    ],
)
def test_a_damaged_index_is_refused(saved, change):
    edit(saved[0], change)
    with pytest.raises(KernelError, match=r"sm_90/index.json is damaged"):
        cuda.load_images(saved[0], 90)
    assert not cuda._IMAGES


@here
@pytest.mark.parametrize("text", ["", "{", "[]", "\udcff", "[" * 100_000])
def test_an_index_that_is_no_json_object_is_refused(saved, text):
    path = saved[0] / "kernels/sm_90/index.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(KernelError, match=r"sm_90/index.json is damaged"):
        cuda.load_images(saved[0], 90)


@here
@pytest.mark.parametrize("damage", ["truncated", "edited", "gone", "text"])
def test_a_damaged_image_is_refused(saved, damage):
    directory, (image, _) = saved
    path = directory / f"kernels/sm_90/add_kernel-{image.key}.cubin"
    if damage == "truncated":
        path.write_bytes(image.cubin[:-1])
    elif damage == "edited":
        path.write_bytes(image.cubin[:-1] + bytes([image.cubin[-1] ^ 1]))
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"hello")
        values = {"bytes": 5, "sha256": hashlib.sha256(b"hello").hexdigest()}
        edit(
            directory,
            lambda index: [e.update(values) for e in index["images"] if e["key"] == image.key],
        )
    with pytest.raises(KernelError, match=f"add_kernel-{image.key}.cubin is damaged"):
        cuda.load_images(directory, 90)
    assert not cuda._IMAGES


# --- The driver --------------------------------------------------------------------------------


def test_structs_have_the_layout_of_the_driver():
    attribute, config = cuda._LaunchAttribute, cuda._LaunchConfig
    assert ctypes.sizeof(attribute) == 72
    assert (attribute.id.offset, attribute.value.offset) == (0, 8)
    assert ctypes.sizeof(config) == 56
    offsets = [getattr(config, name).offset for name, _ in config._fields_]
    assert offsets == [0, 12, 24, 32, 40, 48]


@here
def test_structs_have_the_layout_of_the_header(tmp_path):
    triton = pytest.importorskip("triton")
    compiler = shutil.which("c++") or shutil.which("g++")
    header = Path(triton.__file__).parent / "backends/nvidia/include"
    if compiler is None or not (header / "cuda.h").exists():
        pytest.skip("needs a C++ compiler and cuda.h")
    attribute, config = cuda._LaunchAttribute, cuda._LaunchConfig
    rows = [
        ("sizeof(CUlaunchAttribute)", ctypes.sizeof(attribute)),
        ("offsetof(CUlaunchAttribute, value)", attribute.value.offset),
        ("sizeof(CUlaunchConfig)", ctypes.sizeof(config)),
        ("offsetof(CUlaunchConfig, gridDimX)", config.grid.offset),
        ("offsetof(CUlaunchConfig, blockDimX)", config.block.offset),
        ("offsetof(CUlaunchConfig, sharedMemBytes)", config.shared.offset),
        ("offsetof(CUlaunchConfig, hStream)", config.stream.offset),
        ("offsetof(CUlaunchConfig, attrs)", config.attributes.offset),
        ("offsetof(CUlaunchConfig, numAttrs)", config.count.offset),
        (
            "CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION",
            cuda._PROGRAMMATIC_STREAM_SERIALIZATION,
        ),
        (
            "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES",
            cuda._MAX_DYNAMIC_SHARED_SIZE_BYTES,
        ),
        ("CU_STREAM_CAPTURE_MODE_RELAXED", cuda._CAPTURE_RELAXED),
    ]
    checks = [f'static_assert({what} == {value}, "{what}");' for what, value in rows]
    source = tmp_path / "layout.cpp"
    source.write_text("\n".join(["#include <cstddef>", "#include <cuda.h>", *checks]))
    command = [compiler, "-std=c++17", "-fsyntax-only", "-w", f"-I{header}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Driver:
    """Stands for libcuda: notes what it is asked and reads a launch as the driver would."""

    def __init__(self, kinds: str, fails: str = "") -> None:
        self.kinds, self.fails, self.calls, self.launches = kinds, fails, [], []

    def __getattr__(self, name: str):
        def call(*arguments):
            self.calls.append(name)
            if name == self.fails:
                return 209
            if name == "cuCtxGetCurrent":
                arguments[0]._obj.value = 7
            if name == "cuModuleGetFunction":
                assert arguments[2] == b"add_kernel"
                arguments[0]._obj.value = 11
            return 0

        return call

    def cuGetErrorString(self, code, text):
        text._obj.value = b"no kernel image is available for execution on the device"

    def cuLaunchKernelEx(self, config, function, pointers, extra):
        self.calls.append("cuLaunchKernelEx")
        if self.fails == "cuLaunchKernelEx":
            return 209
        values = [
            struct.unpack(kind, ctypes.string_at(pointer, struct.calcsize(kind)))[0]
            for kind, pointer in zip(self.kinds, pointers, strict=True)
        ]
        config = config._obj
        attributes = [
            (config.attributes[i].id, config.attributes[i].value) for i in range(config.count)
        ]
        shape = tuple(config.grid), tuple(config.block), config.shared, config.stream
        self.launches.append((function, shape, attributes, values))
        return 0


@pytest.fixture
def driver(monkeypatch):
    def install(kinds: str, fails: str = "") -> Driver:
        fake = Driver(kinds, fails)
        monkeypatch.setattr(cuda, "_driver", lambda: fake)
        monkeypatch.setattr(cuda, "_check_pointers", lambda image, args: None)
        monkeypatch.setattr(cuda, "_overlaps", lambda: True)
        stream = SimpleNamespace(cuda_stream=99)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        return fake

    return install


@here
def test_the_driver_gets_what_the_kernel_takes(kernels, saved, driver):
    cuda.load_images(saved[0], 90)
    fake = driver("QQifQQ")
    x, out = torch.zeros(64, dtype=torch.float16), torch.zeros(64)
    for _ in range(2):
        arguments = x, None, out, -5, 0.25
        cuda.launch(kernels.add_kernel, (3, 2), *arguments, BLOCK=64)
        cuda.launch(kernels.add_kernel, (4,), *arguments, BLOCK=128, pdl=True)
    values = [x.data_ptr(), out.data_ptr(), -5, 0.25, 0, 0]
    expected = [
        (11, ((3, 2, 1), (128, 1, 1), 0, 99), [], values),
        (11, ((4, 1, 1), (128, 1, 1), 0, 99), [(6, 1)], values),
    ]
    assert fake.launches == expected * 2
    assert fake.calls.count("cuModuleLoadData") == 2  # once for each
    assert fake.calls.count("cuThreadExchangeStreamCaptureMode") == 4  # there and back
    assert "cuFuncSetAttribute" not in fake.calls


@here
def test_equal_constants_of_other_types_are_other_kernels(kernels, driver):
    image = compiled(kernels.add_kernel, ACT=1)
    cuda._IMAGES[image.key] = image
    fake = driver("QQifQQ")
    add(kernels.add_kernel, x=torch.zeros(64, dtype=torch.float16), ACT=1)
    with pytest.raises(KernelError, match="add_kernel is missing"):
        add(kernels.add_kernel, x=torch.zeros(64, dtype=torch.float16), ACT=True)
    assert len(fake.launches) == 1


@here
def test_large_integers_and_shared_memory(kernels, driver):
    image = compiled(kernels.add_kernel, n=1 << 40)
    cuda._IMAGES[image.key] = dataclasses.replace(image, shared=64 << 10)
    fake = driver("QQqfQQ")
    x, out = torch.zeros(64, dtype=torch.float16), torch.zeros(64)
    cuda.launch(kernels.add_kernel, (1,), x, None, out, 1 << 40, 1.0, BLOCK=64)
    ((_, shape, _, values),) = fake.launches
    assert (shape[2], values[2]) == (64 << 10, 1 << 40)
    assert fake.calls.count("cuFuncSetAttribute") == 1


@here
@pytest.mark.parametrize("fails", ["cuModuleLoadData", "cuLaunchKernelEx", "cuCtxGetCurrent"])
def test_errors_of_the_driver_are_told(kernels, saved, driver, fails):
    cuda.load_images(saved[0], 90)
    fake = driver("QQifQQ", fails)
    x, out = torch.zeros(64, dtype=torch.float16), torch.zeros(64)
    with pytest.raises(KernelError, match=rf"(?s){fails} failed.*no kernel image is available"):
        cuda.launch(kernels.add_kernel, (1,), x, None, out, 1, 1.0, BLOCK=64)
    assert fake.calls.count("cuThreadExchangeStreamCaptureMode") in (0, 2)


@here
def test_memory_that_is_not_the_gpus_is_refused(kernels, saved, driver, monkeypatch):
    check = cuda._check_pointers
    cuda.load_images(saved[0], 90)
    fake = driver("QQifQQ")
    monkeypatch.setattr(cuda, "_check_pointers", check)
    x, out = torch.zeros(64, dtype=torch.float16), torch.zeros(64)
    with pytest.raises(KernelError, match=r"(?s)'x_ptr' of add_kernel.*got: cpu"):
        cuda.launch(kernels.add_kernel, (1,), x, None, out, 1, 1.0, BLOCK=64)
    assert not fake.launches


@here
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_gpu_that_is_here(kernels, tmp_path):
    cuda.use(None)
    major, minor = torch.cuda.get_device_capability()
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).half()

    def step(x, between, out, left, right):
        size = len(x)
        options = {"BLOCK": 64, "pdl": True}
        grid = (-(-size // 64),)
        cuda.launch(kernels.add_kernel, grid, x, None, between, size, 0.5, **options)
        cuda.launch(kernels.add_kernel, grid, between, between, out, size, 0.25, **options)
        cuda.launch(kernels.greedy_kernel, (1,), left, right, ROWS=128, COLS=128, warps=8)

    inputs = [random(100_000), torch.zeros(100_000), torch.zeros(100_000)]
    # 64 KiB of shared memory: more than a launch gets unasked.
    inputs += [random(128, 128), random(128, 128)]
    expected = inputs[0].float() * 1.5, (inputs[3].float() @ inputs[4].float()).half()
    with cuda.recording() as noted:
        step(*(tensor.to("meta") for tensor in inputs))
    images = [cuda.compile_kernel(k, spec, 10 * major + minor) for spec, k in noted.values()]
    assert max(image.shared for image in images) > 48 << 10
    cuda.save_images(tmp_path, images)

    def check(tensors):
        torch.cuda.synchronize()
        # Exact: powers of two. The product sums 128 terms in an order of its own.
        assert torch.equal(tensors[2].cpu(), expected[0])
        product = tensors[3].flatten()[: 128 * 128].view(128, 128).cpu()
        torch.testing.assert_close(product, expected[1], rtol=2e-3, atol=2e-2)

    for captured in (False, True):
        cuda.clear_images()
        cuda.load_images(tmp_path, 10 * major + minor)
        tensors = [tensor.cuda() for tensor in inputs]
        if captured:  # nothing is loaded yet: the capture has to survive that
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step(*tensors)
            graph.replay()
        else:
            step(*tensors)
        check(tensors)
    cuda.clear_images()
    tensors = [tensor.cuda() for tensor in inputs]
    step(*tensors)  # compiled here
    check(tensors)
    with pytest.raises(KernelError, match="counters cannot be made while"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            cuda.counters("cuda", 12345)


# --- Counters and the interpreter --------------------------------------------------------------


def test_counters_are_the_same_zeros_for_every_call():
    with torch.inference_mode():
        found = cuda.counters("cpu", 12)
    assert found is cuda.counters(torch.device("cpu"), 12)
    assert found.dtype is torch.int32 and found.tolist() == [0] * 12
    found.add_(1).zero_()  # would fail on an inference tensor
    assert cuda.counters("cpu", 13) is not found


INTERPRET = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import some_kernels
from shadowc import cuda
from shadowc.errors import KernelError

x, b, out = torch.arange(-50.0, 50.0).half(), torch.ones(100), torch.full((100,), 9.0)
cuda.launch(
    some_kernels.add_kernel, (2,), x, b, out, 100, 0.25, BLOCK=64, ACT="relu", warps=8, pdl=True
)
assert torch.equal(out, torch.relu(x.float() * 0.5 + 1)), out
out.fill_(9.0)
cuda.launch(some_kernels.add_kernel, (0,), x, b, out, 100, 0.25, BLOCK=64)
cuda.launch(some_kernels.add_kernel, (2,), x, None, out, 99, 0.25, BLOCK=64)
assert torch.equal(out[:99], x[:99].float() * 0.5) and out[99] == 9
try:
    cuda.launch(some_kernels.add_kernel, (2,), x, None, out, True, 0.25, BLOCK=64)
    raise SystemExit("a bool was taken")
except KernelError:
    pass
with cuda.recording() as noted:
    cuda.launch(some_kernels.add_kernel, (2,), x, None, out, 99, 0.25, BLOCK=64)
((spec, kernel),) = noted.values()
try:
    cuda.compile_kernel(kernel, spec, 90)
    raise SystemExit("an interpreted kernel was compiled")
except KernelError as error:
    assert "unset TRITON_INTERPRET" in str(error)
print(spec.key)
"""


@here
def test_interpreted(kernels):
    folder = Path(kernels.__file__).parent
    command = [sys.executable, "-c", textwrap.dedent(INTERPRET), str(folder)]
    root = str(Path(cuda.__file__).parents[1])
    done = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == record(kernels.add_kernel)[0].key  # the same in every process
