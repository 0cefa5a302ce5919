"""lm-evaluation-harness on an artifact, with the masks that decoding has.

    shadowc lm-eval --model shadowc --model_args artifact=DIR --tasks piqa,copa

Released versions of the harness (0.4.13) know the models in a table of their own and look for no
entry points, so `lm_eval` itself cannot find this one: `shadowc lm-eval` is its command line, with
all its options, after this module has been imported.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from shadowc.calibration.data import file_rows
from shadowc.errors import DataError, OptionError, ShadowcError
from shadowc.evaluation.generation import continue_greedily
from shadowc.evaluation.likelihood import log_likelihoods, prefix_token
from shadowc.evaluation.sources import as_loaded
from shadowc.models import LoadedModel
from shadowc.runtime.loading import load
from shadowc.runtime.session import Session

try:
    from lm_eval import __version__, simple_evaluate, utils
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import (
        Collator,
        handle_stop_sequences,
        has_bos_prefix,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
    from lm_eval.tasks import TaskManager
    from tqdm import tqdm
except ImportError as error:
    raise OptionError(
        "lm-evaluation-harness is not installed", got=error, fix="pip install 'shadowc[eval]'"
    ) from error


@register_model("shadowc")
class ShadowLM(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """An artifact as the harness's model.

    Args:
        session: The artifact.
        loaded: Its tokenizer, as `as_loaded` gives it.
        dense: Run every unit instead: the artifact's own baseline.
        batch_size: Rows at once where scores are asked for; None or `auto`: as many as keep the
            logits small. Text is generated row by row, which is what an artifact is made for.
        max_length: Most tokens of an input; None: the compiled length.
    """

    def __init__(
        self,
        session: Session,
        loaded: LoadedModel,
        *,
        dense: bool = False,
        batch_size: int | str | None = None,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        self.session, self.loaded, self.dense = session, loaded, dense
        self.tokenizer = loaded.tokenizer
        self.rows = None if batch_size in (None, "auto") else int(batch_size)
        longest = session.max_seq_len
        self.max_length = longest if max_length is None else int(max_length)
        if not 1 <= self.max_length <= longest:
            raise OptionError(
                "max_length is out of range",
                expected=f"1 to {longest}, the compiled length",
                got=max_length,
            )

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> ShadowLM:
        """Load an artifact: what the harness calls with the options of its command line.

        Args:
            arg_dict: `--model_args`: artifact, and optionally dense, max_length, allow_jit.
            additional_config: `--batch_size`; `--device` is the artifact's own.

        Raises:
            OptionError: If there is another argument, or no artifact.
        """
        options = dict(arg_dict)
        path, jit = options.pop("artifact", None), bool(options.pop("allow_jit", False))
        if path is None or options.keys() - {"dense", "max_length"}:
            raise OptionError(
                "the model's arguments are not understood",
                expected="--model_args artifact=DIR, and of dense=True, max_length=N and "
                "allow_jit=True what is wanted",
                got=", ".join(arg_dict) or "none",
            )
        model = load(path, allow_jit=jit)
        options["batch_size"] = (additional_config or {}).get("batch_size")
        return cls(model.session, as_loaded(model), **options)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> ShadowLM:
        """The same for arguments as one string."""
        return cls.create_from_arg_obj(
            utils.simple_parse_args_string(arg_string), additional_config
        )

    @property
    def eot_token_id(self) -> int:
        """Ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is conditioned on."""
        return prefix_token(self.loaded)

    @property
    def tokenizer_name(self) -> str:
        """Tells the harness's caches of prompts apart."""
        return self.loaded.source.name.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the prompt that the tokenizer makes of it."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **ignored: Any
    ) -> list[int]:
        """Token ids, BOS first where the tokenizer puts one and the text has none."""
        if add_special_tokens is None:
            bos = self.tokenizer.decode(self.prefix_token_id)
            add_special_tokens = not has_bos_prefix(string, bos)
        ids = self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False)
        return list(ids)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **ignored: Any,
    ) -> list[tuple[float, bool]]:
        """Score continuations; contexts that are too long lose their beginning."""
        fitting = []
        for _, context, continuation in requests:
            room = self.max_length + 1 - len(continuation)
            if room < 1:
                raise OptionError(
                    "a continuation is longer than the artifact's inputs",
                    expected=f"at most {self.max_length} tokens",
                    got=len(continuation),
                )
            fitting.append((context[-room:], continuation))
        track = _bar("scoring", disable_tqdm)
        found = log_likelihoods(
            self.session, fitting, dense=self.dense, rows=self.rows, track=track
        )
        for (text, _, _), answer in zip(requests, found, strict=True):
            if text is not None:  # a window of a document has none
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of documents after `prefix_token_id`, in windows of `max_length`."""
        windows, owners = [], []
        for index, request in enumerate(requests):
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in map(utils.make_disjoint_window, rolling):
                windows.append((None, *window))
                owners.append(index)
        totals = [0.0] * len(requests)
        found = self._loglikelihood_tokens(windows, disable_tqdm)
        for index, (value, _) in zip(owners, found, strict=True):
            totals[index] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, each up to a stop string or the end of the text.

        Raises:
            OptionError: If a task wants to sample, or leaves no room for its prompt.
        """
        ordered = Collator(
            [request.args for request in requests],
            sort_fn=lambda args: (-len(args[0]), args[0]),
            group_by="gen_kwargs",
            group_fn=lambda args: args[1],
        )
        found = []
        for ((context, options),) in _bar("generating", disable_tqdm)(
            list(ordered.get_batched(n=1))
        ):
            text = self._generate(context, options)
            found.append(text)
            self.cache_hook.add_partial("generate_until", (context, options), text)
        return list(ordered.get_original(found))

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        chosen = normalize_gen_kwargs(options)
        if chosen["do_sample"]:
            raise OptionError("only greedy generation is measured", got=options)
        eos = self.tokenizer.decode(self.eot_token_id)
        until = handle_stop_sequences(chosen["until"], eos)
        new = chosen["max_gen_toks"]
        if new >= self.max_length:
            raise OptionError(
                "the task's continuations do not fit in the compiled length",
                expected=f"fewer than {self.max_length} tokens",
                got=new,
                fix="--gen_kwargs max_gen_toks=N, or compile with a larger --max-seq-len",
            )

        def ended(ids: list[int]) -> bool:
            text = self.tokenizer.decode(ids)
            return ids[-1] == self.eot_token_id or any(stop in text for stop in until if stop)

        prompt = self.tok_encode(context)[-(self.max_length - new) :]
        ids = continue_greedily(self.session, prompt, new, dense=self.dense, stop=ended)
        text = postprocess_generated_text(self.tokenizer.decode(ids), until, None)
        return str(text)


def run_tasks(
    session: Session,
    loaded: LoadedModel,
    tasks: Sequence[str],
    questions: int | None = None,
    num_fewshot: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Put tasks of the harness to an artifact, sparse and dense.

    Args:
        session: The artifact.
        loaded: Its tokenizer, as `as_loaded` gives it.
        tasks: Names that the harness knows, or NAME:FILE.jsonl for such a task with questions from
            a file, whose first three quarters are what few-shot examples are drawn from.
        questions: The most questions of a task; None: all.
        num_fewshot: Answered questions before each; None: as the task says.

    Returns:
        For each task `accuracy` and `dense_accuracy` (None where it has none), `questions`,
        `scorer`, and the harness's `metrics` and `dense_metrics`.

    Raises:
        DataError: If a task is unknown or its data cannot be had.
    """
    manager = _manager()
    results = {}
    for task in tasks:
        name, _, file = task.partition(":")
        if name not in manager.all_tasks:
            raise DataError(
                f"lm-evaluation-harness has no task {name!r}",
                expected="a name that `shadowc lm-eval ls tasks` lists, or NAME:FILE.jsonl",
            )
        with TemporaryDirectory() as folder:
            spec = _from_file(manager, name, file, Path(folder)) if file else name
            sparse, dense = (
                _evaluate(
                    ShadowLM(session, loaded, dense=every),
                    task,
                    tasks=[spec],
                    limit=questions,
                    num_fewshot=num_fewshot,
                    task_manager=manager,
                )
                for every in (False, True)
            )
        metrics, dense_metrics = (
            {
                key.removesuffix(",none"): value
                for key, value in done["results"][name].items()
                if isinstance(value, float) and "stderr" not in key
            }
            for done in (sparse, dense)
        )
        results[task] = {
            "accuracy": metrics.get("acc"),
            "dense_accuracy": dense_metrics.get("acc"),
            "questions": sparse["n-samples"][name]["effective"],
            "scorer": f"lm-eval {__version__}",
            "metrics": metrics,
            "dense_metrics": dense_metrics,
        }
    return results


@cache
def _manager() -> Any:
    """The harness's tasks; to list them takes seconds."""
    return TaskManager()


def _evaluate(model: ShadowLM, task: str, **options: Any) -> dict[str, Any]:
    """What the harness finds, or the reason why it finds nothing."""
    try:
        found: dict[str, Any] = simple_evaluate(
            model, bootstrap_iters=0, log_samples=False, **options
        )
    except ShadowcError:
        raise
    except Exception as error:  # of the hub, datasets, Jinja: there is no common base
        raise DataError(
            f"lm-evaluation-harness could not run {task}",
            got=f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}",
            fix="without network name a file with the fields of the hub's data: NAME:FILE.jsonl",
        ) from error
    return found


def _from_file(manager: Any, name: str, file: str, folder: Path) -> str:
    """Write a task of the harness that reads a file instead of the hub; returns its path."""
    parts = {"train": file_rows(file, "calibration"), "validation": file_rows(file, "evaluation")}
    files = {part: folder / f"{part}.jsonl" for part, rows in parts.items() if rows}
    for part, path in files.items():
        path.write_text("".join(json.dumps(row) + "\n" for row in parts[part]))
    task = {
        "include": str(manager.task_index[name].yaml_path),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {part: str(path) for part, path in files.items()},
            "cache_dir": str(folder),
        },
        "training_split": "train" if "train" in files else None,
        "validation_split": "validation",
        "test_split": None,
    }
    (folder / "task.yaml").write_text(json.dumps(task))  # JSON is YAML
    return str(folder / "task.yaml")


def _bar(doing: str, disable: bool) -> Any:
    """Wraps an iterable to show progress on stderr."""
    return lambda items: tqdm(items, desc=doing, disable=disable)


def main(arguments: Sequence[str]) -> None:
    """Run the harness's command line, which then knows `--model shadowc`."""
    before = sys.argv
    sys.argv = ["lm-eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
