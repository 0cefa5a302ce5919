"""What is known of an artifact, for people: `inspect`, and the page `report.html`."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from shadowc.artifact import REPORT, Artifact, update_report
from shadowc.calibration.store import Calibration
from shadowc.directory import replace_text
from shadowc.evaluation import figures
from shadowc.foreign import damaged

HTML = "report.html"
_MALFORMED = (KeyError, TypeError, ValueError, AttributeError, ArithmeticError)
_COLORS = {"heads": "#3b6ea5", "neurons": "#6a9a3b"}


#: Times dense, above which nobody would run a model.
_NEAR = 4


def describe_artifact(artifact: Artifact) -> dict[str, Any]:
    """What an artifact is: the keys of `inspect --json`.

    Raises:
        ArtifactError: If its report lacks what `compile` writes.
    """
    try:
        return _described(artifact)
    except _MALFORMED as error:
        got = f"{type(error).__name__}: {error}"
        raise damaged(artifact.path / REPORT, "what compile writes", got) from error


def _described(artifact: Artifact) -> dict[str, Any]:
    manifest, report = artifact.manifest, artifact.report()
    calibration, compiled = manifest["calibration"] or {}, report["compile"]
    return {
        "path": str(artifact.path),
        "kind": "artifact",
        "model": manifest["model"]["name"],
        "random_weights": manifest["model"]["kind"] == "random",
        "fingerprint": manifest["model"]["fingerprint"],
        "target": manifest["target"],
        "dtype": manifest["dtype"],
        "max_seq_len": manifest["max_seq_len"],
        "lazy_kv": manifest.get("lazy_kv", False),
        "criterion": calibration.get("criterion"),
        "predictor": calibration.get("predictor"),
        "feature": calibration.get("feature"),
        "taps": calibration.get("taps"),
        "rank": calibration.get("rank"),
        "calibrated_on": calibration.get("data"),
        "scope": manifest["policy"]["scope"],
        "selection": manifest["policy"]["selection"],
        "refresh": manifest["policy"]["refresh"],
        "dense_from_batch": manifest.get("dense_from_batch"),
        "policy_in_effect": policy_in_effect(manifest),
        "head_sparsity": compiled["head_sparsity"],
        "neuron_sparsity": compiled["neuron_sparsity"],
        "weight_bytes_skipped": compiled["weight_bytes_skipped"],
        "max_abs_error": compiled["max_abs_error"],
        "bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
        "files_verified": len(manifest["files"]),
        "layers": layers(compiled),
        "measured": sorted(report),
        "versions": manifest["versions"],
    }


def policy_in_effect(manifest: Mapping[str, Any]) -> str:
    """What decodes batches of all sizes that an artifact was compiled for."""
    policy, least = manifest["policy"], manifest.get("dense_from_batch")
    if not (policy["head_sparsity"] or policy["neuron_sparsity"]):
        return "exact" if "programs/exact.json" in manifest["files"] else "dense"
    if least is None:
        return "sparse"
    return f"sparse; dense (batch >= {least}, program {manifest['dense_program']})"


def describe_calibration(calibration: Calibration, path: Path) -> dict[str, Any]:
    """What a calibration is: the keys of `inspect --json`."""
    summary = calibration.summary()
    model, metrics = summary.pop("model"), summary.pop("metrics")
    return {
        "path": str(path),
        "kind": "calibration",
        "model": model["name"],
        "fingerprint": model["fingerprint"],
        **summary,
        **metrics,
        "zero_activations": float(calibration.zero_rate.mean()),
    }


def layers(counts: Mapping[str, Any]) -> list[tuple[float, float, float]]:
    """Heads, neurons and rows of the second projection that ran in each layer, a token's mean."""
    names = ("heads_by_layer", "neurons_by_layer", "rows_by_layer")
    return list(zip(*(counts[name] for name in names), strict=True))


def save_section(artifact: Artifact, section: str, value: Mapping[str, Any]) -> None:
    """Add what was measured to the artifact's report, and draw the page again."""
    update_report(artifact, section, value, lambda changed: {HTML: render(changed)})


def render(artifact: Artifact) -> str:
    """One self-contained page: what the artifact is, its quality, its speed, its budgets.

    A section that is malformed is named and left out: the page is drawn when another one has
    just been measured and written.
    """
    report, shape = artifact.report(), artifact.manifest["shape"]
    facts = {k: v for k, v in describe_artifact(artifact).items() if _is_plain(v)}
    parts = [f"<h1>{_text(artifact.path.name)}</h1>", _pairs(facts)]
    sections = (
        ("eval", "eval", _quality),
        ("bench", "bench", _speed),
        ("bench" if "bench" in report else "compile", "layers", partial(_units, shape)),
    )
    for name, what, draw in sections:
        if name in report:
            try:
                parts += draw(report[name])
            except _MALFORMED:
                parts.append(f"<p>What the report says of {what} is malformed.</p>")
    return _PAGE.format(title=_text(artifact.path.name), style="", body="\n".join(parts))


def _quality(found: Mapping[str, Any]) -> list[str]:
    """Perplexities, as `eval` measured them."""
    quality = [
        (name, f"{v['perplexity']:.2f}", _number(v.get("word_perplexity")),
         _percent(v["head_sparsity"]), _percent(v["neuron_sparsity"]))
        for name, v in found["variants"].items()
    ]  # fmt: skip
    head = ("masks", "perplexity", "word perplexity", "heads skipped", "neurons skipped")
    return [
        "<h2>Quality</h2>",
        _table(head, quality),
        f"<p>{_text(found['tokens'])} tokens of {_text(found['data'])}, windows of "
        f"{_text(found['seq_len'])}, causal masks.</p>",
    ]


def _speed(found: Mapping[str, Any]) -> list[str]:
    """Times of a token, as `bench` measured them."""
    dense = found["dense_ms_per_token"]
    names = {
        "artifact": "ms_per_token",
        "exact": "exact_ms_per_token",
        "dense, same runtime": "dense_ms_per_token",
        "static": "static_ms_per_token",
        "DejaVu's predictors, random weights": "dejavu_ms_per_token",
        "Hugging Face eager": "hugging_face_ms_per_token",
        "Hugging Face eager, fp32": "hugging_face_fp32_ms_per_token",
        "Hugging Face compiled": "hugging_face_compiled_ms_per_token",
    }
    speed = [
        (name, f"{found[key]:.2f}", f"{found[key] / dense:.2f}")
        for name, key in names.items()
        if found.get(key) is not None
    ]
    return [
        "<h2>Speed</h2>",
        _table(("decode", "ms a token", "beside dense"), speed),
        f"<p>{_text(found['device'])}, {_text(found['isa'])}, {_text(found['threads'])} threads, "
        f"batch {_text(found['batch'])}, {_text(found['dtype'])}; {found['bytes_per_token']:,} "
        f"bytes of weights a token, dense {found['dense_bytes_per_token']:,}.</p>",
    ]


def _units(shape: Mapping[str, int], found: Mapping[str, Any]) -> list[str]:
    """What ran in each layer."""
    ran = layers(found)
    return [
        "<h2>What runs in each layer</h2>",
        "<p>Mean share of the units that a token runs.</p>",
        _bars("heads", [row[0] / shape["heads"] for row in ran]),
        _bars("neurons", [row[1] / shape["ffn"] for row in ran]),
    ]


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto }}
table {{ border-collapse: collapse }} td, th {{ padding: .15rem 1rem .15rem 0; text-align: left }}
th {{ border-bottom: 1px solid #999 }} svg text {{ font: 10px system-ui, sans-serif }}
{style}</style></head><body>
{body}
</body></html>
"""


def _bars(name: str, shares: Sequence[float]) -> str:
    """A bar chart, a bar a layer, each from 0 to 1."""
    step, height = 22, 80
    bars = []
    for layer, share in enumerate(shares):
        x, size = 60 + layer * step, round(share * height, 1)
        bars.append(
            f'<rect x="{x}" y="{10 + height - size}" width="{step - 6}" height="{size}" '
            f'fill="{_COLORS[name]}"><title>layer {layer}: {share:.1%}</title></rect>'
            f'<text x="{x + (step - 6) / 2}" y="{height + 22}" text-anchor="middle">{layer}</text>'
        )
    width = 60 + step * len(shares)
    return (
        f'<svg width="{width}" height="{height + 28}" role="img" aria-label="{name} by layer">'
        f'<text x="0" y="{height / 2 + 10}">{name}</text>'
        f'<line x1="58" y1="10" x2="{width}" y2="10" stroke="#ccc"/>{"".join(bars)}</svg>'
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    def line(cells: Sequence[object], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(head, "th") + "".join(line(row, "td") for row in rows) + "</table>"


def _pairs(values: Mapping[str, object]) -> str:
    return _table(("", ""), [(key.replace("_", " "), value) for key, value in values.items()])


def _is_plain(value: object) -> bool:
    return value is not None and not isinstance(value, dict | list)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _text(value: object) -> str:
    return html.escape(value if isinstance(value, str) else json.dumps(value))


def save_sweep(result: Mapping[str, Any], directory: Path) -> None:
    """Draw the page of a sweep beside its numbers."""
    replace_text(directory / HTML, render_sweep(result))


def render_sweep(result: Mapping[str, Any]) -> str:
    """One self-contained page of a sweep: its pictures, then the numbers behind them."""
    methods = {name: points for name, points in result["methods"].items() if name != "dense"}
    title = f"{result['model']}, {result['criterion']}: quality over sparsity"
    facts = {key: value for key, value in result.items() if _is_plain(value)}
    rows = [
        (name, _percent(p["sparsity"]), f"{p['perplexity']:.2f}", _percent(p["head_sparsity"]),
         _percent(p["neuron_sparsity"]), _percent(p["weight_bytes_skipped"]))
        for name, points in result["methods"].items()
        for p in points
    ]  # fmt: skip
    head = ("masks", "asked for", "perplexity", "heads skipped", "neurons skipped", "bytes skipped")
    parts = [
        f"<h1>{_text(title)}</h1>",
        *_perplexity_figures(result, methods),
        _correlation_figure(result),
        *([_budget_figure(result, methods)] if methods else []),
        _context_figure(result),
        "<h2>Numbers</h2>",
        _table(head, rows),
        "<h2>What was measured</h2>",
        _pairs({**facts, **{f"{k} version": v for k, v in result["versions"].items()}}),
    ]
    return _PAGE.format(title=_text(title), style=figures.STYLE, body="\n".join(parts))


def _perplexity_figures(
    result: Mapping[str, Any], methods: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[str]:
    """Perplexity over sparsity, and over bytes; a second time where it is of use."""
    dense = result["methods"].get("dense")
    levels = {"dense": dense[0]["perplexity"]} if dense else {}
    units = "neurons" if result["neurons_only"] else "heads and neurons"

    def pictures(key: str, label: str) -> list[str]:
        whole = {
            name: sorted((p[key], p["perplexity"]) for p in points)
            for name, points in methods.items()
        }
        most = _NEAR * levels.get("dense", math.inf)
        near = {name: [p for p in line if p[1] <= most] for name, line in whole.items()}
        near = {name: line for name, line in near.items() if len(line) > 1}
        drawn = []
        for lines, note in ((whole, ""), (near, f", up to {_NEAR} times dense")):
            if note and lines in ({}, whole):
                continue
            points = [point for line in lines.values() for point in line]
            x = figures.linear(label, [x for x, _ in points] or [0.0, 1.0], figures.percent)
            values = [*levels.values(), *(y for _, y in points)]
            y = figures.logarithmic(f"perplexity (log{note})", values)
            drawn.append(figures.curves(f"perplexity over {label}", lines, x, y, levels=levels))
        return drawn

    return [
        figures.figure(
            "Perplexity over sparsity",
            f"{result['scored']:,} tokens of {result['data']}; every token has its own causal "
            f"mask. Sparsity is the share of all {units} that does not run, as far as the model "
            "can go: each layer keeps a few, and layer 0 all of its heads.",
            *pictures("sparsity", f"sparsity of {units}"),
        ),
        figures.figure(
            "Perplexity over bytes",
            "The same runs. A predictor's own bytes count against it; rows of exactly zero "
            "activations are not read either, except by dense. What static, random and oracle "
            "take to choose is not counted: the first is nothing, the others cannot be had.",
            *pictures(
                "weight_bytes_skipped", "weight bytes of the layers that a token does not read"
            ),
        ),
    ]


def _correlation_figure(result: Mapping[str, Any]) -> str:
    """Predicted against true scores, layer by layer."""
    found = result["rank_correlation"]
    layers = range(len(result["head_rank_variance"]))
    pictures = []
    for kind in ("heads", "neurons") if found else ():
        lines = {
            name: [(float(i), value) for i, value in enumerate(kinds[kind]) if value is not None]
            for name, kinds in found.items()
        }
        values = [value for line in lines.values() for _, value in line]
        step = max(1, -(-len(layers) // 12))
        x = figures.Axis(
            f"layer ({kind})", [float(i) for i in layers[::step]], figures.number,
            ends=(-0.3, len(layers) - 0.7),
        )  # fmt: skip
        y = figures.linear("rank correlation", [0.0, 1.0, *values])
        name = f"rank correlation of {kind} by layer"
        pictures.append(figures.curves(name, lines, x, y, height=260))
    return figures.figure(
        "How well scores are predicted",
        f"Spearman's rank correlation of predicted with true scores among the units of a layer, "
        f"the mean over {result['compared_tokens']:,} tokens of the scored text, nothing skipped. "
        "Layer 0's heads always run, so nobody predicts them."
        + ("" if found else " This calibration has no predictor."),
        *pictures,
    )


def _budget_figure(
    result: Mapping[str, Any], methods: Mapping[str, Sequence[Mapping[str, Any]]]
) -> str:
    """Where each way to choose spends its budget."""
    nearest = min(result["sparsities"], key=lambda s: abs(s - 0.5))
    at = result["sparsities"].index(nearest)
    layers = [str(i) for i in range(len(result["head_rank_variance"]))]
    pictures = [
        figures.heat_map(
            f"share of the {kind} that run, {nearest:.0%} asked to be skipped",
            list(methods),
            layers,
            [points[at][f"{kind}_by_layer"] for points in methods.values()],
            row_label="masks",
            column_label="layer",
            most=1.0,
            show=figures.whole_percent,
        )
        for kind in ("heads", "neurons")
    ]
    return figures.figure(
        "Budget of each layer",
        "Mean share of a layer's units that a token runs. One ranking over the whole model, or one "
        "set of thresholds, decides how many units each layer keeps. Units that tie (to the oracle "
        "all neurons that a ReLU made zero) go to the lowest layers.",
        *pictures,
    )


def _context_figure(result: Mapping[str, Any]) -> str:
    """How much the importance of each head depends on the context."""
    variance = result["head_rank_variance"]
    spread = [[value**0.5 for value in layer] for layer in variance]
    heads = len(variance[0])
    return figures.figure(
        "Context dependence of heads",
        f"Standard deviation, over {result['compared_tokens']:,} tokens, of a head's rank by true "
        f"score among all {heads * len(variance):,} heads. 0: equally important in every context, "
        "so that a fixed choice would do.",
        figures.heat_map(
            "standard deviation of a head's rank (ranks)",
            [str(i) for i in range(len(variance))],
            [str(i) for i in range(heads)],
            spread,
            row_label="layer",
            column_label="head",
            most=max(max(layer) for layer in spread),
            show=figures.tenths,
        ),
    )
