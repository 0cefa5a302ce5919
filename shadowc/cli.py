"""The command line: parses, calls one function, prints. Heavy imports are inside the commands."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from shadowc import config
from shadowc.errors import (
    ArtifactError,
    CalibrationError,
    OptionError,
    ShadowcError,
    out_of_memory,
)

if TYPE_CHECKING:
    import torch

    from shadowc.calibration.store import Calibration
    from shadowc.config import Policy
    from shadowc.models import LoadedModel, ModelSource

Result = dict[str, Any]

CALIBRATIONS, ARTIFACTS = Path("calibrations"), Path("artifacts")
REFRESH = {"prompt": 0, "token": 1}
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

out = Console(soft_wrap=True, highlight=False, markup=False)
err = Console(soft_wrap=True, highlight=False, markup=False, stderr=True)
app = typer.Typer(
    help="Compile OPT and Llama checkpoints to run with contextual sparsity.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
ArtifactPath = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="What compile wrote.")]
AllowJit = Annotated[
    bool,
    typer.Option("--allow-jit", help="Compile what the artifact lacks for this GPU, whichever."),
]


def _refuse_native(value: bool) -> bool:
    """Pass `--no-native` on to whoever opens the artifact."""
    if value:
        os.environ["SHADOWC_NO_NATIVE"] = "1"
    return value


NoNative = Annotated[
    bool,
    typer.Option(
        "--no-native", callback=_refuse_native, help="Refuse an artifact that brings machine code."
    ),
]
Output = Annotated[Path | None, typer.Option(help="Directory to write.", show_default=False)]
Data = Annotated[
    str, typer.Option(metavar="NAME|FILE", help="pydoc, self, a file, or a hub data set.")
]

ProbeEvery = Annotated[
    int | None,
    typer.Option(
        min=0, metavar="N", help="Probe every N-th request: what mattered, and was it kept?"
    ),
]
ProbeAlarm = Annotated[
    float | None,
    typer.Option(min=0.0, max=1.0, help="Recall of the probes below which they warn."),
]


def main() -> None:
    """Entry point of the console script."""
    app()


def command(
    name: str, show: Callable[[Result], None], example: str
) -> Callable[[Callable[..., Result]], Callable[..., None]]:
    """Make a command of a function that returns what `--json` prints.

    Args:
        name: Name of the command.
        show: Prints the result for people.
        example: Shown below the command's help.
    """

    def wrap(function: Callable[..., Result]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(**options: Any) -> None:
            quiet = int(os.environ.get("RANK", "0")) > 0  # of torchrun's processes one speaks
            err.quiet = quiet
            with _reported(options["debug"]), _interruptible(options["debug"]):
                if options["as_json"] or quiet:
                    with contextlib.redirect_stdout(sys.stderr):
                        result = function(**options)
                    if not quiet:
                        print(json.dumps(result))
                else:
                    show(function(**options))

        return app.command(name, epilog=f"Example: {example}")(run)

    return wrap


@contextlib.contextmanager
def _reported(debug: bool) -> Iterator[None]:
    """Turn errors that a user can mend into one message and an exit code."""
    try:
        yield
    except ShadowcError as error:
        message, code = f"error: {error}", error.exit_code
    except Exception as error:
        if out_of_memory(error):
            message, code = "error: not enough memory for this model", 2
        elif isinstance(error, OSError):
            where = f" {error.filename}" if error.filename else ""
            message, code = f"error: cannot read or write{where}: {error.strerror or error}", 2
        else:
            raise
    else:
        return
    if debug:
        traceback.print_exc()
    if not err.quiet:
        print(message, file=sys.stderr)
    raise typer.Exit(code)


@contextlib.contextmanager
def _interruptible(debug: bool) -> Iterator[None]:
    """End with 130 on Ctrl-C, also where a library makes another error of the interrupt."""
    interrupts: list[int] = []

    def interrupt(number: int, _: object) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    default = signal.default_int_handler
    handled = signal.getsignal(signal.SIGINT) is default  # a shell's background job ignores it
    if handled:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except BaseException as error:
        if not interrupts and not isinstance(error, KeyboardInterrupt):
            raise
        if debug:
            traceback.print_exc()
        print("interrupted: no unfinished directory is left behind", file=sys.stderr, flush=True)
        # CPython ends by the signal instead if it arrived inside an `exec`, as imports have many.
        os._exit(130)
    finally:
        if handled:
            signal.signal(signal.SIGINT, default)


# calibrate ----------------------------------------------------------------------------------------


def _show_calibrate(result: Result) -> None:
    table = _table("held-out", "heads", "neurons")
    spearman = (result[f"spearman_{kind}"] for kind in ("heads", "neurons"))
    table.add_row("Spearman", *map(_number, spearman))
    for share in (30, 50, 70):
        heads, neurons = (result.get(f"recall_{kind}_{share}") for kind in ("heads", "neurons"))
        table.add_row(f"recall of the best {share}%", _number(heads), _number(neurons))
    out.print(table)
    out.print(f"{result['examples']} examples, {result['seconds']:.1f} s -> {result['output']}")
    out.print(f"next: shadowc compile {result['output']} --target cpu")


@command(
    "calibrate",
    _show_calibrate,
    "shadowc calibrate opt-books-15m --criterion sens --examples 128",
)
def calibrate(
    model: Annotated[str, typer.Argument(help="Alias, hub id, directory, .gguf or random:ALIAS.")],
    criterion: Annotated[str, typer.Option(help="See: shadowc criteria.")] = "plainact",
    predictor: Annotated[
        str | None,
        typer.Option(help=" | ".join(config.PREDICTORS), show_default=config.DEFAULT_PREDICTOR),
    ] = None,
    feature: Annotated[
        str | None,
        typer.Option(help=" | ".join(config.FEATURES) + " (default: residual; layerwise: entry)."),
    ] = None,
    taps: Annotated[
        int | None, typer.Option(help="shadow with a predictor at every so-manieth layer.")
    ] = None,
    rank_: Annotated[
        int | None,
        typer.Option("--rank", help="Width of a predictor (default: as its kind needs)."),
    ] = None,
    how: Annotated[
        str,
        typer.Option("--fit", help="ridge: in closed form | paper: its two layers, trained."),
    ] = "ridge",
    refresh: Annotated[
        str, typer.Option(help="Masks will be made each: token | prompt | n (tokens).")
    ] = "token",
    data: Data = "pydoc",
    examples: Annotated[int, typer.Option(help="Sequences to calibrate on.")] = 32,
    seq_len: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 256,
    device: Annotated[
        str,
        typer.Option(
            help="auto | cpu | cuda | cuda:N | all (the GPUs, with the layers dealt out to them)."
        ),
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto (fp32, on a GPU bf16) | fp32 | bf16 | fp16")
    ] = "auto",
    batch_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of a batch.", show_default="as many as memory allows"),
    ] = None,
    nproc: Annotated[
        int, typer.Option(help="Processes that share the work, one a GPU, by torchrun.")
    ] = 1,
    output: Output = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Do not go on with an interrupted calibration.")
    ] = False,
    seed: int = 0,
    as_json: AsJson = False,
    debug: Debug = False,
) -> Result:
    """Measure which units matter and fit the predictors."""
    from shadowc.calibration.ranks import joined, launch, launched

    rank, processes, local = launched()
    if nproc < 1:
        raise OptionError("--nproc is out of range", expected="at least 1", got=nproc)
    if nproc > 1 and processes == 1:
        raise typer.Exit(launch(nproc, sys.argv[1:]))
    with _busy(f"loading {model}"):
        from shadowc.calibration.data import calibration_examples
        from shadowc.calibration.fit import FitOptions, forget
        from shadowc.calibration.fit import calibrate as fit
        from shadowc.calibration.progress import peak_memory, showing
        from shadowc.calibration.store import JSON_FILE, save_calibration
        from shadowc.directory import check_target, only_one
        from shadowc.models import load_model, slug

        options = FitOptions(
            (criterion,), predictor or "", feature, rank=rank_, seed=seed, every=taps, fit=how,
            refresh=_refresh(refresh), batch_tokens=batch_tokens,
        )  # fmt: skip
        kind = config.predictor_name(options.predictor, taps, how, options.refresh)
        target = output or CALIBRATIONS / "-".join([slug(model), criterion, *kind])
        check_target(target, marker=JSON_FILE, error=CalibrationError)
        place = _device(device, local)
        if place == "auto" and processes > 1:
            raise OptionError(
                "--device all deals one model out to all GPUs: there is none left for others",
                expected="either --device all or several processes",
                got=f"{processes} processes",
            )
        if dtype == "auto":
            dtype = "fp32" if place == "cpu" else "bf16"
        _choice("dtype", dtype, tuple(DTYPES))
        loaded = load_model(model, dtype=_torch_dtype(dtype), device=place)
        windows = calibration_examples(loaded, data, examples, seq_len, seed)
    state = target.with_name(f".{target.name}.unfinished")
    if state.exists() and not fresh:
        err.print("going on with the calibration that was interrupted here")
    alone = contextlib.nullcontext() if rank else only_one(target, error=CalibrationError)
    shown = showing("none" if rank else "json" if as_json else "bar")
    with alone, joined() as ranks, shown as progress:
        (calibration,) = fit(
            loaded, windows, options,
            data=data, progress=progress, checkpoint=state, fresh=fresh, ranks=ranks,
        )  # fmt: skip
        if not rank:
            save_calibration(calibration, target)
            forget(state)
    return {
        "output": str(target),
        "examples": calibration.examples,
        "tokens": calibration.tokens,
        "peak_memory_bytes": peak_memory(),
        "spearman_heads": None,  # a criterion without scores of single tokens has none
        "spearman_neurons": None,
        **calibration.metrics,
    }


# compile ------------------------------------------------------------------------------------------


def _show_compile(result: Result) -> None:
    out.print(
        f"{result['output']}: {result['head_sparsity']:.1%} of the heads and "
        f"{result['neuron_sparsity']:.1%} of the neurons do not run, "
        f"{result['weight_bytes_skipped']:.1%} of the layers' weight bytes are not read"
    )
    out.print(
        f"checked: logits within {result['max_abs_error']:.2g} of the masked program "
        f"(tolerance {result['tolerance']:.2g})"
    )
    if "greedy_tokens" in result:
        equal, tokens = result["greedy_tokens_equal"], result["greedy_tokens"]
        out.print(f"checked: {equal} of {tokens} greedy tokens are those of the masked program")
    out.print(f"next: shadowc run {result['output']} --prompt 'It was'")


@command("compile", _show_compile, "shadowc compile --target cpu --sparsity 0.5")
def compile_(
    calibration: Annotated[
        Path | None,
        typer.Argument(help=f"What calibrate wrote; default: the newest in {CALIBRATIONS}/."),
    ] = None,
    target: Annotated[str, typer.Option(help="See: shadowc targets.")] = "cpu",
    sparsity: Annotated[
        float | None,
        typer.Option(help="Share of heads and of neurons that do not run (default 0.5)."),
    ] = None,
    head_sparsity: Annotated[float | None, typer.Option(help="The heads' share alone.")] = None,
    neuron_sparsity: Annotated[float | None, typer.Option(help="The neurons' share alone.")] = None,
    budget: Annotated[
        str, typer.Option(help="What --sparsity counts: units | bytes (not read).")
    ] = "units",
    max_ppl_increase: Annotated[
        str | None,
        typer.Option(help="Instead of --sparsity: as many bytes as cost at most this, e.g. 2%."),
    ] = None,
    scope: Annotated[str, typer.Option(help=" | ".join(config.SCOPES))] = "global",
    refresh: Annotated[
        str | None,
        typer.Option(help="New masks each: token | prompt | n (default: as calibrated)."),
    ] = None,
    selection: Annotated[
        str | None,
        typer.Option(
            help=" | ".join(config.SELECTIONS) + " (default: threshold; topk with one predictor)."
        ),
    ] = None,
    predictor: Annotated[
        str | None, typer.Option(help="static: use the mean scores instead of the predictor.")
    ] = None,
    max_seq_len: Annotated[
        int | None, typer.Option(help="Prompt and generation; default: the model's limit.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="auto (the checkpoint's half type, or bf16) | fp32 | bf16 | fp16")
    ] = "auto",
    batch_sizes: Annotated[
        str, typer.Option(help="Batches that CUDA targets decode, each with kernels of its own.")
    ] = "1,2,4,8",
    lazy_kv: Annotated[
        bool,
        typer.Option(
            "--lazy-kv/--no-lazy-kv",
            help="Leave keys and values of skipped heads to later (CUDA targets, batch 1).",
        ),
    ] = False,
    dense_from_batch: Annotated[
        int | None,
        typer.Option(
            help="CUDA: batches from this size on skip nothing; 0: never.",
            show_default="as measured on the GPU",
        ),
    ] = None,
    aot_inductor: Annotated[
        bool,
        typer.Option(
            "--aot-inductor",
            help="Also write packages for C++ without Python (cpu target; needs a C++ compiler).",
        ),
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="The model, where the calibration's name no longer finds it.")
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(help="Most bytes of weights in a file, such as 5GB or 500MB.")
    ] = "5GB",
    dump: Annotated[Path | None, typer.Option(help="Write the graph after each pass.")] = None,
    output: Output = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> Result:
    """Compile a model with a calibration into an artifact."""
    most = _percentage(max_ppl_increase)
    if most is not None and (sparsity, head_sparsity, neuron_sparsity) != (None, None, None):
        raise OptionError(
            "--max-ppl-increase excludes --sparsity, --head-sparsity and --neuron-sparsity",
            expected="one way to say how much to skip",
        )
    if (most is not None or budget == "bytes") and (scope != "global" or selection == "topk"):
        raise OptionError(
            "a budget of bytes chooses by thresholds, with a share for each layer",
            expected="neither --scope local nor --selection topk with it",
            got=f"--scope {scope} --selection {selection or 'threshold'}",
        )
    policy = _policy(sparsity, head_sparsity, neuron_sparsity, budget, scope, refresh)
    _choice("dtype", dtype, ("auto", *DTYPES))
    _choice("predictor", predictor or "static", ("static",))
    _choice("selection", selection or "topk", config.SELECTIONS)
    batches = _batch_sizes(batch_sizes)
    shard = _bytes("--max-shard-size", max_shard_size)
    with _busy("loading"):
        from shadowc import budget as budgets
        from shadowc import compiler, targets
        from shadowc.artifact import MANIFEST
        from shadowc.calibration.store import load_calibration
        from shadowc.directory import check_target, only_one
        from shadowc.models import load_model, slug
        from shadowc.selection import default_selection

        targets.load_target(target, lazy_kv=lazy_kv)
        dense = policy.head_sparsity == policy.neuron_sparsity == 0 and budget == "units"
        chosen: Calibration | None = None
        if calibration is not None or not (dense and model):
            path = calibration or _newest_calibration()
            chosen = load_calibration(path)
            if calibration is None:
                err.print(f"using {path}, the newest calibration here")
        if chosen is not None and predictor == "static":
            chosen = chosen.static()
        if chosen is not None:
            usual = default_selection(len(chosen.taps))
            policy = replace(policy, selection=selection or usual)
            if refresh is None:
                policy = replace(policy, refresh=chosen.refresh)
        name = model or (chosen.model["name"] if chosen else "")
        loaded = load_model(name) if most is not None else None
        if chosen is not None and loaded is not None and most is not None:
            policy = _within(loaded, chosen, policy, most, target)
        elif chosen is not None and budget == "bytes":
            policy = budgets.allot(chosen, policy.head_sparsity, policy)
        if output is None:
            parts = [slug(name)]
            if chosen is not None and not dense:
                parts += [chosen.criterion, *chosen.kind]
            parts += _policy_name(policy, budget, sparsity) if most is None else [f"ppl{most:.3g}"]
            parts += [policy.selection] * (selection is not None and not dense)
            output = ARTIFACTS / "-".join([*parts, *["lazy"] * lazy_kv, target])
        check_target(output, marker=MANIFEST, error=ArtifactError)
        loaded = loaded or load_model(name, dtype=_loaded_type(name, dtype))
        stored = _stored_type(loaded.source, dtype)
    with only_one(output, error=ArtifactError), _compiling(name) as progress:
        artifact = compiler.compile_model(
            loaded,
            None if dense else chosen,
            policy,
            output,
            target=target,
            dtype=stored,
            max_seq_len=max_seq_len,
            batch_sizes=batches,
            lazy_kv=lazy_kv,
            dense_from_batch=dense_from_batch,
            aot_inductor=aot_inductor,
            extra={"budget": {"kind": budget, "sparsity": sparsity, "max_ppl_increase": most}},
            dump=dump,
            max_shard_size=shard,
            progress=progress,
        )
    return {"output": str(output), "target": target, **artifact.report()["compile"]}


def _batch_sizes(text: str) -> tuple[int, ...]:
    found = tuple(int(part) for part in _split(text) if part.isascii() and part.isdigit())
    if len(found) != len(_split(text)) or not found or not all(1 <= n <= 16 for n in found):
        raise OptionError(
            f"--batch-sizes {text!r} is not understood",
            expected="numbers from 1 to 16, such as 1,2,4,8",
        )
    return found


def _bytes(option: str, text: str) -> int:
    """`5GB` as a number."""
    units = {"": 1, "B": 1} | {f"{unit}B": 1000**i for i, unit in enumerate("KMGT", start=1)}
    units |= {f"{unit}IB": 1024**i for i, unit in enumerate("KMGT", start=1)}
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([A-Z]*)", text.strip().upper(), re.ASCII)
    size = int(float(found[1]) * units.get(found[2], 0)) if found else 0
    if size < 1:
        raise OptionError(
            f"{option} is not a size", expected="such as 5GB, 500MB or 2GiB", got=repr(text)
        )
    return size


def _policy(
    sparsity: float | None,
    heads: float | None,
    neurons: float | None,
    budget: str,
    scope: str,
    refresh: str | None,
) -> Policy:
    _choice("budget", budget, config.BUDGETS)
    if heads is not None or neurons is not None:
        if sparsity is not None or budget == "bytes":
            raise OptionError(
                "--head-sparsity and --neuron-sparsity exclude --sparsity and --budget bytes",
                expected="one way to say how much to skip",
            )
    else:
        heads = neurons = 0.5 if sparsity is None else sparsity
    every = 1 if refresh is None else _refresh(refresh)
    return config.Policy(heads or 0.0, neurons or 0.0, scope=scope, refresh=every)


def _refresh(text: str) -> int:
    """As in `Policy`."""
    every = REFRESH.get(text, -1)
    if every < 0 and text.isascii() and text.isdigit():
        every = int(text) or -1
    if every < 0:
        raise OptionError(
            f"refresh {text!r} is unknown", expected="token, prompt or a number of tokens"
        )
    return every


def _percentage(text: str | None) -> float | None:
    """`2%` or `0.02` as a fraction."""
    if text is None:
        return None
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise OptionError(
            "--max-ppl-increase is not a share", expected="such as 2% or 0.02", got=text
        )
    return value


def _within(
    loaded: LoadedModel, chosen: Calibration, policy: Policy, most: float, target: str
) -> Policy:
    """Search the largest byte budget within a bound on perplexity."""
    from shadowc.calibration.data import evaluation_windows
    from shadowc.evaluation.within import largest_budget

    length = min(256, loaded.shape.max_positions)
    windows = evaluation_windows(loaded, chosen.data, length, 4096, calibrated_on=chosen.data)

    def report(fraction: float, increase: float) -> None:
        err.print(f"{fraction:.1%} of the bytes not read: perplexity {increase:+.2%}")

    found = largest_budget(loaded, chosen, policy, most, windows, target=target, report=report)
    err.print(f"within {most:.2%}: {found.fraction:.1%} of the layers' bytes are not read")
    return found.policy


def _policy_name(policy: Policy, budget: str, sparsity: float | None) -> list[str]:
    """The parts of a default output's name that tell policies apart."""
    heads, neurons = (f"{100 * s:.3g}".zfill(2) for s in (policy.head_sparsity,
                                                           policy.neuron_sparsity))  # fmt: skip
    if budget == "bytes":
        name = f"b{100 * (0.5 if sparsity is None else sparsity):02.3g}"
    else:
        name = f"s{heads}" if heads == neurons else f"h{heads}-n{neurons}"
    refresh = {0: ["prompt"], 1: []}.get(policy.refresh, [f"every{policy.refresh}"])
    return [name, *(["local"] if policy.scope == "local" else []), *refresh]


def _newest_calibration() -> Path:
    from shadowc.calibration.store import JSON_FILE

    found = sorted(CALIBRATIONS.glob(f"*/{JSON_FILE}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise CalibrationError(
            f"there is no calibration in {CALIBRATIONS}/",
            fix="run: shadowc calibrate MODEL; or name the directory of one",
        )
    return found[-1].parent


def _loaded_type(name: str, dtype: str) -> torch.dtype | None:
    """That of the files, which stay where they are; random weights have none: as stored."""
    import torch

    if not name.startswith("random:"):
        return None
    chosen: torch.dtype = getattr(torch, DTYPES.get(dtype, "bfloat16"))
    return chosen


def _stored_type(source: ModelSource, dtype: str) -> torch.dtype:
    """The type of the artifact's matrices; `auto` is the checkpoint's if it is a half type."""
    import torch

    if dtype != "auto":
        chosen: torch.dtype = getattr(torch, DTYPES[dtype])
        return chosen
    settings: Result = {}
    with contextlib.suppress(OSError, ValueError):
        settings = json.loads((Path(source.path or "") / "config.json").read_text())
    stored = settings.get("dtype") or settings.get("torch_dtype")
    return torch.float16 if stored == "float16" else torch.bfloat16


# run ----------------------------------------------------------------------------------------------


def _show_run(result: Result) -> None:
    ms, policy = result["ms_per_token"], result["policy_in_effect"]
    err.print(f"{result['tokens']} tokens, {ms:.2f} ms a token, {policy}")


@command(
    "run",
    _show_run,
    "shadowc run artifacts/opt-books-15m-plainact-s50-cpu --prompt 'It was'",
)
def run(
    artifact: ArtifactPath,
    prompt: Annotated[str, typer.Option(help="Text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: int = 0,
    probe_every: ProbeEvery = 0,
    probe_alarm: ProbeAlarm = None,
    check_finite: Annotated[
        bool,
        typer.Option("--check-finite", help="Stop where numbers overflow, and name the layer."),
    ] = False,
    allow_jit: AllowJit = False,
    no_native: NoNative = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> Result:
    """Generate text, streamed."""
    with _busy("loading"):
        from shadowc.runtime.loading import load
        from shadowc.runtime.streaming import generate

        model = load(
            artifact, allow_jit=allow_jit, probe_every=probe_every, probe_alarm=probe_alarm,
            check_finite=check_finite,
        )  # fmt: skip
    show = None if as_json else functools.partial(print, end="", flush=True)
    result = generate(
        model, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, show=show
    )
    if show:
        show("\n")
    return result | {"counters": model.counters()}


@app.command(
    "serve",
    epilog="Example: shadowc serve artifacts/opt-books-15m-plainact-s50-cpu --port 8000",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def serve(
    context: typer.Context,
    artifact: ArtifactPath,
    probe_every: ProbeEvery = None,
    probe_alarm: ProbeAlarm = None,
    no_native: NoNative = False,
    debug: Debug = False,
) -> None:
    """Serve OpenAI's API with transformers' own server, whose options it takes."""
    with _reported(debug), _interruptible(debug):
        from shadowc.runtime.serve import serve as run_server

        run_server(str(artifact), context.args, probe_every, probe_alarm)


# eval ---------------------------------------------------------------------------------------------


def _show_eval(result: Result) -> None:
    if result.get("kind") == "sweep":
        return _show_sweep(result)
    table = _table("masks", "perplexity", "word perplexity", "heads skipped", "neurons skipped")
    for name, value in result["variants"].items():
        table.add_row(
            name,
            _perplexity(value["perplexity"]),
            _perplexity(value.get("word_perplexity")),
            f"{value['head_sparsity']:.1%}",
            f"{value['neuron_sparsity']:.1%}",
        )
    out.print(table)
    for name, value in result["tasks"].items():
        asked = f"{value['questions']} questions, {result['num_fewshot']} shots, {value['scorer']}"
        if value["accuracy"] is None:
            both = ((key, value["dense_metrics"][key]) for key in value["metrics"])
            shown = (f"{key} {value['metrics'][key]:.4g}, dense {of:.4g}" for key, of in both)
            out.print(f"{name}: {'; '.join(shown)} ({asked})")
        else:
            out.print(
                f"{name}: {value['accuracy']:.1%} right, dense {value['dense_accuracy']:.1%} "
                f"({asked})"
            )
    if found := result["generation"]:
        out.print(
            f"{found['new_tokens']} tokens generated after each of {found['prompts']} prompts: "
            f"{found['equal_tokens']:.1%} are those of dense, the first "
            f"{found['first_divergence']:.1f} without a difference; perplexity under dense "
            f"{_perplexity(found['perplexity'])}, of its own text "
            f"{_perplexity(found['dense_perplexity'])}"
        )
    out.print(f"{result['tokens']} tokens of {result['data']}, masks of each token are causal")


def _show_sweep(result: Result) -> None:
    methods = {name: points for name, points in result["methods"].items() if name != "dense"}
    table = _table("sparsity", *methods)
    for index, sparsity in enumerate(result["sparsities"]):
        row = (_perplexity(points[index]["perplexity"]) for points in methods.values())
        table.add_row(f"{sparsity:.0%}", *row)
    out.print(table)
    if "dense" in result["methods"]:
        out.print(f"dense: {_perplexity(result['methods']['dense'][0]['perplexity'])}")
    what = "neurons" if result["neurons_only"] else "heads and neurons"
    out.print(
        f"perplexity of {result['scored']} tokens of {result['data']}, sparsity of {what}; "
        f"{result['seconds']:.0f} s -> {result['output']}/report.html"
    )


@command(
    "eval",
    _show_eval,
    "shadowc eval artifacts/opt-books-15m-plainact-s50-cpu --against dense,static,random",
)
def eval_(
    artifact: Annotated[
        Path, typer.Argument(metavar="ARTIFACT|CALIBRATION", help="Of a calibration: a sweep.")
    ],
    data: Data = "pydoc",
    tasks: Annotated[
        str, typer.Option(help="Comma list of piqa, copa, rte, ... or TASK:FILE.jsonl.")
    ] = "",
    against: Annotated[
        str | None,
        typer.Option(
            help="Comma list of dense, static, random, oracle; in a sweep layerwise too.",
            show_default="dense; all of them in a sweep",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=3, help="About how many tokens to score.")] = 8192,
    seq_len: Annotated[int, typer.Option(min=3, help="Tokens of a window.")] = 256,
    stride: Annotated[
        int | None,
        typer.Option(
            help="New tokens of a window, the rest is context.", show_default="no overlap"
        ),
    ] = None,
    questions: Annotated[int, typer.Option(min=1, help="Questions of each task.")] = 100,
    num_fewshot: Annotated[int, typer.Option(help="Answered questions before each.")] = 0,
    harness: Annotated[
        bool,
        typer.Option("--harness", help="Let lm-evaluation-harness put the tasks; it knows more."),
    ] = False,
    generate: Annotated[
        int, typer.Option(min=0, help="Also generate so many tokens beside dense, greedily.")
    ] = 0,
    sparsities: Annotated[
        str | None, typer.Option(help="Sweep: comma list.", show_default="0.1,0.2, ... 0.9")
    ] = None,
    neurons_only: Annotated[
        bool, typer.Option("--neurons-only", help="Sweep: skip no heads.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Sweep: start over.")] = False,
    seed: Annotated[int, typer.Option(help="Sweep: of random masks.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option(help="Sweep: where to write.", show_default="CALIBRATION/eval"),
    ] = None,
    allow_jit: AllowJit = False,
    no_native: NoNative = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> Result:
    """Measure quality: causal perplexity, tasks and generation, beside the dense model.

    Of a calibration: the perplexity of every way to choose units at every sparsity, with a report
    in pictures. The same command goes on where an interrupted one stopped.
    """
    with _busy("loading"):
        from shadowc.artifact import open_artifact
        from shadowc.calibration.store import JSON_FILE
        from shadowc.evaluation.perplexity import evaluate_artifact
        from shadowc.evaluation.report import save_section
    if (artifact / JSON_FILE).exists():
        if tasks:
            raise OptionError(
                "--tasks does not apply to a calibration", expected="--tasks with an artifact"
            )
        settings = dict(data=data, tokens=tokens, seq_len=seq_len, neurons_only=neurons_only)
        return _sweep(artifact, against, sparsities, output, fresh, seed=seed, **settings)
    if sparsities is not None or neurons_only or fresh or output is not None:
        raise OptionError(
            "--sparsities, --neurons-only, --fresh and --output are those of a sweep",
            expected="a calibration",
            got=artifact,
        )
    with _busy("verifying"):
        opened = open_artifact(artifact)
    with _progress() as progress:
        result = evaluate_artifact(
            opened,
            data=data,
            seq_len=seq_len,
            stride=stride,
            tokens=tokens,
            against=_split("dense" if against is None else against),
            tasks=_split(tasks),
            questions=questions,
            num_fewshot=num_fewshot,
            harness=harness,
            generate=generate,
            allow_jit=allow_jit,
            track=functools.partial(progress.track, description="scoring"),
        )
    _save(save_section, opened, "eval", result)
    return result


@app.command(
    "lm-eval",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness's command line, which then knows --model shadowc."""
    with _reported(debug=False), _interruptible(debug=False):
        from shadowc.evaluation.lm_eval import main as run_harness

        run_harness(context.args)


def _sweep(
    path: Path,
    against: str | None,
    sparsities: str | None,
    output: Path | None,
    fresh: bool,
    **settings: Any,
) -> Result:
    """Every way to choose units at every sparsity."""
    if against is not None:
        settings["against"] = _split(against)
    if sparsities is not None:
        settings["sparsities"] = _numbers("--sparsities", sparsities)
    with _busy("loading"):
        from shadowc.calibration.store import JSON_FILE, load_calibration
        from shadowc.evaluation.report import save_sweep
        from shadowc.evaluation.sweep import Options, sweep
        from shadowc.models import load_model

        options = Options(**settings)
        calibration = load_calibration(path)
        target = output or path / ("eval-neurons" if options.neurons_only else "eval")
        loaded = load_model(calibration.model["name"])
    began, bar = time.monotonic(), _progress()
    task = bar.add_task("scoring", total=None)

    def show(done: int, total: int) -> None:
        bar.start()  # not earlier: fitting has a bar of its own
        bar.update(task, completed=done, total=total)

    try:
        result = sweep(
            loaded, calibration, path / JSON_FILE, target, options, fresh=fresh, progress=show
        )
    except KeyboardInterrupt:
        again = shlex.join(word for word in sys.argv[1:] if word != "--fresh")
        err.print(f"what was scored is kept; to go on: shadowc {again}")
        raise
    finally:
        bar.stop()
    save_sweep(result, target)
    return {**result, "output": str(target), "seconds": round(time.monotonic() - began, 1)}


def _numbers(option: str, text: str) -> tuple[float, ...]:
    """A comma list of numbers, ascending, each once."""
    try:
        return tuple(sorted({float(part) for part in _split(text)}))
    except ValueError as error:
        raise OptionError(
            f"{option} {text!r} is not understood", expected="numbers, such as 0.1,0.5,0.9"
        ) from error


# bench --------------------------------------------------------------------------------------------


def _show_bench(result: Result) -> None:
    batch, shared = result["batch"], result["rows_share_bytes"]
    unit = "token" if batch == 1 else "step"
    read_by = unit if shared else "token"
    table = _table(
        f"decode, batch {batch}", f"ms a {unit}", "of artifact",
        f"MB a {read_by}",
    )  # fmt: skip
    names = {
        "artifact": f"artifact, {result['policy_in_effect']}",
        "dense": "dense, same runtime",
        "dense_by_kernels": "  by our own kernels",
        "dense_by_library": "  by cuBLAS",
        "exact": "exact (zero rows skipped)",
        "static": "static (mean scores)",
        "dejavu": "dejavu (random, speed only)",
        "hugging_face": "Hugging Face eager",
        "hugging_face_fp32": "Hugging Face eager, fp32",
        "hugging_face_compiled": "Hugging Face compiled",
    }
    for name, found in result["variants"].items():
        read = "-" if found["bytes"] is None else f"{found['bytes'] / 1e6:.1f}"
        ms, ratio = found["ms_per_step"], found["beside_artifact"]
        table.add_row(names[name], f"{ms:.2f}", f"{ratio:.2f}x", read)
    out.print(table)
    if batch > 1:
        out.print(
            f"a step gives {batch} tokens: {result['ms_per_generated_token']:.3f} ms each; "
            f"{result['neurons_read_share']:.1%} of the neurons are read"
            + (" by any row" if shared else " by a row")
        )
    if result["hugging_face_compile_seconds"] is not None:
        out.print(
            f"transformers took {result['hugging_face_compile_seconds']:.0f} s to compile first"
        )
    for name, reason in result["left_out"].items():
        out.print(f"{name} was left out: {reason}")
    if result["random_weights"]:
        out.print("random weights: the speed means something, the text does not")
    out.print(
        f"weights read a {read_by}: {result['bytes_per_token'] / 1e6:.1f} MB of "
        f"{result['dense_bytes_per_token'] / 1e6:.1f} MB; "
        f"{result['bandwidth_share']:.0%} of the memory's {result['read_bandwidth'] / 1e9:.1f} GB/s"
        f" (dense {result['dense_bandwidth_share']:.0%})"
    )
    if result["selection_ms"] is not None:
        out.print(
            f"predictor and selection: {result['selection_ms']:.3f} ms, "
            f"{result['selection_share_of_dense']:.1%} of a dense step"
        )
    out.print(
        f"peak memory: {result['peak_memory_bytes'] / 1e6:.0f} MB, "
        f"{result['peak_memory_above_start_bytes'] / 1e6:.0f} MB more than before loading "
        f"(weights {result['weights_bytes'] / 1e6:.0f} MB)"
    )
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    out.print(
        f"{result['device']}, {result['isa']}, {result['threads']} threads, {result['dtype']}; "
        f"prompt {result['prompt_len']}, {result['new_tokens']} new tokens; {versions}"
    )


@command("bench", _show_bench, "shadowc bench artifacts/opt-books-15m-plainact-s50-cpu")
def bench(
    artifact: ArtifactPath,
    prompt_len: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode.")] = 128,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    against: Annotated[
        str | None,
        typer.Option(
            help="Comma list of dense, exact, static, dejavu, hf, hf-compiled (compiles for "
            "minutes).",
            show_default="dense,exact,hf where they apply",
        ),
    ] = None,
    data: Data = "pydoc",
    hugging_face: Annotated[bool, typer.Option(help="Also run the original model.")] = True,
    allow_jit: AllowJit = False,
    no_native: NoNative = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> Result:
    """Measure speed: the artifact beside its dense original."""
    with _busy("loading"):
        from shadowc.artifact import open_artifact
        from shadowc.evaluation.bench import bench as measure
        from shadowc.evaluation.report import save_section

        opened = open_artifact(artifact)
    with _progress() as progress:
        task = progress.add_task("decoding in turns", total=1.0)
        result = measure(
            opened,
            prompt_len=prompt_len,
            new_tokens=new_tokens,
            batch=batch,
            against=None if against is None else _split(against),
            data=data,
            hugging_face=hugging_face,
            allow_jit=allow_jit,
            progress=lambda share: progress.update(task, completed=share),
        )
    _save(save_section, opened, "bench", result)
    return result


# inspect, targets, criteria -----------------------------------------------------------------------


def _show_inspect(result: Result) -> None:
    for key, value in result.items():
        if not isinstance(value, dict | list):
            out.print(f"{key}: {value}")
    if "spearman_heads_by_layer" in result:
        _show_agreement(result)
    if "layers" not in result:
        return
    table = _table("layer", "heads", "neurons", "rows of the second projection")
    for index, (heads, neurons, rows) in enumerate(result["layers"]):
        table.add_row(str(index), f"{heads:.1f}", f"{neurons:.0f}", f"{rows:.0f}")
    out.print("mean of what ran while it was checked:")
    out.print(table)


def _show_agreement(result: Result) -> None:
    """What each layer's predicted scores have in common with the true ones."""
    names = ("spearman_heads", "recall_heads_50", "spearman_neurons", "recall_neurons_50")
    table = _table("layer", *(name.replace("_", " ") for name in names))
    columns = (result[f"{name}_by_layer"] for name in names)
    for index, values in enumerate(zip(*columns, strict=True)):
        table.add_row(str(index), *map(_number, values))
    out.print("held-out agreement with the true scores, within each layer:")
    out.print(table)


@command("inspect", _show_inspect, "shadowc inspect artifacts/opt-books-15m-plainact-s50-cpu")
def inspect(
    directory: Annotated[Path, typer.Argument(metavar="ARTIFACT|CALIBRATION")],
    as_json: AsJson = False,
    debug: Debug = False,
) -> Result:
    """Say what a directory is, after its hashes are verified."""
    with _busy("verifying"):
        from shadowc.artifact import MANIFEST, open_artifact
        from shadowc.calibration.store import JSON_FILE, load_calibration
        from shadowc.directory import recover
        from shadowc.evaluation.report import describe_artifact, describe_calibration

        recover(directory)
        if (directory / JSON_FILE).exists():
            return describe_calibration(load_calibration(directory), directory)
        if (directory / MANIFEST).exists():
            return describe_artifact(open_artifact(directory))
    raise ArtifactError(
        f"{directory} is neither an artifact nor a calibration",
        expected=f"a directory with {MANIFEST} or {JSON_FILE}",
    )


def _show_names(result: Result) -> None:
    (rows,) = result.values()
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*row.values())
    out.print(table)


@command("targets", _show_names, "shadowc targets")
def targets(as_json: AsJson = False, debug: Debug = False) -> Result:
    """List what can be compiled for."""
    from shadowc.targets import TARGETS, load_target

    known = {name: load_target(name).description for name in TARGETS}
    return {"targets": [{"target": name, "what": what} for name, what in known.items()]}


@command("criteria", _show_names, "shadowc criteria")
def criteria(as_json: AsJson = False, debug: Debug = False) -> Result:
    """List what can rank the units."""
    from shadowc.calibration.criteria import CRITERIA

    return {
        "criteria": [
            {
                "criterion": c.name,
                "of": "tokens" if c.per_token else "all data",
                "score": c.formula,
                "source": c.source,
            }
            for c in CRITERIA.values()
        ]
    }


# Shared -------------------------------------------------------------------------------------------


def _choice(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise OptionError(f"unknown {option} {value!r}", expected=", ".join(known), got=value)


def _split(names: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in names.split(",") if name.strip())


def _table(*columns: str) -> Table:
    table = Table()
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _perplexity(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 1e4 else f"{value:.1e}"


def _device(name: str, local: int) -> str:
    """What `load_model` takes: `cpu`, `cuda:N` or `auto` (all GPUs)."""
    import torch

    known = re.fullmatch(r"auto|cpu|all|cuda(:\d+)?", name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not known:
        raise OptionError(
            f"unknown device {name!r}", expected="auto, cpu, cuda, cuda:N or all", got=name
        )
    if name == "cpu" or (name == "auto" and not count):
        return "cpu"
    index = local if ":" not in name else int(name.split(":")[1])
    if index >= count:
        raise OptionError(
            f"there is no such GPU: {name}",
            expected=f"a GPU that torch sees: {count} with torch {torch.__version__}",
            got=f"GPU {index}",
            fix="fewer --nproc" if local else "--device cpu, or another number",
        )
    return "auto" if name == "all" else f"cuda:{index}"


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    found: torch.dtype = getattr(torch, DTYPES[name])
    return found


def _busy(doing: str) -> contextlib.AbstractContextManager[object]:
    """A spinner, or a line where there is no terminal."""
    if err.is_terminal:
        return err.status(doing)
    err.print(f"{doing} ...")
    return contextlib.nullcontext()


@contextlib.contextmanager
def _compiling(name: str) -> Iterator[Callable[[int, int], None]]:
    """A spinner, then a bar of the bytes that are written; lines where there is no terminal."""
    from rich import progress as bars

    began = said = time.monotonic()
    columns = (bars.SpinnerColumn(), bars.TextColumn("{task.description}"), bars.BarColumn(),
               bars.DownloadColumn(), bars.TransferSpeedColumn(),
               bars.TimeRemainingColumn())  # fmt: skip
    bar = bars.Progress(*columns, console=err, transient=True, disable=not err.is_terminal)
    task = bar.add_task(f"compiling {name}", total=None)

    def show(done: int, total: int) -> None:
        nonlocal said
        now, whole = time.monotonic(), done == total
        bar.update(task, description="checking" if whole else "writing", completed=done,
                   total=total)  # fmt: skip
        if not err.is_terminal and (whole or now - said > 5):
            said = now
            err.print(f"{done / 1e9:.2f} of {total / 1e9:.2f} GB written, {now - began:.0f} s")

    with bar:
        if not err.is_terminal:
            err.print(f"compiling {name} ...")
        yield show


def _progress() -> Any:
    from rich.progress import Progress

    return Progress(console=err, transient=True)


def _save(save: Callable[..., None], artifact: Any, section: str, result: Result) -> None:
    """Keep what was measured in the artifact's report, if it can be written."""
    try:
        save(artifact, section, result)
    except OSError as error:
        err.print(f"the report of {artifact.path} was not updated: {error.strerror}")
    except ArtifactError as error:
        err.print(f"the report was not updated: {error}")
