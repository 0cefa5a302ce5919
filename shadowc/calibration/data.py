"""Text in, token sequences out: what a model is calibrated on, and what it is evaluated on.

A data set is named by one string:
    pydoc             the Python language reference that ships with every CPython (the default)
    self              text that the model samples itself, seeded
    FILE              .jsonl or .parquet records with a text field; any other file is plain text
    wikitext2, ...    a hub data set (`TEXTS`), through `datasets`
    piqa, ...         a multiple-choice task (`TASKS`) from the hub, few-shot formatted
    piqa:FILE.jsonl   the same from a local file with the task's own fields

Quality is never measured on text that was calibrated on. A data set without splits of its own
(pydoc, a file) is cut by length: its first three quarters calibrate, its last quarter evaluates.
A file that was not calibrated on is evaluated whole.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from shadowc.errors import DataError, OptionError
from shadowc.models import LoadedModel

Part = Literal["calibration", "evaluation", "all"]
Row = dict[str, Any]

CALIBRATION_SHARE = 0.75
SHOTS = 5
OFFLINE = "pydoc, self, a .txt, .jsonl or .parquet file, or TASK:FILE.jsonl"


@dataclass(frozen=True)
class Example:
    """One calibration sequence.

    Attributes:
        ids: Token ids, BOS first if the tokenizer puts one there.
        scored: For each id, whether predicting it counts in the loss (the first id is never
            predicted). True throughout for plain text; only the answer's ids for a question.
    """

    ids: list[int]
    scored: list[bool]


@dataclass(frozen=True)
class Question:
    """One multiple-choice question.

    Attributes:
        choices: For each choice the prompt and its continuation, which begins with a space.
        label: Index of the right choice.
    """

    choices: tuple[tuple[str, str], ...]
    label: int

    @property
    def answer(self) -> tuple[str, str]:
        """The prompt and the right continuation."""
        return self.choices[self.label]


@dataclass(frozen=True)
class HubData:
    """Where a data set is on the Hugging Face hub.

    Attributes:
        path: Repository.
        config: Configuration (subset), or None.
        calibration: Split to calibrate on.
        evaluation: Split to evaluate on.
        revision: Branch; the hub's own conversion where the repository is a script.
        files: Files of each split, where the whole is too large.
    """

    path: str
    config: str | None
    calibration: str = "train"
    evaluation: str = "validation"
    revision: str | None = None
    files: dict[str, str] | None = None


_CONVERTED = "refs/convert/parquet"
TEXTS = {
    "wikitext2": HubData("Salesforce/wikitext", "wikitext-2-raw-v1", evaluation="test"),
    "c4": HubData(
        "allenai/c4",
        None,
        "train[:2000]",
        "validation[:2000]",
        files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
    ),
    "ptb": HubData(
        "ptb-text-only/ptb_text_only", "penn_treebank", evaluation="test", revision=_CONVERTED
    ),
}


@dataclass(frozen=True)
class Task:
    """A multiple-choice task: where it is, and how one of its rows becomes a question."""

    hub: HubData
    read: Callable[[Row], Question]


def _piqa(row: Row) -> Question:
    prompt = f"Question: {row['goal']}\nAnswer:"
    return _question(prompt, [row["sol1"], row["sol2"]], row["label"])


def _copa(row: Row) -> Question:
    link = {"cause": "because", "effect": "so"}[row["question"]]
    choices = (row["choice1"], row["choice2"])
    endings = [c if c.startswith("I ") else c[:1].lower() + c[1:] for c in choices]
    return _question(f"{row['premise'].rstrip('. ')} {link}", endings, row["label"])


def _openbookqa(row: Row) -> Question:
    label = row["choices"]["label"].index(row["answerKey"])
    return _question(row["question_stem"], row["choices"]["text"], label)


def _winogrande(row: Row) -> Question:
    before, after = row["sentence"].split("_", 1)
    choices = ((before + row[option], " " + after.strip()) for option in ("option1", "option2"))
    return Question(tuple(choices), int(row["answer"]) - 1)


def _rte(row: Row) -> Question:
    prompt = f"{row['sentence1']}\nQuestion: {row['sentence2']} True or False?\nAnswer:"
    return _question(prompt, ["True", "False"], row["label"])


def _hellaswag(row: Row) -> Question:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    prompt, *endings = (_without_markup(text) for text in (context, *row["endings"]))
    return _question(prompt, endings, row["label"])


def _arc_easy(row: Row) -> Question:
    label = row["choices"]["label"].index(row["answerKey"])
    return _question(f"Question: {row['question']}\nAnswer:", row["choices"]["text"], label)


TASKS = {
    "piqa": Task(HubData("ybisk/piqa", "plain_text", revision=_CONVERTED), _piqa),
    "copa": Task(HubData("aps/super_glue", "copa"), _copa),
    "openbookqa": Task(HubData("allenai/openbookqa", "main"), _openbookqa),
    "winogrande": Task(HubData("allenai/winogrande", "winogrande_xl"), _winogrande),
    "rte": Task(HubData("nyu-mll/glue", "rte"), _rte),
    "hellaswag": Task(HubData("Rowan/hellaswag", None), _hellaswag),
    "arc_easy": Task(HubData("allenai/ai2_arc", "ARC-Easy"), _arc_easy),
}
DATA_NAMES = ("pydoc", "self", *TEXTS, *TASKS)


def calibration_examples(
    loaded: LoadedModel, data: str, examples: int, seq_len: int, seed: int, shots: int = SHOTS
) -> list[Example]:
    """Sequences to calibrate on, from the calibration part of a data set, in seeded order.

    Plain text gives windows of exactly `seq_len` tokens that do not overlap; a task gives one
    question each, at most `seq_len` tokens long (with fewer shots where they do not fit).

    Args:
        loaded: The model; its tokenizer is used, and for `self` its weights.
        data: See the module's docstring.
        examples: Number of sequences.
        seq_len: Tokens of a sequence, BOS included.
        seed: Seed of the order, of the shots and of the sampling.
        shots: Answered questions before a task's question.

    Raises:
        DataError: The data set is unknown, unreachable, unreadable or too short.
        OptionError: `seq_len` or `examples` is out of range.
    """
    _check_sizes(loaded, examples, seq_len)
    if data == "self":
        windows = _sample(loaded, examples, seq_len, seed)
    elif _task_of(data) is not None:
        return _few_shot(loaded, data, examples, seq_len, seed, shots)
    else:
        windows = list(_windows(loaded, load_documents(data, "calibration"), seq_len))
        if len(windows) < examples:
            raise DataError(
                f"{data} is too short to calibrate on",
                expected=f"{examples} examples of {seq_len} tokens",
                got=f"{len(windows)} of them in its calibration part",
                fix=f"--examples {len(windows)}, a smaller --seq-len or more text"
                if windows
                else "a smaller --seq-len or more text",
            )
        random.Random(seed).shuffle(windows)
    return [Example(ids, [True] * len(ids)) for ids in windows[:examples]]


def evaluation_windows(
    loaded: LoadedModel,
    data: str,
    seq_len: int,
    tokens: int,
    *,
    stride: int | None = None,
    calibrated_on: str | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """Windows of `seq_len` token ids to measure perplexity on, in text order.

    Args:
        loaded: The model; its tokenizer is used, and for `self` its weights.
        data: See the module's docstring.
        seq_len: Tokens of a window, BOS included.
        tokens: About how many tokens in all: as many whole windows, at least one. Shorter text
            gives fewer.
        stride: A window begins so many tokens after the one before, and overlaps with it; None:
            windows do not overlap.
        calibrated_on: The data set that was calibrated on. Where it is another one than `data`,
            a file is used whole; None means that it may have been this one.
        seed: Seed of `self` (calibration text of the same seed is still another text).

    Raises:
        DataError: The data set is unknown, unreachable, unreadable or too short.
        OptionError: `seq_len`, `tokens` or `stride` is out of range.
    """
    _check_sizes(loaded, tokens, seq_len)
    size = seq_len - len(_prefix(loaded))
    if stride is not None and (data == "self" or not 1 <= stride <= size):
        raise OptionError(
            "such windows cannot overlap",
            expected=f"--stride from 1 to {size} for windows of {seq_len} tokens, of other data "
            "than self, whose samples do not follow one another",
            got=f"--stride {stride} --data {data}",
        )
    count = 1 + max(0, tokens - seq_len) // (stride or seq_len)
    if _task_of(data) is not None:
        raise DataError(
            f"{data} is a task, which has no perplexity",
            expected=f"{OFFLINE.rsplit(',', 1)[0]} or {', '.join(TEXTS)}",
            fix=f"--tasks {data}",
        )
    if data == "self":
        return _sample(loaded, count, seq_len, seed + 2**31)  # torch keeps 32 bits of a seed
    documents = evaluation_documents(data, calibrated_on)
    windows = list(itertools.islice(_windows(loaded, documents, seq_len, stride), count))
    if not windows:
        raise DataError(
            f"{data} is too short to evaluate on",
            expected=f"at least one window of {seq_len} tokens"
            + (" in its last quarter, which is held out" if _held_out(data, calibrated_on) else ""),
            got=f"{sum(map(len, documents))} characters",
            fix="a smaller --seq-len or more text",
        )
    return windows


def evaluation_documents(data: str, calibrated_on: str | None = None) -> list[str]:
    """The texts that `evaluation_windows` cuts.

    Raises:
        DataError: As `load_documents`.
    """
    held_out = data in DATA_NAMES or _held_out(data, calibrated_on)
    return load_documents(data, "evaluation" if held_out else "all")


def load_documents(data: str, part: Part) -> list[str]:
    """The texts of a data set that is plain text.

    Raises:
        DataError: The data set is unknown, unreachable or unreadable, or holds no text.
    """
    if data in TEXTS:
        rows = _hub_rows(TEXTS[data], data, part)
        field = _text_field(rows[0], data)
        return ["".join(row[field] for row in rows)] if data == "wikitext2" else _texts(rows, field)
    if data == "pydoc":
        documents = _pydoc()
    else:
        path = _existing(data)
        if path.suffix in (".jsonl", ".parquet"):
            rows = _file_rows(path)
            documents = _texts(rows, _text_field(rows[0], data))
        else:
            documents = [_read_text(path)]
    if not any(text.strip() for text in documents):
        raise DataError(f"{data} holds no text", expected="English text", got="an empty file")
    return _split(documents, part)


def load_questions(data: str, part: Part) -> list[Question]:
    """The questions of a task: from the hub (`piqa`) or from a file (`piqa:FILE.jsonl`).

    Raises:
        DataError: The task is unknown or unreachable, or a row lacks a field.
    """
    name = _task_of(data)
    if name is None:
        raise DataError(
            f"unknown task {data!r}", expected=f"one of {', '.join(TASKS)}, or TASK:FILE.jsonl"
        )
    file = data.partition(":")[2]
    rows = file_rows(file, part) if file else _hub_rows(TASKS[name].hub, name, part)
    try:
        return [TASKS[name].read(row) for row in rows]
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise DataError(
            f"{data} is not {name} data",
            expected=f"the fields of {name} in every row",
            got=f"{type(error).__name__}: {error}; the first row has {', '.join(rows[0])}",
        ) from error


def file_rows(file: str, part: Part) -> list[Row]:
    """The records of a part of a .jsonl or .parquet file: a last quarter of them evaluates.

    Raises:
        DataError: There is no such file, or it is not of this kind.
    """
    rows = _file_rows(_existing(file))
    cut = int(len(rows) * CALIBRATION_SHARE)
    return {"calibration": rows[:cut], "evaluation": rows[cut:], "all": rows}[part]


def few_shot_prompts(
    loaded: LoadedModel, data: str, questions: Sequence[Question], shots: int, seq_len: int
) -> list[Question]:
    """Questions with answered ones of the calibration part before them, the same for all.

    Args:
        loaded: The tokenizer.
        data: Name of the task, as for `load_questions`.
        questions: The questions to put, of the evaluation part.
        shots: Answered questions before each; fewer where they do not fit.
        seq_len: Most tokens of a question with its longest choice.

    Raises:
        DataError: If the calibration part has fewer questions.
        OptionError: If `shots` is negative.
    """
    if shots < 0:
        raise OptionError("--num-fewshot is out of range", expected="at least 0", got=shots)
    if shots == 0:
        return list(questions)
    others = load_questions(data, "calibration")
    if len(others) < shots:
        raise DataError(
            f"{data} has too few questions to show",
            expected=f"{shots} in its calibration part",
            got=len(others),
            fix=f"--num-fewshot {len(others)}",
        )
    answered = ["".join(one.answer) for one in random.Random(0).sample(others, shots)]
    found = []
    for question in questions:
        for first in range(shots + 1):
            shown = "".join(f"{text}\n\n" for text in answered[first:])
            choices = tuple((shown + prompt, ending) for prompt, ending in question.choices)
            if all(len(encode_answer(loaded, *choice).ids) <= seq_len for choice in choices):
                break
        found.append(Question(choices, question.label))
    return found


def encode_answer(loaded: LoadedModel, prompt: str, answer: str) -> Example:
    """Token ids of a prompt and its answer, the answer's ids scored."""
    prefix = _prefix(loaded)
    start = len(prefix) + len(_encode(loaded, prompt))
    ids = prefix + _encode(loaded, prompt + answer)
    return Example(ids, [position >= start for position in range(len(ids))])


# Windows -----------------------------------------------------------------------------------------


def _windows(
    loaded: LoadedModel, documents: list[str], seq_len: int, stride: int | None = None
) -> Iterator[list[int]]:
    """Windows of the documents set one after the other, BOS first; the last bit is dropped."""
    prefix = _prefix(loaded)
    size = seq_len - len(prefix)
    step = stride or size
    pending: list[int] = []
    for document in documents:
        pending += _encode(loaded, document.strip() + "\n\n")
        starts = range(0, len(pending) - size + 1, step)
        for start in starts:
            yield prefix + pending[start : start + size]
        del pending[: len(starts) * step]


def _few_shot(
    loaded: LoadedModel, data: str, examples: int, seq_len: int, seed: int, most: int
) -> list[Example]:
    """Questions with their right answer after up to `most` others of the same data set."""
    questions = load_questions(data, "calibration")
    rng = random.Random(seed)
    found: list[Example] = []
    for index in rng.sample(range(len(questions)), len(questions)):
        if len(found) == examples:
            break
        others = rng.sample(range(len(questions)), min(most + 1, len(questions)))
        shots = ["".join(questions[i].answer) for i in others if i != index][:most]
        prompt, answer = questions[index].answer
        while True:
            example = encode_answer(loaded, "\n\n".join([*shots, prompt]), answer)
            if len(example.ids) <= seq_len:
                found.append(example)
                break
            if not shots:
                break
            shots.pop()
    if len(found) < examples:
        raise DataError(
            f"{data} has too few questions",
            expected=f"{examples} of at most {seq_len} tokens",
            got=f"{len(found)} in its calibration part",
            fix=f"--examples {len(found)}" if found else "a larger --seq-len",
        )
    return found


@torch.no_grad()
def _sample(loaded: LoadedModel, count: int, seq_len: int, seed: int) -> list[list[int]]:
    """Sequences that the model samples from its own distribution, from BOS on."""
    tokenizer, prefix = loaded.tokenizer, _prefix(loaded)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    new = seq_len - len(prefix)
    windows: list[list[int]] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        while len(windows) < count:
            ids = torch.full((min(16, count - len(windows)), 1), start, device=loaded.model.device)
            sampled = loaded.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                min_new_tokens=new,
                max_new_tokens=new,
                pad_token_id=tokenizer.pad_token_id,
            )
            windows += [prefix + row for row in sampled[:, 1:].tolist()]
    return windows


def _encode(loaded: LoadedModel, text: str) -> list[int]:
    return list(loaded.tokenizer.encode(text, add_special_tokens=False, verbose=False))


def _prefix(loaded: LoadedModel) -> list[int]:
    """BOS, if the tokenizer itself puts it before a text (OPT and Llama 2 do, SmolLM2 does not)."""
    first = loaded.tokenizer.encode("a")[0]
    return [first] if first == loaded.tokenizer.bos_token_id else []


def _check_sizes(loaded: LoadedModel, count: int, seq_len: int) -> None:
    if count < 1:
        raise OptionError("nothing asked for", expected="at least 1 example or token", got=count)
    if not 2 <= seq_len <= loaded.shape.max_positions:
        raise OptionError(
            "seq_len is out of range",
            expected=f"2 to {loaded.shape.max_positions}, the model's longest sequence",
            got=seq_len,
        )


# Sources -----------------------------------------------------------------------------------------


def _pydoc() -> list[str]:
    """The topics of Python's own help in a fixed mixed order, without markup and repetitions.

    Topics contain one another, so a paragraph is kept where it comes first: otherwise a fifth of
    the text would be on both sides of the split.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    documents = []
    for name in sorted(topics, key=lambda name: hashlib.sha256(name.encode()).digest()):
        paragraphs = []
        for block in topics[name].split("\n\n"):
            lines = [line for line in block.split("\n") if not re.fullmatch(r"\W{4,}", line)]
            prose = not any(line.startswith(" ") for line in lines)
            paragraph = (" " if prose else "\n").join(lines).rstrip()
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                paragraphs.append(paragraph)
        documents.append("\n\n".join(paragraphs))
    return documents


def _split(documents: list[str], part: Part) -> list[str]:
    """Cut the documents by length; one that lies across the cut is divided at a line or word."""
    if part == "all":
        return documents
    cut = int(sum(map(len, documents)) * CALIBRATION_SHARE)
    for index, text in enumerate(documents):
        if cut < len(text):
            at = max(text.rfind("\n", 0, cut), text.rfind(" ", 0, cut)) + 1 or cut
            if part == "calibration":
                return [*documents[:index], text[:at]]
            return [text[at:], *documents[index + 1 :]]
        cut -= len(text)
    return []


def _task_of(data: str) -> str | None:
    name = data.partition(":")[0]
    return name if name in TASKS else None


def _held_out(data: str, calibrated_on: str | None) -> bool:
    """Whether `data` may have been calibrated on, so that only its last quarter evaluates."""
    return calibrated_on is None or _same(data, calibrated_on)


def _same(data: str, other: str) -> bool:
    paths = Path(data).expanduser(), Path(other).expanduser()
    return data == other or all(path.exists() for path in paths) and paths[0].samefile(paths[1])


def _existing(data: str) -> Path:
    path = Path(data).expanduser()
    if path.is_file():
        return path
    near = difflib.get_close_matches(data, DATA_NAMES, n=1)
    raise DataError(
        f"unknown data set {data!r}" + (f": did you mean {near[0]}?" if near else ""),
        expected=f"a file, or one of {', '.join(DATA_NAMES)}",
        got="a directory" if path.is_dir() else "no such file",
    )


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not text", expected="UTF-8", got=f"byte {error.start} is not"
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read", got=error.strerror) from error
    if "\0" in text:
        raise DataError(f"{path} is not text", expected="UTF-8 text", got="binary data")
    return text


def _file_rows(path: Path) -> list[Row]:
    """The records of a .jsonl or .parquet file."""
    if path.suffix == ".parquet":
        try:
            from pyarrow import ArrowException, parquet
        except ImportError as error:
            raise DataError(
                "reading .parquet needs pyarrow", got=error, fix="pip install 'shadowc[eval]'"
            ) from error
        try:
            rows: list[Row] = parquet.read_table(path).to_pylist()
        except (ArrowException, OSError) as error:
            raise DataError(f"{path} is not Parquet, or is truncated", got=error) from error
    else:
        rows = []
        for number, line in enumerate(_read_text(path).split("\n"), 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    raise DataError(
                        f"{path} line {number} is not JSON", expected="one object a line", got=error
                    ) from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} holds no records", expected="one JSON object a line")
    return rows


def _text_field(row: Row, data: str) -> str:
    """`text`, else the only field that is a string."""
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in strings:
        return "text"
    if len(strings) == 1:
        return strings[0]
    raise DataError(
        f"{data} has no field that is clearly its text",
        expected="a field `text`, or exactly one field of strings",
        got=", ".join(row) or "no fields",
    )


def _texts(rows: list[Row], field: str) -> list[str]:
    return [text for row in rows if isinstance(text := row.get(field), str) and text.strip()]


def _hub_rows(source: HubData, name: str, part: Part) -> list[Row]:
    """The rows of a hub data set; without network this fails at once, not after retries."""
    try:
        from datasets import load_dataset
        from huggingface_hub import HfApi
        from huggingface_hub.constants import HF_HUB_OFFLINE
    except ImportError as error:
        raise DataError(
            f"{name} needs the package datasets", got=error, fix="pip install 'shadowc[eval]'"
        ) from error
    split = source.evaluation if part == "evaluation" else source.calibration
    try:
        if not HF_HUB_OFFLINE:
            HfApi().dataset_info(source.path, timeout=10)
        rows = load_dataset(
            source.path,
            source.config,
            split=split,
            revision=source.revision,
            data_files=source.files,
        )
    except Exception as error:  # httpx, hub and datasets errors have no common base
        raise DataError(
            f"{name} ({source.path}) cannot be fetched from the Hugging Face hub",
            got=next(iter(str(error).splitlines()), type(error).__name__),
            fix=f"without network use {OFFLINE}; HF_HUB_OFFLINE=1 uses what was fetched before",
        ) from error
    return list(rows)


def _question(prompt: str, endings: list[str], label: int | str) -> Question:
    return Question(tuple((prompt, f" {ending.strip()}") for ending in endings), int(label))


def _without_markup(text: str) -> str:
    """HellaSwag's WikiHow rows carry `[title]`, `[step]` and the like."""
    return " ".join(re.sub(r"\[.*?\]", "", text.replace(" [title]", ". ")).split())
