"""What only a GPU can show: `make gpu` runs this file there; elsewhere it is skipped."""

import warnings

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from shadowc import cuda
from shadowc.calibration.data import calibration_examples
from shadowc.calibration.fit import FitOptions, calibrate
from shadowc.compiler import build_programs, compile_model
from shadowc.config import Policy
from shadowc.errors import KernelError, OptionError
from shadowc.evaluation.bench import bench
from shadowc.evaluation.masks import teacher_forced, with_given_masks
from shadowc.evaluation.numerics import masks_of
from shadowc.kernels import norm_linear, norm_mlp, norm_qkv, scale, scaled_out_proj
from shadowc.kernels.decode_attention import decode_attention_reference
from shadowc.kernels.select import select_reference
from shadowc.models import load_model
from shadowc.passes.manager import copy_module
from shadowc.runtime.cuda import CudaSession
from shadowc.runtime.loading import load
from shadowc.runtime.session import Session
from shadowc.targets import TARGETS, load_target
from shadowc.trace import trace

OPS = torch.ops.shadowc
HERE = cuda.profile().name
#: Relative error (norm) against float32 references on the same half-precision inputs: results are
#: rounded to the type of the weights, scores and sums of stats are not.
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
#: C, H, G, D, F: OPT-1.3B, head dims 80 and 96, Llama-2-7B, grouped queries.
SHAPES = {
    "opt": (2048, 32, 32, 64, 8192),
    "d80": (2560, 32, 32, 80, 10240),
    "d96": (3072, 32, 32, 96, 8192),
    "llama": (4096, 32, 32, 128, 11008),
    "gqa": (1030, 8, 2, 128, 4097),
}


def keep(batch, units, device="cuda"):
    mask = torch.rand(batch, units, device=device) < 0.5
    return torch.sort(~mask, dim=1, stable=True).indices.int(), mask.sum(1, dtype=torch.int32)


def close(name, got, want, dtype):
    got, want = got.double(), want.double()
    error = float((got - want).norm() / want.norm())
    assert error <= TOLERANCE[dtype], f"{name}: {error}"


# Every kernel is compiled for every case: few of them that cover shapes, types and batches.
@pytest.mark.parametrize(
    "shape, dtype, batch",
    [
        ("opt", torch.float16, 1),
        ("d80", torch.bfloat16, 1),
        ("d96", torch.float16, 4),
        ("llama", torch.float16, 1),
        ("llama", torch.bfloat16, 4),
        ("gqa", torch.float16, 1),
    ],
)
def test_ops_agree_with_their_references(shape, dtype, batch):
    torch.manual_seed(0)
    c, h, g, d, f = SHAPES[shape]
    norm = "rms" if shape == "llama" else "layer"

    def weight(*size):
        return (torch.randn(*size, device="cuda") * size[-1] ** -0.5).to(dtype)

    def gain(w):
        return w.float() @ gamma.float() if norm == "layer" else None

    gamma = (1 + 0.1 * torch.randn(c, device="cuda")).to(dtype)
    x = torch.randn(batch, 1, c, device="cuda")
    scaled, stats = OPS.scale(x, gamma)
    close("scaled", scaled, scale.scale_reference(x, gamma)[0], dtype)
    head = (scaled, stats, norm, 1e-5)
    wq, wk, wv = weight(h * d, c), weight(g * d, c), weight(g * d, c)
    shift = torch.randn(h * d, device="cuda")
    close("linear", OPS.norm_linear(*head, wq, gain(wq), shift),
          norm_linear.norm_linear_reference(*head, wq, gain(wq), shift), dtype)  # fmt: skip
    heads = keep(batch, h)
    qkv = (*head, wq, gain(wq), shift, wk, gain(wk), None, wv, gain(wv), None, d, *heads)
    q, k, v = OPS.norm_qkv(*qkv)
    rq, rk, rv = norm_qkv.norm_qkv_reference(*qkv)
    close("q", q.where(rq != 0, 0.0), rq, dtype)
    close("k", k, rk, dtype)
    close("v", v, rv, dtype)
    caches = [torch.randn(batch, g, 700, d, device="cuda").to(dtype) for _ in range(2)]
    wide = [t.float() for t in caches]
    start = torch.arange(batch, device="cuda")
    position = torch.tensor([611], device="cuda")
    rotary = [torch.randn(batch, 1, d, device="cuda") for _ in range(2)]
    ctx = OPS.decode_attention(rq, rk, rv, *rotary, *caches, start, position, d**-0.5, *heads)
    want = decode_attention_reference(
        rq.float(), rk.float(), rv.float(), *rotary, *wide, start, position, d**-0.5, *heads
    )
    close("ctx", ctx, want, dtype)
    close("cache", caches[0][:, :, 611], wide[0][:, :, 611], dtype)
    out = (want.to(dtype), weight(c, h * d), gamma, x, gamma, d, *heads)
    close("out", OPS.scaled_out_proj(*out)[0],
          scaled_out_proj.scaled_out_proj_reference(*out)[0], dtype)  # fmt: skip
    w1, w2t = weight(f, c), weight(f, c)
    gated = norm == "rms"
    first = (w1, gain(w1), None if gated else torch.randn(f, device="cuda"))
    mlp = (*head, *first, weight(f, c) if gated else None, w2t, None, x, gamma,
           "silu" if gated else "relu", not gated, *keep(batch, f))  # fmt: skip
    got, ref = OPS.norm_mlp(*mlp), norm_mlp.norm_mlp_reference(*mlp)
    close("mlp", got[0] - x, ref[0] - x, dtype)
    close("mlp stats", got[2].sum(1), ref[2].sum(1), dtype)


@pytest.mark.parametrize("size", [(1, 40, 20480), (4, 24, 8192), (2, 5, 127), (1, 39, 40)])
def test_select(size):
    batch, layers, units = size
    for scores in (torch.randn(size, device="cuda"), torch.randn(size, device="cuda").round()):
        for local in (False, True):
            kept = layers * units // 2
            index, count = OPS.select(scores, kept, 3, local)
            mask = select_reference(scores, kept, 3, local).transpose(0, 1)
            places = torch.arange(units, device="cuda") < count[..., None]
            got = torch.zeros_like(mask).scatter(2, index.long(), places)
            assert torch.equal(got, mask)


@pytest.fixture(scope="module")
def books():
    loaded = load_model("opt-books-15m")
    windows = calibration_examples(loaded, "pydoc", 8, 272, 0)
    (found,) = calibrate(loaded, windows, FitOptions(("plainact",)))
    return loaded, found, windows


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.7])
def test_decode_agrees_with_masked_over_256_tokens(books, share):
    loaded, found, windows = books
    policy = Policy(share, share)
    traced = trace(loaded.model).module(check_guards=False)
    built = build_programs(
        copy_module(traced), loaded, found if share else None, policy, load_target(HERE),
        torch.float16,
    )  # fmt: skip
    session = CudaSession.of(
        Session(loaded.shape, policy, built.programs, built.packed, built.keep, 272,
                built.predictor_bytes), (1,), HERE,
    )  # fmt: skip
    ids = torch.tensor([windows[0].ids[:272]])
    cache = session.new_cache(1)
    session.step(ids[:, :16], cache)
    logits, keeps = [], []
    for token in range(16, 272):
        logits.append(session.step(ids[:, token : token + 1], cache)["logits"][:, 0].cpu())
        keeps.append({name: value.cpu().clone() for name, value in cache.keep.items()})
    decoded = torch.stack(logits, 1)
    masks = None
    if share:
        own = teacher_forced(session, ids, prompt=16)
        masks = masks_of(keeps, loaded.shape, 16)
        wrong = (masks[0] != own["head_mask"]).sum() + (masks[1] != own["neuron_mask"]).sum()
        assert wrong <= 5e-3 * (masks[0].numel() + masks[1].numel())
        session = session.with_program("given_masks", with_given_masks(session.programs["masked"]))
    want = teacher_forced(session, ids, prompt=16, masks=masks)["logits"][:, 16:]
    assert (decoded - want).abs().max() <= 1e-2 * want.abs().max()
    if not share:
        eager = load_model("opt-books-15m", dtype=torch.float16).model.cuda()
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = eager(input_ids=ids.cuda()).logits[:, 16:].float().cpu()
        assert (decoded - theirs).abs().max() <= 1e-2 * theirs.abs().max()


def test_an_artifact_runs_with_the_kernels_it_holds(books, tmp_path):
    loaded, found, _ = books
    made = compile_model(
        loaded, found, Policy(0.5, 0.5), tmp_path / "own", target=HERE, dtype=torch.float16,
        max_seq_len=128, batch_sizes=(1, 2),
    )  # fmt: skip
    model = load(made.path)  # compiling is not allowed: every kernel must be in the artifact
    inputs = model.tokenizer(["It was", "She"], return_tensors="pt", padding=True).to("cuda")
    tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    assert tokens.shape[1] <= inputs.input_ids.shape[1] + 40
    alone = model.tokenizer("It was", return_tensors="pt").to("cuda")
    first = model.generate(**alone, max_new_tokens=40, do_sample=False)
    assert torch.equal(first, model.generate(**alone, max_new_tokens=40, do_sample=False))
    cuda.clear_images()


def test_bench_and_batches_that_run_dense(books, tmp_path):
    loaded, found, _ = books
    made = compile_model(
        loaded, found, Policy(0.5, 0.5), tmp_path / "own", target=HERE, dtype=torch.float16,
        max_seq_len=128, batch_sizes=(1, 2), dense_from_batch=2,
    )  # fmt: skip
    options = {"prompt_len": 32, "new_tokens": 32, "hugging_face": False}
    with pytest.raises(OptionError, match="--allow-jit"):
        bench(made, against=("dejavu",), **options)
    names = ("exact", "static", "dejavu")
    alone = bench(made, against=names, allow_jit=True, **options)
    assert alone["policy_in_effect"] == "sparse"
    assert set(names) <= set(alone["variants"]) and alone["left_out"] == {}
    static, dejavu = alone["variants"]["static"], alone["variants"]["dejavu"]
    assert static["bytes"] < dejavu["bytes"]
    two = bench(made, batch=2, **options)
    assert two["policy_in_effect"] == "dense (batch 2 >= 2)" and two["neurons_read_share"] == 1
    with pytest.raises(OptionError, match="at most 2"):
        bench(made, batch=3, **options)
    cuda.clear_images()


def test_transformers_compiled(books, tmp_path):
    loaded, found, _ = books
    made = compile_model(
        loaded, found, Policy(0.5, 0.5), tmp_path / "own", target=HERE, dtype=torch.float16,
        max_seq_len=128,
    )  # fmt: skip
    result = bench(made, against=("hf", "hf-compiled"), prompt_len=32, new_tokens=32)
    assert result["hugging_face_compiled_ms_per_token"] > 0 and result["left_out"] == {}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    cuda.clear_images()


def test_another_gpu_is_refused(books, tmp_path):
    loaded, found, _ = books
    other = next(name for name in TARGETS if name not in ("cpu", HERE))
    made = compile_model(
        loaded, None, Policy(0.0, 0.0), tmp_path / "other", target=other, dtype=torch.float16,
        max_seq_len=64,
    )  # fmt: skip
    with pytest.raises(KernelError, match="another GPU"):
        load(made.path)
    model = load(made.path, allow_jit=True)
    ids = model.tokenizer("It was", return_tensors="pt").input_ids.cuda()
    assert model.generate(input_ids=ids, max_new_tokens=4).shape[1] == ids.shape[1] + 4
