"""The tables of ShadowLLM (arXiv 2406.16635) for any model, with masks that are causal and run.

    python examples/reproduce_paper.py opt-1.3b --data wikitext2 --examples 512 --tokens 100000
    python examples/reproduce_paper.py opt-books-15m --data books.txt --tasks DIR --output paper

DIR holds piqa.jsonl, copa.jsonl and so on, with the fields of the hub's data sets; a task without a
file there is read from the hub. Writes paper.md, paper.json and, in a folder for each model, every
calibration and row as soon as it is there: the same command goes on after an interrupt, --fresh
starts over. A model is loaded in fp32, and what is measured holds its matrices once more.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from torch import fx

from shadowc.calibration import data
from shadowc.calibration.criteria import CRITERIA
from shadowc.calibration.fit import FitOptions, calibrate
from shadowc.calibration.progress import showing
from shadowc.calibration.store import Calibration, load_calibration, save_calibration
from shadowc.errors import DataError, OptionError, ShadowcError
from shadowc.evaluation.bench import device
from shadowc.evaluation.perplexity import accuracy, evaluate
from shadowc.evaluation.sweep import Options, State, masked_program, traced_graph
from shadowc.models import load_model, slug
from shadowc.runtime.session import Session
from shadowc.selection import default_selection
from shadowc.versions import versions

Row = dict[str, Any]

RANKED = ("plainact", "sens", "l2norm")  # what predictors are fitted to, in one pass
QUICK = {"examples": 6, "seq_len": 64, "tokens": 256, "questions": 4}
SHOTS = {"zero-shot": 0, "five-shot": 5}
RANKING = ("spearman_heads", "spearman_neurons", "recall_heads_50", "recall_neurons_50")


class Choice(NamedTuple):
    """A row: a way to choose units.

    `prompts` is what was calibrated on: `text`, or questions with their answers, `zero-shot` or
    `five-shot`. A global ranking of several predictors is one by thresholds.
    """

    label: str
    criterion: str = "plainact"
    predictor: str = "shadow"
    prompts: str = "text"
    scope: str = "global"
    sparsity: float = 0.5  # of heads and of neurons


class Table(NamedTuple):
    """A table: its title, what the paper found, and its rows."""

    title: str
    published: str
    rows: list[Choice]


DENSE = Choice("dense", sparsity=0.0)
# Another predictor is a name more in b, and a line more in e.
TABLES = {
    "a": Table(
        "Criteria, static pruning at 50%",
        "no figure at hand",
        [DENSE, *(Choice(name, name, "static") for name in CRITERIA)],
    ),
    "b": Table(
        "Ranking ability of predictors, and what it makes at 50%",
        "plainact, Spearman 0.92 (heads) and 0.66 (neurons)",
        [DENSE, *(Choice(f"{p}, {c}", c, p) for p in ("shadow", "layerwise") for c in RANKED)],
    ),
    "c": Table(
        "Global or local scope (shadow, plainact, 50%)",
        "OPT-1.3B, 30.7 (one ranking over scores that are normalised for each layer) against 41.8",
        [DENSE, *(Choice(scope, scope=scope) for scope in ("global", "local"))],
    ),
    "d": Table(
        "Calibration on text or on questions (shadow, plainact, 50%)",
        "no figure at hand",
        [DENSE, *(Choice(prompts, prompts=prompts) for prompts in ("text", *SHOTS))],
    ),
    "e": Table(
        "DejaVu-style (a predictor a layer, magnitude, local) or shadow (one, plainact, global)",
        "OPT-13B at 50%, WikiText-2, 13.90 a word (dense about 11.5); mean of the seven tasks "
        "61.2, DejaVu-style 58.3",
        [DENSE]
        + [
            one._replace(label=f"{sparsity:.0%}: {one.label}", sparsity=sparsity)
            for sparsity in (0.3, 0.5, 0.7)
            for one in (
                Choice("DejaVu-style", "l2norm", "layerwise", scope="local"),
                Choice("shadow, plainact, global"),
                Choice("layerwise, plainact, global", predictor="layerwise"),
            )
        ],
    ),
}


class Protocol:
    """One model with its text and questions; every calibration and row is made once."""

    def __init__(self, options: argparse.Namespace, name: str) -> None:
        self.options, self.loaded = options, load_model(name)
        self.shape = self.loaded.shape
        self.windows = data.evaluation_windows(
            self.loaded, options.data, options.seq_len, options.tokens, calibrated_on=options.data
        )
        self.tasks: dict[str, list[data.Question]] = {}
        self.missing: list[str] = []
        for task in data.TASKS:
            try:
                questions = data.load_questions(self.source(task), "evaluation")
                self.tasks[task] = questions[: options.questions]
            except DataError as error:
                if self.source(task) != task:  # a file that is not what it should be
                    raise
                self.missing.append(error.problem)
        asked = {task: [asdict(one) for one in some] for task, some in self.tasks.items()}
        self.about = {
            "model": name,
            "model_fingerprint": self.loaded.source.fingerprint,
            **{key: getattr(options, key) for key in ("data", "examples", "seq_len")},
            "questions": {task: len(some) for task, some in asked.items()},
            "scored": hashlib.sha256(json.dumps([self.windows, asked]).encode()).hexdigest(),
            "versions": versions(),
        }
        self.folder = options.output / slug(name)
        self.state = State(self.folder / "rows.jsonl", self.about, fresh=options.fresh)

    def source(self, task: str) -> str:
        """A task's file, or its name on the hub."""
        file = self.options.tasks and self.options.tasks / f"{task}.jsonl"
        return f"{task}:{file}" if file and file.exists() else task

    def examples(self, prompts: str) -> list[data.Example]:
        """Windows of text; or answered questions, the same whatever stands before them."""
        make, options, count = data.calibration_examples, self.options, self.options.examples
        if prompts == "text":
            return make(self.loaded, options.data, count, options.seq_len, seed=0)
        each, longest = -(-count // len(self.tasks)), min(1024, self.shape.max_positions)
        found = [
            make(self.loaded, self.source(task), each, longest, seed=0, shots=SHOTS[prompts])
            for task in self.tasks
        ]
        return [example for turn in zip(*found, strict=True) for example in turn][:count]

    def calibration(self, choice: Choice) -> Calibration:
        """Fit, with all criteria of the same pass, or read back."""
        predictor, prompts = choice.predictor, choice.prompts
        folder, kind = self.folder / "calibrations", f"{predictor}-{prompts}"

        def fit() -> Row:
            say(f"{self.about['model']}: calibrating {predictor} on {prompts}")
            options = FitOptions(tuple(CRITERIA) if predictor == "static" else RANKED, predictor)
            source = self.options.data if prompts == "text" else f"{prompts} questions"
            examples = self.examples(prompts)
            with showing("bar") as progress:
                fitted = calibrate(self.loaded, examples, options, data=source, progress=progress)
            for made in fitted:
                save_calibration(made, folder / f"{made.criterion}-{kind}")
            return {"examples": len(examples)}

        self.state.get(f"calibrate {kind}", fit)
        return load_calibration(folder / f"{choice.criterion}-{kind}")

    @cached_property
    def graph(self) -> fx.GraphModule:
        """The model's graph, of which every masked program is made."""
        return traced_graph(self.loaded)

    def row(self, choice: Choice) -> Row:
        """How a predictor ranks, and what its choice makes of perplexity and accuracy."""
        calibration = self.calibration(choice)
        usual = default_selection(len(calibration.taps))
        selection = "topk" if choice.scope == "local" else usual
        policy = Options().policy(self.shape, choice.sparsity, selection)
        policy = replace(policy, scope=choice.scope)

        def measure() -> Row:
            program, tensors = masked_program(self.graph, self.shape, calibration, policy)
            programs, limit = {"masked": program}, self.shape.max_positions
            session = Session(self.shape, policy, programs, tensors, {}, limit)
            found = evaluate(session, self.windows, against=())["artifact"]
            tasks = {t: accuracy(session, self.loaded, asked) for t, asked in self.tasks.items()}
            return {**found, "tasks": tasks}

        measured = self.state.get(json.dumps(choice[1:]), measure)
        say(f"{self.about['model']}: {choice.label}: perplexity {number(measured['perplexity'])}")
        found = {"label": choice.label, **measured}
        if choice.sparsity:
            found["calibration_tokens"] = calibration.tokens
            found |= {name: calibration.metrics.get(name) for name in RANKING}
        return found

    def run(self) -> dict[str, list[Row]]:
        """All tables that are wanted."""
        found = {}
        for letter in sorted({*self.options.tables}):
            say(f"{self.about['model']}: table {letter}, {TABLES[letter].title}")
            choices = TABLES[letter].rows
            found[letter] = [self.row(c) for c in choices if c.prompts == "text" or self.tasks]
        self.state.close()
        return found

    def section(self, tables: dict[str, list[Row]]) -> list[str]:
        """The tables in Markdown, with what was run."""
        options, asked, shape = self.options, self.about["questions"], self.shape
        tokens = next(iter(tables.values()))[0]["tokens"]
        lines = [
            f"## {self.about['model']}\n",
            f"{shape.layers} layers of {shape.heads} heads and {shape.ffn} neurons; "
            f"{options.examples} examples to calibrate. New masks at every token; perplexity is of "
            f"a token, over {tokens:,} in windows of {options.seq_len}, of {options.data} where it "
            "calibrated nothing. Heads and neurons: what was skipped there, of all.",
        ]
        if asked:
            counts = ", ".join(f"{task} ({count})" for task, count in asked.items())
            error = 50 / min(asked.values()) ** 0.5
            lines += [
                f"Accuracy in %, zero-shot; questions: {counts}. A standard error is up to "
                f"{error:.1f} points."
            ]
        lines += [f"Not run: {reason}." for reason in self.missing]
        for letter, rows in tables.items():
            cells = [columns(row, RANKING if letter == "b" else ()) for row in rows]
            lines += [f"\n### {letter}. {TABLES[letter].title}\n"]
            lines += [f"Published: {TABLES[letter].published}.\n"]
            body = [[*cells[0]], ["---", *["---:"] * (len(cells[0]) - 1)]]
            body += [[*row.values()] for row in cells]
            lines += [f"| {' | '.join(row)} |" for row in body]
        return lines


def columns(row: Row, ranking: Sequence[str]) -> dict[str, str]:
    """A row's cells by their headings."""
    known = "calibration_tokens" in row  # not for dense
    found = {"": row["label"]}
    found["calibration tokens"] = f"{row['calibration_tokens']:,}" if known else ""
    found |= {name.replace("_", " "): f"{row[name]:.2f}" if known else "" for name in ranking}
    found |= {kind: f"{row[f'{kind[:-1]}_sparsity']:.0%}" for kind in ("heads", "neurons")}
    found["perplexity"] = number(row["perplexity"])
    scores = row["tasks"]
    if scores:
        scores = {**scores, "mean": sum(scores.values()) / len(scores)}
    return found | {task: f"{100 * score:.1f}" for task, score in scores.items()}


def number(value: float) -> str:
    """A perplexity, short."""
    return f"{value:,.1f}" if value < 1e3 else f"{value:,.0f}" if value < 1e6 else f"{value:.0e}"


def say(text: str) -> None:
    """Log to stderr."""
    print(text, file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="alias, hub id or directory")
    parser.add_argument("--data", default="pydoc", help="text to calibrate and to measure on")
    parser.add_argument("--tasks", type=Path, metavar="DIR", help="where TASK.jsonl files are")
    parser.add_argument("--tables", nargs="+", choices=[*TABLES], default=[*TABLES])
    parser.add_argument("--examples", type=int, default=64, help="to calibrate on")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens of a window of text")
    parser.add_argument("--tokens", type=int, default=8192, help="of text, to measure on")
    parser.add_argument("--questions", type=int, default=250, help="of each task, at most")
    parser.add_argument("--quick", action="store_true", help="tiny samples: does it run?")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("--output", type=Path, default=Path("paper"), metavar="DIR")
    options = parser.parse_args()
    if options.quick:
        vars(options).update(QUICK)
    if options.questions < 1:
        raise OptionError("nothing is asked", expected="--questions N", got=options.questions)
    if options.tasks and not any((options.tasks / f"{task}.jsonl").exists() for task in data.TASKS):
        known = ", ".join(data.TASKS)
        raise OptionError(f"{options.tasks} holds no task", expected=f"NAME.jsonl of {known}")
    return options


def main() -> None:
    """Run the protocol for every model, and write the page after each."""
    options = parse()
    command = shlex.join(["python", "examples/reproduce_paper.py", *sys.argv[1:]])
    where, known = device(), ", ".join(f"{name} {one}" for name, one in versions().items())
    page = ["# The paper's tables\n", f"    {command}\n"]
    page += [f"{where['device']}, {where['threads']} threads; {known}.\n"]
    models = []
    for name in options.models:
        protocol = Protocol(options, name)
        tables = protocol.run()
        page += [*protocol.section(tables), ""]
        models.append({**protocol.about, "not_run": protocol.missing, "tables": tables})
        result = {"command": command, **where, "models": models}
        (options.output / "paper.json").write_text(json.dumps(result, indent=2) + "\n")
        (options.output / "paper.md").write_text("\n".join(page))
    say(f"{options.output / 'paper.md'} is written")


if __name__ == "__main__":
    try:
        main()
    except (ShadowcError, OSError) as error:
        say(f"error: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        say("interrupted: the same command goes on where it stopped")
        sys.exit(130)
