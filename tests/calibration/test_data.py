import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from shadowc.calibration import data as data_module
from shadowc.calibration.data import (
    Example,
    calibration_examples,
    encode_answer,
    evaluation_windows,
    few_shot_prompts,
    load_documents,
    load_questions,
)
from shadowc.errors import DataError, OptionError
from shadowc.models import LoadedModel, load_model

WORDS = "the sea was calm and grey that morning when they left the harbour for the last time"


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model("opt-books-15m")


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"{i} {WORDS}." for i in range(1000, 1200)))
    return path


def numbers(loaded: LoadedModel, windows: list[list[int]]) -> set[str]:
    """The line numbers that windows of `text_file` hold."""
    text = " ".join(loaded.tokenizer.decode(ids) for ids in windows)
    return {word for word in text.replace("</s>", " ").split() if word.isdigit() and len(word) == 4}


def test_windows_are_whole_seeded_and_begin_with_bos(loaded: LoadedModel) -> None:
    first = calibration_examples(loaded, "pydoc", 20, 64, seed=0)
    assert first == calibration_examples(loaded, "pydoc", 20, 64, seed=0)
    assert first != calibration_examples(loaded, "pydoc", 20, 64, seed=1)
    for example in first:
        assert len(example.ids) == 64 == len(example.scored)
        assert example.ids[0] == loaded.tokenizer.bos_token_id and all(example.scored)


def test_pydoc_parts_share_no_paragraph() -> None:
    parts = [load_documents("pydoc", part) for part in ("calibration", "evaluation")]
    paragraphs = [
        {" ".join(block.split()) for text in part for block in text.split("\n\n")} for part in parts
    ]
    shared = paragraphs[0] & paragraphs[1] - {""}
    assert not shared
    sizes = [sum(map(len, part)) for part in parts]
    assert sizes[0] / sum(sizes) == pytest.approx(0.75, abs=0.01)
    assert sum(sizes) > 300_000


def test_a_file_is_cut_when_calibrated_on_and_whole_otherwise(
    loaded: LoadedModel, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = str(text_file)
    count = len(evaluation_windows(loaded, name, 32, 10**6, calibrated_on="pydoc"))
    examples = calibration_examples(loaded, name, int(count * 0.74), 32, seed=0)
    used = numbers(loaded, [example.ids for example in examples])
    held_out = evaluation_windows(loaded, name, 32, 10**6, calibrated_on=name)
    assert held_out == evaluation_windows(loaded, name, 32, 10**6)
    last_quarter = {str(i) for i in range(1150, 1200)}
    assert numbers(loaded, held_out) <= last_quarter
    assert used and not used & last_quarter
    whole = numbers(loaded, evaluation_windows(loaded, name, 32, 10**6, calibrated_on="pydoc"))
    assert {"1010", "1190"} <= whole

    monkeypatch.chdir(text_file.parent)  # another name of the same file is the same file
    assert evaluation_windows(loaded, name, 32, 10**6, calibrated_on="text.txt") == held_out


def test_tokens_bound_the_evaluation(loaded: LoadedModel) -> None:
    assert len(evaluation_windows(loaded, "pydoc", 64, 1000)) == 15
    assert len(evaluation_windows(loaded, "pydoc", 64, 1)) == 1


def test_no_bos_where_the_tokenizer_puts_none(loaded: LoadedModel) -> None:
    class Bare:
        """SmolLM2's tokenizer has a BOS token but does not put it before a text."""

        bos_token_id = 2

        def encode(self, text: str, **_: object) -> list[int]:
            return [100 + byte for byte in text.encode()]

    bare = SimpleNamespace(tokenizer=Bare(), shape=loaded.shape)
    windows = evaluation_windows(bare, "pydoc", 16, 64)  # type: ignore[arg-type]
    assert all(len(ids) == 16 and 2 not in ids for ids in windows)


def test_self_is_seeded_and_leaves_the_global_generator_alone(loaded: LoadedModel) -> None:
    import torch

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = calibration_examples(loaded, "self", 3, 12, seed=0)
    assert torch.rand(1) == expected
    assert [len(example.ids) for example in first] == [12, 12, 12]
    assert first[0].ids[0] == loaded.tokenizer.bos_token_id
    assert first == calibration_examples(loaded, "self", 3, 12, seed=0)
    assert first != calibration_examples(loaded, "self", 3, 12, seed=1)
    assert evaluation_windows(loaded, "self", 12, 36) != [example.ids for example in first]


def test_records(loaded: LoadedModel, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [{"id": i, "text": f"{i} {WORDS}", "title": "x"} for i in range(40)]
    lines = tmp_path / "a.jsonl"
    lines.write_text("\n".join(map(json.dumps, rows)) + "\n")
    table = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    only = tmp_path / "only.jsonl"
    only.write_text("\n".join(json.dumps({"id": 1, "body": row["text"]}) for row in rows))
    texts = [load_documents(str(path), "all") for path in (lines, table, only)]
    assert texts[0] == texts[1] == texts[2] == [row["text"] for row in rows]


PIQA = [{"goal": f"Goal {i}", "sol1": f"left {i}", "sol2": f"right {i}", "label": i % 2}
        for i in range(40)]  # fmt: skip


@pytest.fixture
def piqa(tmp_path: Path) -> str:
    path = tmp_path / "piqa.jsonl"
    path.write_text("\n".join(map(json.dumps, PIQA)))
    return f"piqa:{path}"


@pytest.mark.parametrize("shots", [5, 0])
def test_few_shot_examples_score_the_answer_only(
    loaded: LoadedModel, piqa: str, shots: int
) -> None:
    examples = calibration_examples(loaded, piqa, 30, 256, seed=0, shots=shots)
    asked = set()
    for example in examples:
        text = loaded.tokenizer.decode(example.ids)
        assert text.count("Question:") == shots + 1
        assert text.count(text.rsplit("Question: ", 1)[1].split("\n")[0] + "\n") == 1
        scored = loaded.tokenizer.decode(
            [i for i, s in zip(example.ids, example.scored, strict=True) if s]
        )
        number = scored.split()[1]
        assert scored == (" left " if int(number) % 2 == 0 else " right ") + number
        assert text.endswith(f"Goal {number}\nAnswer:{scored}")
        asked.add(number)
    assert asked == {str(i) for i in range(30)}  # the first three quarters
    held_out = load_questions(piqa, "evaluation")
    assert [q.choices[0][0] for q in held_out] == [f"Question: Goal {i}\nAnswer:"
                                                   for i in range(30, 40)]  # fmt: skip


def test_shots_give_way_to_a_short_window(loaded: LoadedModel, piqa: str) -> None:
    full = max(len(e.ids) for e in calibration_examples(loaded, piqa, 30, 256, seed=0))
    for example in calibration_examples(loaded, piqa, 30, full // 2, seed=0):
        assert len(example.ids) <= full // 2
        assert 1 <= loaded.tokenizer.decode(example.ids).count("Question:") < 6
    with pytest.raises(DataError, match="larger --seq-len"):
        calibration_examples(loaded, piqa, 30, 4, seed=0)


ROWS = {
    "copa": (
        {"premise": "The grass was wet.", "choice1": "It rained.", "choice2": "I slept.",
         "question": "cause", "label": 1},
        ("The grass was wet because", " I slept."),
    ),
    "openbookqa": (
        {"question_stem": "The sun is", "answerKey": "B",
         "choices": {"text": ["cold", "hot"], "label": ["A", "B"]}},
        ("The sun is", " hot"),
    ),
    "winogrande": (
        {"sentence": "Ann thanked Eve because _ had helped.", "option1": "Ann", "option2": "Eve",
         "answer": "2"},
        ("Ann thanked Eve because Eve", " had helped."),
    ),
    "rte": (
        {"sentence1": "It rains.", "sentence2": "It is wet.", "label": 0},
        ("It rains.\nQuestion: It is wet. True or False?\nAnswer:", " True"),
    ),
    "hellaswag": (
        {"activity_label": "Tea", "ctx_a": "A man boils water.", "ctx_b": "he", "label": "1",
         "endings": ["flies.", "[step] pours it."]},
        ("Tea: A man boils water. He", " pours it."),
    ),
    "arc_easy": (
        {"question": "Ice is?", "answerKey": "1",
         "choices": {"text": ["solid", "gas"], "label": ["1", "2"]}},
        ("Question: Ice is?\nAnswer:", " solid"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("task", ROWS)
def test_task_formats(task: str) -> None:
    row, answer = ROWS[task]
    assert data_module.TASKS[task].read(row).answer == answer


def test_encode_answer(loaded: LoadedModel) -> None:
    example = encode_answer(loaded, "One and two", " make three")
    start = example.scored.index(True)
    assert not any(example.scored[:start]) and all(example.scored[start:])
    assert loaded.tokenizer.decode(example.ids[start:]) == " make three"
    assert isinstance(example, Example)


def test_hub_data_uses_its_own_splits(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, config: str, **options: object) -> list[dict[str, str]]:
        asked.append((path, config, options["split"]))
        return [{"text": f"{WORDS}\n"}] * 50

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    calibration_examples(loaded, "wikitext2", 4, 32, seed=0)
    evaluation_windows(loaded, "wikitext2", 32, 64, calibrated_on="pydoc")
    path = "Salesforce/wikitext"
    assert asked == [(path, "wikitext-2-raw-v1", "train"), (path, "wikitext-2-raw-v1", "test")]


@pytest.mark.parametrize("name", ["wikitext2", "piqa"])
def test_hub_without_network_says_what_works(
    loaded: LoadedModel, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=unreachable))
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    with pytest.raises(DataError, match=r"(?s)cannot be fetched.*without network use pydoc, self"):
        calibration_examples(loaded, name, 4, 32, seed=0)


def test_windows_with_a_stride_overlap(loaded: LoadedModel, text_file: Path) -> None:
    plain = evaluation_windows(loaded, str(text_file), 17, 85)
    found = evaluation_windows(loaded, str(text_file), 17, 65, stride=4)
    text = [token for window in plain for token in window[1:]]
    assert len(found) == 1 + (65 - 17) // 4
    for index, window in enumerate(found):
        assert window[0] == loaded.tokenizer.bos_token_id
        assert window[1:] == text[4 * index : 4 * index + 16]
    assert evaluation_windows(loaded, str(text_file), 17, 85, stride=16) == plain
    for data, stride in ((str(text_file), 0), (str(text_file), 17), ("self", 4)):
        with pytest.raises(OptionError, match=r"(?s)--stride from 1 to 16.*got: --stride"):
            evaluation_windows(loaded, data, 17, 64, stride=stride)


def test_shots_are_answered_and_of_the_other_part(loaded: LoadedModel, piqa: str) -> None:
    asked = load_questions(piqa, "evaluation")
    shown = few_shot_prompts(loaded, piqa, asked, 2, 512)
    others = ["".join(one.answer) for one in load_questions(piqa, "calibration")]
    for before, after in zip(asked, shown, strict=True):
        assert after.label == before.label
        for (plain, ending), (prompt, same) in zip(before.choices, after.choices, strict=True):
            first, second, question = prompt.split("\n\n")
            assert (question, ending) == (plain, same) and {first, second} <= set(others)
            assert first != second
    one = max(len(encode_answer(loaded, *c).ids) for q in asked for c in q.choices)
    assert few_shot_prompts(loaded, piqa, asked, 0, one) == asked
    assert few_shot_prompts(loaded, piqa, asked, 2, one)[0].choices != shown[0].choices
    with pytest.raises(DataError, match=rf"--num-fewshot {len(others)}"):
        few_shot_prompts(loaded, piqa, asked, len(others) + 1, 512)
    with pytest.raises(OptionError, match="at least 0"):
        few_shot_prompts(loaded, piqa, asked, -1, 512)


def bad_file(tmp_path: Path, name: str, content: bytes) -> str:
    path = tmp_path / name
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n\n ", "holds no text"),
        ("short.txt", b"Too short.", r"(?s)too short.*4 examples of 32.*0 of them"),
        ("image.txt", b"\x89PNG\xff\xfe", "is not text"),
        ("zeros.txt", bytes(1000), "is not text"),
        ("empty.jsonl", b"\n", "holds no records"),
        ("list.jsonl", b"[1]\n", "holds no records"),
        ("broken.jsonl", b'{"text": "a"}\n{"text"\n', "line 2 is not JSON"),
        ("two.jsonl", b'{"a": "x", "b": "y", "n": 1}', r"(?s)no field.*got: a, b, n"),
        ("none.jsonl", b'{"n": 1}', "no field"),
        ("bad.parquet", b"PAR1 not really", "not Parquet"),
    ],
)
def test_bad_files(
    loaded: LoadedModel, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        calibration_examples(loaded, bad_file(tmp_path, name, content), 4, 32, seed=0)


def test_too_few_examples_names_how_many_there_are(loaded: LoadedModel, text_file: Path) -> None:
    with pytest.raises(DataError, match=r"--examples (\d+)") as caught:
        calibration_examples(loaded, str(text_file), 10_000, 32, seed=0)
    fits = int(str(caught.value).split("--examples ")[1].split(",")[0])
    assert len(calibration_examples(loaded, str(text_file), fits, 32, seed=0)) == fits


def test_wrong_fields_of_a_task(loaded: LoadedModel, piqa: str) -> None:
    with pytest.raises(DataError, match=r"(?s)not rte data.*goal, sol1, sol2, label"):
        calibration_examples(loaded, piqa.replace("piqa:", "rte:"), 4, 64, seed=0)
    with pytest.raises(DataError, match="unknown data set"):
        calibration_examples(loaded, "piqa:gone.jsonl", 4, 64, seed=0)


def test_unknown_names(loaded: LoadedModel) -> None:
    with pytest.raises(DataError, match="did you mean wikitext2"):
        calibration_examples(loaded, "wikitext-2", 4, 32, seed=0)
    with pytest.raises(DataError, match="has no perplexity"):
        evaluation_windows(loaded, "piqa", 32, 64)
    with pytest.raises(DataError, match="unknown task"):
        load_questions("quiz", "all")


@pytest.mark.parametrize("seq_len", [1, 1025])
def test_sequence_length_must_fit_the_model(loaded: LoadedModel, seq_len: int) -> None:
    with pytest.raises(OptionError, match="2 to 1024"):
        calibration_examples(loaded, "pydoc", 4, seq_len, seed=0)
