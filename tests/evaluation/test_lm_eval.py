"""The harness and our own scorer agree, on the same tokens and the same masks."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate, utils
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from shadowc.calibration.data import load_questions
from shadowc.config import Policy
from shadowc.errors import ArtifactError, DataError, OptionError
from shadowc.evaluation.generation import continue_greedily
from shadowc.evaluation.likelihood import rolling_windows, word_perplexity
from shadowc.evaluation.lm_eval import ShadowLM, run_tasks
from shadowc.evaluation.perplexity import accuracy

HALF = Policy(0.5, 0.5, min_neurons=2)
TEXTS = ["It was late.\n She had not come.", "He said that the sea was calm and grey. " * 8]


@pytest.fixture
def piqa(tmp_path):
    """A task's file; its last quarter, 8 questions, is put."""
    ends = ("the sea", "a ship", "his hat", "to go home", "not", "an old dog", "her", "so long")
    path = tmp_path / "piqa.jsonl"
    choices = [(ends[i % 8], ends[(3 * i + 1) % 8]) for i in range(32)]
    rows = (
        {"goal": f"Day {i}", "sol1": first, "sol2": second, "label": i // 3 % 2}
        for i, (first, second) in enumerate(choices)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"piqa:{path}"


@pytest.mark.parametrize("refresh", [0, 1])
def test_the_harness_finds_what_we_find(tiny, piqa, refresh):
    session = tiny.session(Policy(0.5, 0.5, refresh=refresh, min_neurons=2))
    found = run_tasks(session, tiny.loaded, [piqa])[piqa]
    asked = load_questions(piqa, "evaluation")
    assert found["questions"] == len(asked) == 8 and found["scorer"].startswith("lm-eval 0.4")
    assert found["accuracy"] == accuracy(session, tiny.loaded, asked)
    assert found["dense_accuracy"] == accuracy(session, tiny.loaded, asked, dense=True)
    assert 0 < found["accuracy"] < 1 and "acc_norm" in found["metrics"]


def test_dense_is_the_harness_own_hugging_face_model(tiny, piqa, monkeypatch):
    """Scores themselves, few-shot, with prompts in batches."""
    answers = []
    original = ShadowLM._loglikelihood_tokens
    hugging_face = HFLM(tiny.loaded.model, tokenizer=tiny.loaded.tokenizer, batch_size=2)

    def both(self, requests, *rest, **options):
        found = original(self, requests, *rest, **options)
        answers.append((found, hugging_face._loglikelihood_tokens(requests)))
        return found

    monkeypatch.setattr(ShadowLM, "_loglikelihood_tokens", both)
    run_tasks(tiny.session(HALF), tiny.loaded, [piqa], questions=4, num_fewshot=1)
    _, (ours, theirs) = answers  # sparse, dense
    assert [a for a, _ in ours] == pytest.approx([a for a, _ in theirs], rel=1e-3)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_word_perplexity_is_the_harness(tiny, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "texts.yaml").write_text(
        "task: texts\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {path}}}, cache_dir: {tmp_path}}}\n"
        "test_split: test\n"
        "output_type: loglikelihood_rolling\n"
        "doc_to_text: ''\n"
        "doc_to_target: '{{text}}'\n"
        "metric_list: [{metric: word_perplexity}]\n"
    )
    session, length = tiny.session(HALF), 24
    hugging_face = HFLM(
        tiny.loaded.model, tokenizer=tiny.loaded.tokenizer, max_length=length, add_bos_token=False
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    for model, dense in (
        (ShadowLM(session, tiny.loaded, max_length=length), False),
        (ShadowLM(session, tiny.loaded, max_length=length, dense=True, batch_size=3), True),
        (hugging_face, True),
    ):
        results = simple_evaluate(
            model, tasks=["texts"], task_manager=manager, bootstrap_iters=0
        )  # fmt: skip
        theirs = results["results"]["texts"]["word_perplexity,none"]
        ours = word_perplexity(session, tiny.loaded, TEXTS, length, dense=dense)
        assert ours == pytest.approx(theirs, rel=2e-3)


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 16, 20])
def test_windows_are_those_of_the_harness(tokens):
    ids = list(range(tokens))
    theirs = utils.get_rolling_token_windows(ids, -1, 8, 1)
    assert rolling_windows(ids, -1, 8) == list(map(utils.make_disjoint_window, theirs))


def request(*arguments):
    return SimpleNamespace(args=arguments)


def test_generation_ends_at_a_stop_string_and_the_prompt_loses_its_beginning(tiny_opt):
    session, tokenizer = tiny_opt.session(HALF), tiny_opt.loaded.tokenizer
    model = ShadowLM(session, tiny_opt.loaded)
    long = "It was late, and the sea was calm. " * 10
    prompts = [model.tok_encode("It was"), model.tok_encode(long)[-(64 - 12) :]]
    texts = [tokenizer.decode(continue_greedily(session, prompt, 12)) for prompt in prompts]
    options = {"until": [], "max_gen_toks": 12}
    asked = [request("It was", options), request(long, options)]
    whole = [text.split("</s>")[0] for text in texts]
    assert model.generate_until(asked) == whole
    stop = re.findall(r"\w+", whole[0])[2]
    options = {"until": [stop], "max_gen_toks": 12}
    assert model.generate_until([request("It was", options)]) == [whole[0].split(stop)[0]]
    with pytest.raises(OptionError, match="greedy"):
        model.generate_until([request("It", {"do_sample": True, "temperature": 1.0})])
    with pytest.raises(OptionError, match="max_gen_toks"):
        model.generate_until([request("It", {"max_gen_toks": 64})])


def test_contexts_lose_their_beginning_as_with_the_harness_own_model(tiny_opt):
    session, loaded = tiny_opt.session(HALF), tiny_opt.loaded
    pairs = [request("It was late. " * 30, " and calm"), request("", "It was late")]
    ours = ShadowLM(session, loaded, dense=True).loglikelihood(pairs)
    theirs = HFLM(loaded.model, tokenizer=loaded.tokenizer, max_length=64).loglikelihood(pairs)
    assert [a for a, _ in ours] == pytest.approx([a for a, _ in theirs], rel=1e-3)
    with pytest.raises(OptionError, match="at most 64"):
        ShadowLM(session, loaded).loglikelihood([request("It", " was late" * 64)])


def test_arguments_that_are_not_understood(tiny_opt, tmp_path):
    session, loaded = tiny_opt.session(HALF), tiny_opt.loaded
    for arguments in ("", "pretrained=gpt2", "artifact=x,speed=2"):
        with pytest.raises(OptionError, match="artifact=DIR"):
            ShadowLM.create_from_arg_string(arguments)
    with pytest.raises(ArtifactError, match="not an artifact"):
        ShadowLM.create_from_arg_string(f"artifact={tmp_path}")
    with pytest.raises(OptionError, match="1 to 64"):
        ShadowLM(session, loaded, max_length=65)
    with pytest.raises(DataError, match="no task 'chess'"):
        run_tasks(session, loaded, ["chess"])
    (tmp_path / "other.jsonl").write_text('{"goal": "x"}\n' * 8)
    with pytest.raises(DataError, match=r"(?s)could not run piqa:.*the fields of the hub"):
        run_tasks(session, loaded, [f"piqa:{tmp_path / 'other.jsonl'}"])
