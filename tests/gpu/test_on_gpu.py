"""What only a GPU can show: `make gpu` runs this file there; elsewhere it is skipped."""

import warnings

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from transformers import AutoModelForCausalLM

from shadowc import cuda
from shadowc.calibration.data import calibration_examples
from shadowc.calibration.fit import FitOptions, calibrate
from shadowc.compiler import build_programs, compile_model
from shadowc.config import Policy
from shadowc.errors import KernelError, ModelError, OptionError
from shadowc.evaluation.bench import bench
from shadowc.evaluation.masks import teacher_forced, with_given_masks
from shadowc.evaluation.numerics import masks_of
from shadowc.kernels import norm_linear, norm_mlp, norm_qkv, scale, scaled_out_proj
from shadowc.kernels.choose_above import choose_above_reference
from shadowc.kernels.decode_attention import decode_attention_reference
from shadowc.kernels.lazy_qkv import WINDOW
from shadowc.kernels.select import select_reference
from shadowc.models import load_model
from shadowc.passes.manager import copy_module
from shadowc.runtime.cuda import CudaSession
from shadowc.runtime.lazy import CATCH_UP, LAZY
from shadowc.runtime.loading import load
from shadowc.runtime.session import Session
from shadowc.runtime.usage import Usage
from shadowc.targets import load_target
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
    "lazy gqa": (4096, 32, 8, 128, 0),
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


@pytest.mark.parametrize(
    "shape, dtype", [("opt", torch.float16), ("lazy gqa", torch.float16), ("opt", torch.bfloat16)]
)
def test_keys_and_values_that_waited_are_the_same(shape, dtype):
    """48 tokens with half of the heads, some of them away for more than two windows."""
    torch.manual_seed(0)
    c, h, g, d, _ = SHAPES[shape]
    norm, steps, first = "layer" if shape == "opt" else "rms", 48, 20
    gamma = (1 + 0.1 * torch.randn(c, device="cuda")).to(dtype)
    matrices: list[torch.Tensor | None] = []
    for n in (h, g, g):
        w = (torch.randn(n * d, c, device="cuda") * c**-0.5).to(dtype)
        gain = w.float() @ gamma.float() if norm == "layer" else None
        matrices += [w, gain, torch.randn(n * d, device="cuda")]
    whole = [torch.randn(1, g, 96, d, device="cuda").to(dtype) for _ in range(2)]
    mine = [cache.clone() for cache in whole]
    rotary = norm == "rms"
    state = [
        torch.full((WINDOW, c), torch.nan, dtype=dtype, device="cuda"),
        torch.full((WINDOW, 2), torch.nan, device="cuda"),
        torch.full((2, g), first, dtype=torch.int32, device="cuda"),
        torch.full((2, WINDOW, d), torch.nan, device="cuda") if rotary else None,
    ]
    start, read = torch.zeros(1, dtype=torch.int64, device="cuda"), 0
    for step in range(steps):
        scaled, stats = OPS.scale(torch.randn(1, 1, c, device="cuda"), gamma)
        angle = torch.rand(1, 1, d // 2, device="cuda").repeat(1, 1, 2) * 6
        turn = (angle.cos(), angle.sin()) if rotary else (None, None)
        mask = torch.rand(1, h, device="cuda") < 0.5
        mask[:, : h // g] = step % 40 == 39
        index = torch.sort(~mask, dim=1, stable=True).indices.int()
        head = (scaled, stats, norm, 1e-5, *matrices, d, index, mask.sum(1, dtype=torch.int32))
        position = torch.tensor([first + step], device="cuda")
        q, k, v = OPS.norm_qkv(*head)
        rest = (start, position, d**-0.5, *head[-2:])
        want = OPS.decode_attention(q, k, v, *turn, *whole, *rest)
        lazy_q, computed = OPS.lazy_qkv(*head, position, *turn, *state, *mine)
        got = OPS.decode_attention(lazy_q, None, None, *turn, *mine, *rest)
        close("ctx", got, want, dtype)
        kept = mask.view(g, -1).any(1)
        assert (computed[0][kept] > 0).all()
        read += int((computed > 0).sum())
    assert read < steps * g and int(state[2].min()) < first + steps
    last = torch.tensor([first + steps - 1], device="cuda")
    OPS.catch_up(*matrices[3:], last, *state, *mine)
    for name, here, there in zip(("keys", "values"), mine, whole, strict=True):
        close(name, here, there, dtype)


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


@pytest.mark.parametrize("rank", [64, 100])
@pytest.mark.parametrize("kinds", [[(1, 8192)], [(1, 40), (1, 20480)], [(5, 32), (6, 4097)]])
def test_choose_above(kinds, rank):
    """Small integers: sums are exact, so ties agree too; read by the next kernel and not."""
    torch.manual_seed(0)

    def integers(*size):
        return torch.randint(-3, 4, size, device="cuda").half()

    weights = [integers(layers * units, rank) for layers, units in kinds]
    biases = [integers(layers * units) for layers, units in kinds]
    thresholds = [integers(layers).float() for layers, _ in kinds]
    for batch in (1, 2):
        code = integers(batch, 1, rank).float()
        for soon in (True, False):
            found = OPS.choose_above(code, weights, biases, thresholds, soon)
            given = ([t.cpu() for t in many] for many in (weights, [b.float() for b in biases]))
            want = choose_above_reference(code.cpu(), *given, [t.cpu() for t in thresholds])
            for ours, reference in zip(found, want, strict=True):
                assert torch.equal(ours.cpu(), reference)


@pytest.fixture(scope="module", params=["opt-books-15m", "smollm2-135m"])
def trained(request):
    """A trained model, its calibration, 272 tokens, and what half precision costs transformers."""
    try:
        loaded = load_model(request.param)
    except ModelError as error:
        pytest.skip(str(error))
    windows = calibration_examples(loaded, "pydoc", 8, 272, 0)
    found = {
        predictor: calibrate(loaded, windows, FitOptions(("plainact",), predictor))[0]
        for predictor in ("shadow", "layerwise")
    }
    ids = torch.tensor([windows[0].ids[:272]])
    half = load_model(request.param, dtype=torch.float16).model.cuda()
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exact, rounded = (
            model(input_ids=ids.to(model.device)).logits[:, 16:].float().cpu()
            for model in (loaded.model, half)
        )
    return loaded, found, ids, rounded, apart(rounded, exact)


def apart(got, want):
    """Relative distance (norm)."""
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize(
    ("predictor", "share"),
    [*(("shadow", share) for share in (0.0, 0.3, 0.5, 0.7)), ("layerwise", 0.5)],
)
def test_decode_agrees_with_masked_over_256_tokens(trained, predictor, share):
    """The masked program computes in float32, so steps may differ by what half precision costs."""
    loaded, calibrations, ids, rounded, cost = trained
    found = calibrations[predictor]
    policy = Policy(share, share, selection="topk" if predictor == "shadow" else "threshold")
    traced = trace(loaded.model).module(check_guards=False)
    built = build_programs(
        copy_module(traced), loaded, found if share else None, policy, load_target(HERE),
        torch.float16,
    )  # fmt: skip
    session = CudaSession.of(
        Session(loaded.shape, policy, built.programs, built.packed, built.keep, 272,
                built.predictor_bytes), (1,), HERE,
    )  # fmt: skip
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
    assert apart(decoded, want) <= 2 * cost
    if not share:
        assert apart(decoded, rounded) <= 2 * cost


@pytest.fixture(scope="module")
def books():
    loaded = load_model("opt-books-15m")
    windows = calibration_examples(loaded, "pydoc", 8, 272, 0)
    (found,) = calibrate(loaded, windows, FitOptions(("plainact",), "shadow"))
    return loaded, found, windows


@pytest.mark.parametrize("refresh", [1, 3, 0])
def test_lazy_keys_and_values_change_nothing_over_256_tokens(books, refresh):
    loaded, found, windows = books
    policy = Policy(0.5, 0.5, refresh=refresh)
    traced = trace(loaded.model).module(check_guards=False)
    built = build_programs(
        copy_module(traced), loaded, found, policy, load_target(HERE), torch.float16, lazy_kv=True
    )
    ids = torch.tensor([windows[0].ids[:272]])
    waiting = (*LAZY.values(), CATCH_UP)
    runs = []
    for lazy in (False, True):
        programs = {n: p for n, p in built.programs.items() if lazy or n not in waiting}
        session = CudaSession.of(
            Session(loaded.shape, policy, programs, built.packed, built.keep, 272,
                    built.predictor_bytes), (1,), HERE,
        )  # fmt: skip
        cache, usage = session.new_cache(1), Usage.of(session)
        session.step(ids[:, :16], cache)
        logits = []
        for token in range(16, 270):
            results = session.step(ids[:, token : token + 1], cache)
            logits.append(results["logits"][0, 0])
            usage.add(results)
        session.step(ids[:, 270:], cache)  # two tokens: needs all that waited
        runs.append((torch.stack(logits), cache, usage))
    (want, whole, usage), (got, cache, lazily) = runs
    assert apart(got, want) <= 1e-2
    assert (got.argmax(1) != want.argmax(1)).sum() <= 3
    for here, there in zip(cache.tensors, whole.tensors, strict=True):
        close("cache", here, there, torch.bfloat16)  # what 270 tokens and ten layers make of it
    assert lazily.layer_bytes < usage.layer_bytes


@pytest.mark.parametrize("lazy_kv", [False, True])
def test_an_artifact_runs_with_the_kernels_it_holds(books, tmp_path, lazy_kv):
    loaded, found, _ = books
    made = compile_model(
        loaded, found, Policy(0.5, 0.5), tmp_path / "own", target=HERE, dtype=torch.float16,
        max_seq_len=128, batch_sizes=(1, 2), lazy_kv=lazy_kv,
    )  # fmt: skip
    # Compiling is not allowed: every kernel must be in the artifact.
    model = AutoModelForCausalLM.from_pretrained(made.path, device_map="auto", probe_every=2)
    inputs = model.tokenizer(["It was", "She"], return_tensors="pt", padding=True).to("cuda")
    tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    assert tokens.shape[1] <= inputs.input_ids.shape[1] + 40
    alone = model.tokenizer("It was", return_tensors="pt").to("cuda")
    first = model.generate(**alone, max_new_tokens=40, do_sample=False)
    assert torch.equal(first, model.generate(**alone, max_new_tokens=40, do_sample=False))
    counted = model.counters()
    assert counted["requests"] == 3 and 0 < counted["neurons"] < counted["neurons_dense"]
    assert 0 < counted["probe_recall"] <= 1 and counted["probe_tokens"] > 2
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
    other = next(name for name in cuda.PROFILES if name != HERE)
    made = compile_model(
        loaded, None, Policy(0.0, 0.0), tmp_path / "other", target=other, dtype=torch.float16,
        max_seq_len=64,
    )  # fmt: skip
    with pytest.raises(KernelError, match="another GPU"):
        load(made.path)
    model = load(made.path, allow_jit=True)
    ids = model.tokenizer("It was", return_tensors="pt").input_ids.cuda()
    assert model.generate(input_ids=ids, max_new_tokens=4).shape[1] == ids.shape[1] + 4
