"""The CUDA targets without a GPU: what they lower to, record, compile, save, and refuse.

Programs run on the ops' CPU references. Kernels are compiled in processes of their own, without
TRITON_INTERPRET: Triton's compiler cannot share one with its interpreter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

import shadowc
from shadowc import cuda, native
from shadowc.artifact import MANIFEST, open_artifact, sealed
from shadowc.compiler import build_programs, compile_model
from shadowc.config import Policy
from shadowc.errors import ArtifactError, KernelError, LengthError, NumericsError, OptionError
from shadowc.evaluation import bench
from shadowc.evaluation.baselines import dejavu_session, static_session
from shadowc.evaluation.numerics import check_numerics
from shadowc.evaluation.report import describe_artifact
from shadowc.passes.manager import copy_module
from shadowc.runtime.cuda import CudaSession
from shadowc.runtime.loading import load_session
from shadowc.runtime.model import ShadowcForCausalLM
from shadowc.runtime.program import Program
from shadowc.runtime.session import Session
from shadowc.runtime.usage import Usage
from shadowc.targets import TARGETS, load_target
from shadowc.targets.cuda import record, run_on_meta

TESTS = Path(__file__).parents[1]
FAMILY = {"a100": 80, "h100": 90, "h200": 90, "l4": 89, "rtx4090": 89}
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine with no GPU")

HALF, BF16, FULL = torch.float16, torch.bfloat16, torch.float32
SPARSE = Policy(0.5, 0.5, min_neurons=2)
POLICIES = {
    "token": SPARSE,
    "every 3": dataclasses.replace(SPARSE, refresh=3),
    "prompt": dataclasses.replace(SPARSE, refresh=0),
    "static": SPARSE,
    "dense": Policy(0.0, 0.0),
    "layerwise": dataclasses.replace(SPARSE, refresh=3, selection="threshold"),
    "two taps": dataclasses.replace(SPARSE, selection="threshold"),
}
TAPS = {"layerwise": ((0, 1, 2), "entry"), "two taps": ((0, 2), "residual")}
PROGRAMS = {
    "token": {"decode"},
    "every 3": {"decode", "hold", "prefill"},
    "prompt": {"decode", "hold", "prefill"},
    "static": {"hold"},
    "dense": set(),
    "layerwise": {"decode", "hold", "prefill"},
    "two taps": {"decode"},
}
BATCHED = {"project_rows_kernel", "out_proj_rows_kernel", "hidden_kernel", "weigh_kernel"}
ALONE = {"project_kernel", "qkv_kernel", "out_proj_kernel", "mlp_kernel"}
CHOOSING = {"small_kernel", "fence_kernel"}
ALWAYS = {"scale_kernel", "attention_kernel", "finish_kernel"}
LAZY = {"lazy_qkv_kernel", "catch_up_kernel"}


@pytest.fixture(autouse=True)
def profile():
    """No test leaves its GPU, or its images, to the next one."""
    yield
    cuda.clear_images()
    cuda.use(None)


def lowered(
    tiny, name: str = "token", target: str = "a100", dtype=HALF, *, lazy: bool = False
) -> Session:
    """A session of the target's programs, built once for all five: they differ in kernels alone."""
    key = ("cuda", name, dtype, lazy)
    if key not in tiny.built:
        calibration = (
            None if name == "dense" else tiny.with_taps(*TAPS.get(name, ((0,),))).calibration
        )
        if name == "static":
            calibration = dataclasses.replace(calibration, predictor="static", weights={})
        traced, backend = copy_module(tiny.traced), load_target(target)
        tiny.built[key] = build_programs(
            traced, tiny.loaded, calibration, POLICIES[name], backend, dtype, lazy_kv=lazy
        )
    built = tiny.built[key]
    return Session(
        tiny.shape, POLICIES[name], built.programs, built.packed, built.keep, 64,
        built.predictor_bytes,
    )  # fmt: skip


# --- The family ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILY)
def test_each_target_tells_what_it_is(name):
    target = load_target(name)
    assert target.name == name
    assert f"(sm_{FAMILY[name]}, " in target.description and name.upper() in target.description
    assert cuda.PROFILES[name].measured in target.description
    target.requires()
    allowed = [target.tolerances(dtype) for dtype in (FULL, HALF, BF16)]
    assert [t.decode for t in allowed] == [1e-3, 1e-2, 5e-2]


def test_an_unknown_target_lists_the_known_ones():
    assert set(TARGETS) == {"cpu", "onnx-cpu", "onnx-cuda", *FAMILY}
    with pytest.raises(
        OptionError, match=r"(?s)'b200'.*cpu, onnx-cpu, onnx-cuda, a100, h100, h200, l4, rtx4090"
    ):
        load_target("b200")


def test_the_command_line_lists_all_targets():
    command = [sys.executable, "-m", "shadowc", "targets", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = {t["target"]: t["what"] for t in json.loads(done.stdout)["targets"]}
    assert set(found) == {"cpu", "onnx-cpu", "onnx-cuda", *FAMILY}
    assert all(found[name] == load_target(name).description for name in FAMILY)


def test_compiling_needs_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(KernelError, match=r"pip install 'shadowc\[triton\]'"):
        load_target("l4").requires()


# --- Lowering ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model, name, target, dtype",
    [
        ("opt", "token", "a100", FULL),
        ("opt", "token", "h100", BF16),
        ("opt", "every 3", "l4", HALF),
        ("opt", "static", "rtx4090", FULL),
        ("opt", "static", "h200", HALF),
        ("opt", "dense", "h200", HALF),
        ("opt", "layerwise", "h100", FULL),
        ("opt", "layerwise", "a100", HALF),
        ("opt", "two taps", "l4", FULL),
        ("llama", "layerwise", "h100", FULL),
        ("llama", "layerwise", "h100", BF16),
        ("llama", "two taps", "h200", HALF),
        ("llama", "token", "h100", HALF),
        ("llama", "every 3", "h200", FULL),
        ("llama", "static", "a100", HALF),
        ("llama", "dense", "l4", FULL),
        ("llama", "dense", "rtx4090", HALF),
    ],
)
def test_programs_agree_with_the_masked_one(request, model, name, target, dtype):
    tiny = request.getfixturevalue(f"tiny_{model}")
    session = lowered(tiny, name, target, dtype)
    report = check_numerics(session, tiny.loaded, load_target(target).tolerances(dtype))
    if dtype is FULL:  # the target allows 1e-3: here only the order of addition differs
        assert report["max_abs_error"] <= 1e-5 * report["tolerance"] / 1e-3
        assert report["mask_mismatch"] == 0
    sparse, expected = name != "dense", name in TAPS  # thresholds give a budget on average
    assert report["head_sparsity"] == pytest.approx(0.5 * sparse, abs=0.3 if expected else 0.05)
    assert report["neuron_sparsity"] == pytest.approx(0.5 * sparse, abs=0.2 if expected else 0.01)
    relu = {"exact"} if not tiny.shape.gated else set()
    assert set(session.programs) == {"full", "dense", "masked"} | relu | PROGRAMS[name]


@pytest.mark.parametrize("dtype", [HALF, FULL])
def test_weights_are_stored_once_in_one_type(tiny, dtype):
    tensors = lowered(tiny, "every 3", dtype=dtype).tensors
    parameters = dict(tiny.loaded.model.named_parameters(remove_duplicate=False))
    own = {name: t for name, t in tensors.items() if name.removesuffix("_t") in parameters}
    assert all(t.dtype == dtype for t in own.values())
    total = sum(p.numel() for p in tiny.loaded.model.parameters())
    assert sum(t.numel() for t in own.values()) == total
    turned = {name for name in own if name.endswith("_t")}
    assert len(turned) == 3 and all("fc2" in n or "down_proj" in n for n in turned)


@pytest.mark.parametrize("name", ["token", "every 3", "static", "dense", *TAPS])
def test_steps_are_made_of_fused_ops(tiny, name):
    """A step has no norm and no product of its own, but for the predictor's; the first of these
    reads a norm where one is to be read."""
    session = lowered(tiny, name)
    normed = 3 if name == "layerwise" else 0  # codes
    fused = {"norm_qkv": 3, "decode_attention": 3, "scaled_out_proj": 3, "norm_mlp": 3,
             "norm_linear": 1, "scale": 1}  # fmt: skip
    chooses = {"linear", "choose_above" if name in TAPS else "select"}
    of_prompts = {"linear", "select_above" if name in TAPS else "select"}
    for step in {"full", "exact", "decode", "hold"} & set(session.programs):
        program = session.programs[step].to_json()
        targets = [node["target"] for node in program["nodes"]]
        ours = [t.split(".")[1] for t in targets if t.startswith("shadowc.")]
        others = chooses if step == "decode" else set()
        more = {"norm_linear": 1 + normed} if step == "decode" else {}
        assert {op: ours.count(op) for op in set(ours) - others} == fused | more
        for gone in ("aten.linear.", "aten.layer_norm.", "aten.matmul", "aten.t."):
            assert not [t for t in targets if t.startswith(gone)], step
    # A prompt's products are torch's; only the predictor's are ours.
    for prompt in {"dense", "prefill"} & set(session.programs):
        nodes = session.programs[prompt].to_json()["nodes"]
        ours = {n["target"] for n in nodes if n["target"].startswith("shadowc.")}
        expected = {"decode_attention"} | ({"rms_norm"} if tiny.shape.gated else set())
        expected |= of_prompts if prompt == "prefill" else set()
        assert {t.split(".")[1] for t in ours} == expected


# --- Recording -----------------------------------------------------------------------------------


def names(found) -> set[str]:
    return {spec.name for spec, _ in found.values()}


@pytest.mark.parametrize("name", ["token", "every 3", "static", "dense", *TAPS])
def test_record_finds_the_kernels_of_all_steps(tiny, name):
    session = lowered(tiny, name)
    chooses = {"kept_kernel", "compact_kernel", "fence_kernel"} if name in TAPS else CHOOSING
    chooses = chooses | ({"above_kernel"} if name == "layerwise" else set())  # of prompts
    chooses = set() if name in ("static", "dense") else chooses
    one, two = record(session, 1), record(session, 2)
    assert names(one) == ALWAYS | ALONE | chooses
    marks = {"mark_kernel"} if name != "dense" else set()
    assert names(two) == ALWAYS | BATCHED | marks | chooses
    for spec, _ in one.values():
        if spec.name in ("attention_kernel", "mlp_kernel"):
            kinds = {kind for _, kind in spec.signature}
            assert "*fp16" in kinds and "*bf16" not in kinds


@pytest.mark.parametrize("lazy", [False, True])
def test_recording_is_the_same_every_time(tiny, lazy):
    """Also for the programs and tensors that a file gives back: serving finds what was compiled."""
    session = lowered(tiny, "every 3", lazy=lazy)
    before = {batch: list(record(session, batch)) for batch in (1, 2, 3)}
    session.programs = {
        name: Program.from_json(json.loads(json.dumps(program.to_json())))
        for name, program in session.programs.items()
    }
    assert {batch: list(record(session, batch)) for batch in (1, 2, 3)} == before


def test_targets_record_what_they_are(tiny_opt):
    """The same programs give other kernels where a profile differs, and PDL only from sm_90 on."""
    session, keys = lowered(tiny_opt), {}
    for name, arch in FAMILY.items():
        cuda.use(name)
        found = record(session, 1)
        assert any(spec.pdl for spec, _ in found.values()) == (arch >= 90)
        keys[name] = set(found)
    assert keys["h100"] == keys["h200"]
    assert keys["a100"] != keys["l4"] != keys["h100"]


def prompt_kernels(session: Session, program: str, batch: int, tokens: int, dtype):
    """What a prompt launches; the attention of several tokens is torch's and needs real memory."""
    shape = session.shape
    tensors = {name: value.to("meta") for name, value in session.tensors.items()}
    size = (batch, shape.kv_heads, session.max_seq_len, shape.head_dim)
    cache = torch.empty(size, dtype=dtype, device="meta")
    ids = torch.empty(batch, tokens, dtype=torch.int64, device="meta")
    values = {"input_ids": ids, "position_ids": ids, "start": ids[:, 0], "position": ids[0, :1]}
    with pytest.MonkeyPatch.context() as patch:
        if tokens > 1:
            stand_in = lambda q, *rest: torch.empty_like(q)  # noqa: E731
            patch.setitem(native.CUDA_LAUNCHERS, "decode_attention", stand_in)
        with cuda.recording() as found:
            run_on_meta(session.programs[program], tensors, values, cache)
    return found


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(
    "batch",
    [
        1,
        2,
        3,
        4,
    ],
)
def test_prompts_find_their_kernels(tiny, batch, tokens):
    """An artifact for batches of 1, 2 and 4 also serves 3 rows, padded to 4."""
    session = lowered(tiny, "every 3")
    recorded = {key for rows in (1, 2, 4) for key in record(session, rows)}
    for program in ("dense", "prefill"):
        found = prompt_kernels(session, program, batch, tokens, HALF)
        assert not {spec.name for key, (spec, _) in found.items() if key not in recorded}


@pytest.mark.parametrize("name", ["token", "every 3", "static"])
def test_record_finds_what_one_row_needs_to_wait(tiny, name):
    lazy, plain = lowered(tiny, name, lazy=True), lowered(tiny, name)
    made = {"lazy"} if name == "token" else {"lazy_hold"}
    made |= {"lazy", "lazy_hold"} if name == "every 3" else set()
    assert set(lazy.programs) == set(plain.programs) | made | {"catch_up"}
    assert names(record(lazy, 1)) == names(record(plain, 1)) | LAZY
    assert set(record(lazy, 2)) == set(record(plain, 2))
    attentions = [s for s, _ in record(lazy, 1).values() if s.name == "attention_kernel"]
    assert ("k_ptr", None) in {c for spec in attentions for c in spec.constants}


# --- Compiling -----------------------------------------------------------------------------------


def python(code: str, cwd: Path) -> str:
    """Run code in a process whose Triton compiles."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_INT", "PYTEST"))}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(TESTS)!r})\n{code}"],
        cwd=cwd,
        env=clean | {"TRITON_CACHE_DIR": str(cwd / "triton")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


COMPILE = """
from pathlib import Path
import torch
from conftest import _tiny
from shadowc import cuda
from shadowc.compiler import build_programs, compile_model
from shadowc.config import Policy
from shadowc.runtime.session import Session
from shadowc.targets import load_target
from shadowc.targets.cuda import record

policy, sessions = Policy(0.5, 0.5, min_neurons=2), []
above = Policy(0.5, 0.5, min_neurons=2, selection="threshold", refresh=3)  # prompts choose too
for name, policy in (("opt", policy), ("opt", above), ("llama", policy), ("llama", above)):
    tiny = _tiny(name)
    if policy is above:
        tiny = tiny.with_taps((0, 1, 2), "entry")
    built = build_programs(
        tiny.traced, tiny.loaded, tiny.calibration, policy, load_target("h100"), torch.float16,
        lazy_kv=True,
    )
    sessions.append(Session(tiny.shape, policy, built.programs, built.packed, built.keep, 64))
for target in ("a100", "l4", "h100"):
    cuda.use(target)
    known, found = cuda.PROFILES[target], {}
    for session in sessions:
        for batch in (1, 2):
            found |= record(session, batch)
    images = [cuda.compile_kernel(kernel, spec, known.arch) for spec, kernel in found.values()]
    for image in images:
        assert image.cubin[:4] == b"\\x7fELF" and image.arch == known.arch
        assert image.shared <= known.shared, (target, image.spec.name, image.shared)
        print(target, image.spec.name)

tiny, policy = _tiny("opt"), Policy(0.5, 0.5, min_neurons=2)  # Triton compiled its kernels above
compile_model(
    tiny.loaded, tiny.calibration, policy, Path("artifact"), target="a100", dtype=torch.float16,
    max_seq_len=48, batch_sizes=(1,),
)
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A directory with an artifact, and target and name of each kernel compiled before it."""
    directory = tmp_path_factory.mktemp("compiled")
    return directory, [line.split() for line in python(COMPILE, directory).splitlines()]


@pytest.fixture
def artifact(compiled):
    return compiled[0] / "artifact"


def test_every_kernel_compiles_for_every_architecture(compiled):
    above = {"above_kernel", "kept_kernel", "compact_kernel"}
    every = ALWAYS | ALONE | BATCHED | LAZY | {"mark_kernel"} | above | CHOOSING
    for target in ("a100", "l4", "h100"):
        fences = set() if target == "h100" else {"fence_kernel"}  # where no kernel starts early
        assert {name for where, name in compiled[1] if where == target} == every - fences


@pytest.fixture
def copy(artifact, tmp_path):
    return shutil.copytree(artifact, tmp_path / "copy")


def test_an_artifact_brings_its_kernels(artifact, tiny_opt):
    manifest = open_artifact(artifact).manifest  # sizes and hashes hold
    assert manifest["target"] == "a100" and manifest["dtype"] == "float16"
    assert manifest["batch_sizes"] == [1]
    folder = artifact / "kernels/sm_80"
    found = {path.relative_to(artifact).as_posix() for path in folder.iterdir()}
    listed = {name for name in manifest["files"] if name.startswith("kernels/")}
    assert found == listed and "kernels/sm_80/index.json" in found
    assert [path.name for path in (artifact / "kernels").iterdir()] == ["sm_80"]
    for name in listed:
        digest = hashlib.sha256((artifact / name).read_bytes()).hexdigest()
        assert manifest["files"][name]["sha256"] == digest
    index = json.loads((folder / "index.json").read_text())
    assert {e["file"] for e in index["images"]} == {Path(n).name for n in listed} - {"index.json"}
    assert index["arch"] == 80 and not any(entry["pdl"] for entry in index["images"])

    # Other processes find them: keys are those that the launches of this one ask for.
    session = lowered(tiny_opt)
    session.max_seq_len = 48
    cuda.use("a100")
    assert {entry["key"] for entry in index["images"]} == set(record(session, 1))
    cuda.load_images(artifact, 80)
    assert set(cuda._IMAGES) == set(record(session, 1))


@no_gpu
@pytest.mark.parametrize("allow_jit", [False, True])
def test_loading_without_a_gpu_is_refused(artifact, allow_jit):
    """Nothing falls back to the CPU, though every op has a CPU implementation."""
    with pytest.raises(KernelError, match=r"(?s)no GPU is available.*a100.*--target cpu"):
        shadowc.load(artifact, allow_jit=allow_jit)
    with pytest.raises(KernelError, match="no GPU is available"):
        load_session(open_artifact(artifact), allow_jit=allow_jit)


@pytest.mark.parametrize("damage", ["missing", "truncated", "edited"])
@pytest.mark.parametrize("kind", ["cubin", "json"])
def test_a_damaged_kernel_is_refused(copy, damage, kind):
    path = sorted((copy / "kernels/sm_80").glob(f"*.{kind}"))[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    if damage != "missing":
        path.write_bytes(content if damage == "edited" else content[:-1])
    with pytest.raises(ArtifactError, match=path.name):
        open_artifact(copy)
    if kind == "json" or damage == "missing":
        return
    # With a manifest that was edited to fit, the index of the kernels still tells.
    manifest = json.loads((copy / MANIFEST).read_text())
    name = path.relative_to(copy).as_posix()
    manifest["files"][name] = {
        "bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()
    }  # fmt: skip
    (copy / MANIFEST).write_text(sealed(manifest))
    open_artifact(copy)
    with pytest.raises(KernelError, match=f"{path.name} is damaged"):
        cuda.load_images(copy, 80)
    assert not cuda._IMAGES


# --- The session, played on a CPU ----------------------------------------------------------------


class Graph:
    """Stands for a CUDA graph: replaying runs again, and results appear where they were."""

    def replay(self):
        for name, value in self.run().items():
            self.results[name].copy_(value)


class Capture:
    """Stands for `torch.cuda.graph`; finds what is captured in the frame that captures it."""

    def __init__(self, graph):
        self.graph = graph

    def __enter__(self):
        self.graph.run = sys._getframe(1).f_locals["run"]

    def __exit__(self, *error):
        self.graph.results = sys._getframe(1).f_locals["results"]


class Stream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass


@pytest.fixture
def played(monkeypatch):
    """Makes a CudaSession whose device is the CPU."""
    for name, value in {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": Graph,
        "graph": Capture,
        "current_device": lambda: 0,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)

    def make(session: Session, batch_sizes=(1, 2, 4)) -> CudaSession:
        made = CudaSession(
            session.shape, session.policy, session.programs, session.tensors,
            session.static_keep, session.max_seq_len, session.predictor_bytes,
        )  # fmt: skip
        made.batch_sizes, made._free, made._device = batch_sizes, {}, torch.device("cpu")
        made._profile, made._jit = "h100", None
        return made

    return make


def generate(session, ids, prompt=4, start=None):
    """Logits of all steps, fed token by token after the prompt."""
    cache = session.new_cache(len(ids))
    if start is not None:
        cache.start = start
    logits = [session.step(ids[:, :prompt], cache)["logits"]]
    for token in range(prompt, ids.shape[1]):
        logits.append(session.step(ids[:, token : token + 1], cache)["logits"])
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize("name", POLICIES)
def test_graphs_over_padded_rows_give_what_a_plain_session_gives(tiny, played, name):
    session = lowered(tiny, name, dtype=FULL)
    graphs = played(session)
    for batch, prompt in ((3, 4), (1, 1), (3, 5), (2, 4), (4, 4)):
        ids = tiny.ids(batch=batch, tokens=10, seed=batch)
        start = torch.arange(batch) % min(3, prompt)
        want, plain = generate(session, ids, prompt, start)
        got, cache = generate(graphs, ids, prompt, start)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        assert (cache.length, cache.steps) == (plain.length, plain.steps)
        for key, value in cache.keep.items():
            assert torch.equal(value, plain.keep[key]), key
        for here, there in zip(cache.tensors, plain.tensors, strict=True):
            torch.testing.assert_close(here[:, :, :10], there[:, :, :10], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "token",
        "every 3",
        "prompt",
        "static",
        "dense",
    ],
)
def test_the_check_of_compile_runs_on_graphs(tiny_opt, played, monkeypatch, name):
    """What `compile` does on a machine with the target's GPU."""
    monkeypatch.setattr(torch.Tensor, "cpu", torch.Tensor.clone)  # a copy, as from another device
    graphs = played(lowered(tiny_opt, name, dtype=FULL), (1,))
    report = check_numerics(graphs, tiny_opt.loaded, load_target("h100").tolerances(FULL))
    assert report["mask_mismatch"] == 0


def test_memory_is_lent_to_one_batch_after_the_other(tiny_opt, played):
    graphs = played(lowered(tiny_opt, dtype=FULL))
    ids = tiny_opt.ids(batch=2, tokens=6)
    logits, first = generate(graphs, ids)
    memory, second = first.memory, graphs.new_cache(2)
    assert second.memory is not memory  # both are in use
    captured = dict(memory.graphs)
    del first
    third = graphs.new_cache(2)
    assert third.memory is memory
    del third
    again, fourth = generate(graphs, ids)
    assert fourth.memory is memory and memory.graphs == captured
    assert torch.equal(again, logits)


@pytest.mark.parametrize(
    "mode",
    [
        torch.inference_mode,
        pytest.param(
            torch.no_grad,  # that of transformers' generate
        ),
    ],
)
def test_beams_take_the_past_of_others(tiny_opt, played, mode):
    session = lowered(tiny_opt, "every 3", dtype=FULL)
    graphs, ids, order = played(session), tiny_opt.ids(batch=3, tokens=8), torch.tensor([2, 0, 0])
    found = []
    for one in (session, graphs):
        _, cache = generate(one, ids[:, :6], start=torch.tensor([0, 1, 2]))
        with mode():
            cache.reorder_cache(order)
        assert cache.start.tolist() == [2, 0, 0]
        steps = [one.step(ids[order, t : t + 1], cache)["logits"] for t in (6, 7)]
        found.append(torch.cat(steps, 1))
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)


def test_too_many_rows_or_tokens(tiny_opt, played):
    graphs = played(lowered(tiny_opt, dtype=FULL))
    with pytest.raises(LengthError, match=r"(?s)at most 4 rows.*--batch-sizes"):
        graphs.new_cache(5)
    cache = graphs.new_cache(1, 8)
    with pytest.raises(LengthError):
        graphs.step(tiny_opt.ids(batch=1, tokens=9), cache)


def test_generate_inside_and_outside_inference_mode(tiny_opt, played):
    """Memory made inside is lent outside, and what is returned can be written to."""
    session = played(lowered(tiny_opt, "token", dtype=FULL))
    ending = GenerationConfig(pad_token_id=1, eos_token_id=None)
    model = ShadowcForCausalLM(tiny_opt.loaded.model.config, ending, session, {}, None)
    ids = tiny_opt.ids(batch=1, tokens=6)
    with torch.inference_mode():
        first = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    gc.collect()
    again = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(first, again)
    again[again == 1] = 0


def test_another_program_has_graphs_of_its_own(tiny_opt, played):
    session = played(lowered(tiny_opt, "token", dtype=FULL))
    ids = tiny_opt.ids(batch=1, tokens=6)
    generate(session, ids)
    gc.collect()  # its memory, with the graph of `decode`, is free again
    other = session.with_program("decode", session.programs["full"])
    got, _ = generate(other, ids)
    want, _ = generate(played(lowered(tiny_opt, "dense", dtype=FULL)), ids)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_a_longer_cache_than_compiled_is_refused(tiny_opt, played):
    session = played(lowered(tiny_opt, "token", dtype=FULL))
    with pytest.raises(LengthError, match="longer than"):
        session.new_cache(1, session.max_seq_len + 1)


# --- Keys and values that wait -------------------------------------------------------------------


def agree(got, want):
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def complete(session, cache, ids, start, length):
    """The caches after a prompt of two more tokens, which needs all that waited."""
    session.step(ids[:, length : length + 2], cache)
    return [tensor[:, :, : length + 2] for tensor in cache.tensors]


@pytest.mark.parametrize("name", ["token", "every 3", "prompt", "static"])
@pytest.mark.parametrize("graphs", [False, True])
def test_waiting_changes_nothing(tiny, played, name, graphs):
    plain, lazy = (lowered(tiny, name, dtype=FULL, lazy=lazy) for lazy in (False, True))
    if graphs:
        lazy = played(lazy)
    ids, start = tiny.ids(batch=1, tokens=64), torch.tensor([2])
    want, whole = generate(plain, ids[:, :60], 5, start)
    for _ in range(2):  # the second one in the memory of the first
        gc.collect()
        got, cache = generate(lazy, ids[:, :60], 5, start)
        assert cache.lazy is not None and cache.lazy.waits
        agree(got, want)
        assert all(torch.equal(cache.keep[key], whole.keep[key]) for key in whole.keep)
    behind = [
        not torch.allclose(here[:, :, :60], there[:, :, :60], atol=1e-4)
        for here, there in zip(cache.tensors, whole.tensors, strict=True)
    ]
    assert not any(behind[:2]) and any(behind[2:])  # layer 0 keeps all heads
    for here, there in zip(
        complete(lazy, cache, ids, start, 60), complete(plain, whole, ids, start, 60), strict=True
    ):
        agree(here, there)
    assert not cache.lazy.waits


@pytest.mark.parametrize("graphs", [False, True])
def test_tokens_are_taken_back_and_other_programs_run_between(tiny, played, graphs):
    plain, lazy = (lowered(tiny, dtype=FULL, lazy=lazy) for lazy in (False, True))
    ids, others = (tiny.ids(batch=1, tokens=64, seed=seed) for seed in (0, 1))
    found = []
    for session in (plain, played(lazy) if graphs else lazy):
        _, cache = generate(session, ids[:, :40], 4)
        logits = []

        def feed(tokens, session=session, cache=cache, logits=logits, **options):
            for token in tokens:
                ids = token[None, None]
                logits.append(session.step(ids, cache, **options)["logits"].clone())

        for back in (1, 3, 2):
            cache.take_back(back)
            feed(others[0, cache.length : cache.length + back + 1])
        feed(others[0, 50:53], program="full")
        feed(others[0, 53:56])
        cache.take_back(2)
        session.step(others[:, 56:58], cache)  # a prompt right after tokens were taken back
        feed(others[0, 58:62])
        found.append((torch.cat(logits, 1), complete(session, cache, ids, None, 50), cache))
    agree(found[1][0], found[0][0])
    assert found[0][2].length == found[1][2].length
    for here, there in zip(found[1][1], found[0][1], strict=True):
        agree(here, there)


def test_batches_do_not_wait(tiny_opt, played):
    session = played(lowered(tiny_opt, dtype=FULL, lazy=True))
    assert session.step_program(session.new_cache(1)) == "lazy"
    _, one = generate(session, tiny_opt.ids(batch=1, tokens=6))
    assert one.lazy.waits
    del one
    gc.collect()
    assert not session.new_cache(1).lazy.waits  # what was remembered was another batch's
    two = session.new_cache(2)
    assert two.lazy is None and session.step_program(two) == "decode"
    want, _ = generate(lowered(tiny_opt, dtype=FULL), tiny_opt.ids(tokens=9))
    agree(generate(session, tiny_opt.ids(tokens=9))[0], want)
    padded = played(lowered(tiny_opt, dtype=FULL, lazy=True), (2,)).new_cache(1)
    assert padded.lazy is None  # a row that is padded to two
    with pytest.raises(OptionError, match="'lazy' is for one row"):
        session.step(tiny_opt.ids(tokens=1), two, program="lazy")


def test_usage_counts_the_keys_that_were_read(tiny):
    session, plain = (lowered(tiny, dtype=FULL, lazy=lazy) for lazy in (True, False))
    ids, shape = tiny.ids(batch=1, tokens=30), tiny.shape
    usages = []
    for one in (session, plain):
        cache, usage, read = one.new_cache(1), Usage.of(one), 0
        one.step(ids[:, :4], cache)
        for token in range(4, 30):
            results = one.step(ids[:, token : token + 1], cache)
            usage.add(results)
            read += sum(int((results[f"computed_{i}"] > 0).sum()) for i in (1, 2)
                        if f"computed_{i}" in results)  # fmt: skip
        usages.append((usage, read))
    (lazy, read), (whole, _) = usages
    assert 0 < read < 2 * shape.kv_heads * 26
    assert lazy.keys.tolist()[0] == shape.kv_heads * 26 and int(lazy.keys.sum()) == (
        read + shape.kv_heads * 26
    )
    saved = (3 * shape.kv_heads * 26 - int(lazy.keys.sum())) / 26
    less = saved * 2 * shape.head_dim * shape.hidden * lazy.element_size
    assert whole.layer_bytes - lazy.layer_bytes == pytest.approx(less)
    assert whole.to_json()["kv_heads_by_layer"] == [shape.kv_heads] * 3


@pytest.mark.parametrize("broken", [None, "lazy", "decode"])
def test_compile_checks_both_ways_to_decode(tiny_opt, broken):
    session = lowered(tiny_opt, dtype=FULL, lazy=True)
    tolerances = load_target("a100").tolerances(FULL)
    if broken is None:
        report = check_numerics(session, tiny_opt.loaded, tolerances)
        assert sum(report["kv_heads_by_layer"]) < 3 * tiny_opt.shape.kv_heads
        return
    other = session.with_program(broken, session.programs["full"])
    with pytest.raises(NumericsError, match="the lazy program does not agree with the decode"):
        check_numerics(other, tiny_opt.loaded, tolerances)


def test_who_cannot_wait_is_told(tiny_opt, tmp_path):
    with pytest.raises(OptionError, match=r"(?s)'cpu' has no lazy keys.*--lazy-kv with a CUDA"):
        load_target("cpu", lazy_kv=True)
    with pytest.raises(OptionError, match="every head runs"):
        compile_model(
            tiny_opt.loaded, tiny_opt.calibration, Policy(0.0, 0.5), tmp_path / "artifact",
            target="a100", lazy_kv=True,
        )  # fmt: skip


def test_settings_of_one_artifact_do_not_leak(tiny_opt):
    cuda.use("h100")
    with cuda.using("l4", jit=True):
        assert cuda.profile().name == "l4"
        with pytest.raises(KeyError), cuda.using("a100", jit=False):
            raise KeyError
        assert cuda.profile().name == "l4"
    assert cuda.profile().name == "h100" and cuda._jit is None
    cuda.use(None)


def test_bytes_of_a_batch_are_those_of_the_union(tiny_opt):
    """Rows share what they read: all heads, and every neuron that any row keeps."""
    shape = tiny_opt.shape
    index = torch.arange(shape.ffn, dtype=torch.int32).expand(shape.layers, 2, -1).contiguous()
    index[:, 1] = index[:, 1].flip(-1)
    count = torch.tensor([[10, 10]] * shape.layers, dtype=torch.int32)
    usage = Usage(shape, 2, rows_share=True)
    usage.add({"logits": torch.zeros(2, 1, 1), "neuron_index": index, "neuron_count": count})
    attention = 2 * (shape.heads + shape.kv_heads) * shape.head_dim * shape.hidden
    assert usage.layer_bytes == 2 * shape.layers * (attention + 20 * 2 * shape.hidden)
    assert usage.neuron_sparsity == 1 - 10 / shape.ffn
    assert usage.neurons_read_share == usage.to_json()["neurons_read_share"] == 20 / shape.ffn


# --- Batches that run dense ----------------------------------------------------------------------


@pytest.mark.parametrize("program", ["full", "dense"])
@pytest.mark.parametrize("name", ["token", "every 3", "prompt", "static"])
def test_from_a_batch_on_every_unit_runs(tiny, played, caplog, name, program):
    session = lowered(tiny, name, dtype=FULL)
    graphs = played(session)
    graphs.dense_from_batch, graphs.dense_program = 4, program
    assert [graphs.policy_in_effect(batch) for batch in (1, 2, 3, 4)] == [
        "sparse", "sparse", "dense (batch 4 >= 4)", "dense (batch 4 >= 4)",
    ]  # fmt: skip
    ids = tiny.ids(batch=3, tokens=8)
    want, _ = generate(lowered(tiny, "dense", dtype=FULL), ids)  # zero rows are zero in any
    got, cache = generate(graphs, ids)  # 3 rows run as 4
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert list(cache.memory.graphs) == [program] and not cache.keep
    usage = Usage(tiny.shape, 4, session.predictor_bytes, rows_share=True)
    usage.add(graphs.step(ids[:, :1], cache))
    assert usage.neurons_read_share == 1 and usage.weight_bytes_skipped == 0
    assert usage.head_sparsity == usage.neuron_sparsity == usage.predictor_bytes == 0

    got, cache = generate(graphs, ids[:2])
    want, _ = generate(session, ids[:2])
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert not {"full", "dense"} & set(cache.memory.graphs)
    said = [record.getMessage() for record in caplog.records if "dense" in record.getMessage()]
    assert said == [f"dense (batch 4 >= 4): every unit runs, by program {program}; sparse below"]


def test_what_is_asked_for_by_name_runs_whatever_the_batch(tiny_opt, played):
    graphs, ids = played(lowered(tiny_opt, dtype=FULL)), tiny_opt.ids(batch=4, tokens=6)
    graphs.dense_from_batch = 2
    _, cache = generate(graphs, ids)
    graphs.step(ids[:, :1], cache, program="decode")
    assert list(cache.memory.graphs) == ["full", "decode"] and cache.keep


def test_an_artifact_that_skips_nothing_has_no_batch_to_switch_at(tiny, played):
    graphs = played(lowered(tiny, "dense", dtype=FULL))
    graphs.dense_from_batch = 2
    assert graphs.policy_in_effect(4) == ("dense" if tiny.shape.gated else "exact")
    assert graphs._stated is False


def test_the_manifest_says_from_which_batch_on(monkeypatch):
    backend = load_target("h100")
    never = {"dense_from_batch": None, "dense_program": "full"}
    assert backend.batch_policy(0) == never
    assert backend.batch_policy(6) == {"dense_from_batch": 6, "dense_program": "full"}
    measured = dataclasses.replace(backend.profile, dense_from_batch=8, dense_program="dense")
    monkeypatch.setattr(backend, "profile", measured)
    assert backend.batch_policy(None) == {"dense_from_batch": 8, "dense_program": "dense"}
    assert backend.batch_policy(0)["dense_from_batch"] is None
    for wrong in (-1, 1):
        with pytest.raises(OptionError, match="--dense-from-batch is out of range"):
            backend.batch_policy(wrong)
    with pytest.raises(OptionError, match="cpu target"):
        load_target("cpu").batch_policy(4)


def test_a_switch_that_nothing_skips_is_refused(tiny_opt, tmp_path):
    with pytest.raises(OptionError, match="no batch skips anything"):
        compile_model(
            tiny_opt.loaded, None, Policy(0.0, 0.0), tmp_path / "a", target="h100",
            dense_from_batch=4,
        )  # fmt: skip


def test_loading_follows_the_manifest(copy, monkeypatch):
    backend = load_target("a100")
    monkeypatch.setattr(type(backend), "serve", lambda self, session, *rest, **more: session)

    def edit(**entries):
        manifest = json.loads((copy / MANIFEST).read_text()) | entries
        (copy / MANIFEST).write_text(sealed(manifest))
        return open_artifact(copy)

    artifact = open_artifact(copy)
    assert artifact.manifest["dense_from_batch"] == 2  # the profile's
    assert load_session(artifact).dense_from_batch == 2
    artifact = edit(dense_from_batch=None)
    assert load_session(artifact).dense_from_batch is None
    assert describe_artifact(artifact)["policy_in_effect"] == "sparse"
    artifact = edit(dense_from_batch=4, dense_program="dense")
    session = load_session(artifact)
    assert (session.dense_from_batch, session.dense_program) == (4, "dense")
    found = describe_artifact(artifact)
    assert found["policy_in_effect"] == "sparse; dense (batch >= 4, program dense)"
    assert found["dense_from_batch"] == 4
    with pytest.raises(ArtifactError, match=r"(?s)manifest\.json.*dense_program"):
        edit(dense_program="magic")
    with pytest.raises(ArtifactError, match=r"(?s)manifest\.json.*dense_from_batch"):
        edit(dense_from_batch="many")


def test_a_batch_without_kernels_is_not_measured(artifact):
    with pytest.raises(OptionError, match=r"(?s)--batch is larger.*at most 1.*--batch-sizes"):
        bench.bench(open_artifact(artifact), batch=2)


def test_dejavu_needs_kernels_that_no_artifact_has(tiny_opt, played):
    session = played(lowered(tiny_opt, dtype=FULL))
    session._device = torch.device("cuda")
    with pytest.raises(OptionError, match=r"(?s)'dejavu'.*--allow-jit"):
        bench._dejavu(session, tiny_opt.ids(1, 4), 16, False)


def test_static_finds_its_kernels(tiny):
    """Its program is not in the artifact, but made of what `decode` launches."""
    session = lowered(tiny)
    for batch in (1, 2):
        own = record(session, batch)
        assert set(record(static_session(session), batch)) <= set(own)


def test_baselines_run_as_graphs(tiny, played):
    """What bench runs on a GPU, beside the artifact's own steps."""
    session, ids = lowered(tiny, "every 3", dtype=FULL), tiny.ids(batch=2, tokens=8)
    graphs = played(session)
    graphs.dense_from_batch = 2  # whatever the artifact itself does with this batch
    for make, program in ((static_session, "hold"), (dejavu_session, "decode")):
        found = []
        for one in (session, graphs):
            other = make(one)
            if program == "decode":
                other, new = other
                other.tensors |= {k: torch.ones(v.shape) for k, v in new.items()}
            variant = bench._own(other, ids[:, :4], 16, program)
            found.append(torch.cat([variant.step(ids[:, t : t + 1])["logits"] for t in (4, 5)], 1))
        torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
