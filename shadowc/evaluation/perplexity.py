"""Quality of an artifact: causal perplexity and task accuracy, with the masks that decoding has.

    artifact   its own masks: the predictor's, or fixed ones
    dense      every unit
    static     the mean scores of calibration, the same masks for every token
    random     new random scores for every token: the control
    oracle     the true scores of each token, from its own gradients: what a perfect predictor gives

All run the same program on the same weights and are scored on the same tokens; only the masks
differ. Masks that are not the artifact's own rank the whole model by the nominal budget; an
artifact that selects by threshold may run a little more or less, which stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shadowc.artifact import Artifact
from shadowc.calibration.data import Question, encode_answer, few_shot_prompts, load_questions
from shadowc.config import taps_of
from shadowc.errors import OptionError
from shadowc.evaluation.generation import compare_with_dense
from shadowc.evaluation.likelihood import BATCH_LOGITS, Request, log_likelihoods, word_perplexity
from shadowc.evaluation.masks import mask_source, teacher_forced, with_given_masks
from shadowc.evaluation.oracle import true_scores
from shadowc.evaluation.sources import as_loaded, documents, held_out, original
from shadowc.passes.insert_predictor import MaskMaker, StaticScores
from shadowc.runtime.loading import load
from shadowc.runtime.session import Session
from shadowc.selection import top_k
from shadowc.versions import versions

if TYPE_CHECKING:
    from shadowc.models import LoadedModel

AGAINST = ("dense", "static", "random", "oracle")

#: Token ids [B, T] -> scores of heads [B, T, L, H] and neurons [B, T, L, F], in ranking units.
Scores = Callable[[Tensor], tuple[Tensor, Tensor]]
#: Wraps an iterable to show progress.
Track = Callable[[Sequence[Tensor]], Iterable[Tensor]]


@dataclass
class Tally:
    """What one kind of masks made of the scored tokens.

    Attributes:
        loss: Sum of the cross-entropies, in nats.
        tokens: Scored tokens.
        heads: Share of all heads that ran, summed over tokens.
        neurons: Share of all neurons that ran, summed over tokens.
    """

    loss: float = 0.0
    tokens: int = 0
    heads: float = 0.0
    neurons: float = 0.0

    def add(self, ids: Tensor, results: dict[str, Tensor], first: int) -> None:
        """Count the predictions that the tokens from `first` on make.

        Args:
            ids: int64 [B, T].
            results: What `teacher_forced` returned.
            first: Position of the first token that decodes.
        """
        logits, targets = results["logits"][:, first:-1], ids[:, first + 1 :]
        losses = nn.functional.cross_entropy(logits.mT, targets, reduction="none")
        self.loss += float(losses.sum(dtype=torch.float64))
        self.tokens += targets.numel()
        for name in ("head", "neuron"):
            mask = results.get(f"{name}_mask")
            ran = float(targets.numel())
            if mask is not None:
                ran = float(mask[:, first:-1].sum()) / mask[0, 0].numel()
            setattr(self, f"{name}s", getattr(self, f"{name}s") + ran)

    def to_json(self) -> dict[str, Any]:
        """Perplexity and what ran."""
        return {
            "perplexity": math.exp(min(self.loss / self.tokens, 700.0)),
            "tokens": self.tokens,
            "head_sparsity": 1.0 - self.heads / self.tokens,
            "neuron_sparsity": 1.0 - self.neurons / self.tokens,
        }


def evaluate(
    session: Session,
    windows: Sequence[Sequence[int]],
    *,
    against: Sequence[str] = ("dense",),
    stride: int | None = None,
    oracle: Scores | None = None,
    seed: int = 0,
    track: Track = iter,
) -> dict[str, dict[str, Any]]:
    """Perplexity of an artifact and of other masks with the same budget.

    With a mask that is refreshed, all tokens but a window's first decode; with one mask for each
    prompt, the first half of a window is the prompt and the other half is scored. Where windows
    overlap, the tokens that a window shares with the one before are context and are not scored.

    Args:
        session: The artifact.
        windows: Token ids of the texts, as `evaluation_windows` gives them.
        against: Names out of `AGAINST`.
        stride: New tokens of each window but the first; None: windows do not overlap.
        oracle: The true scores; needed for `oracle`.
        seed: Of the random masks.
        track: Wraps the batches to show progress.

    Returns:
        For `artifact` and each name: perplexity, tokens, head_sparsity, neuron_sparsity.

    Raises:
        OptionError: If a name is unknown or this artifact cannot give it.
    """
    masks = _mask_makers(session, against, oracle, seed)
    if masks:
        given = with_given_masks(session.programs["masked"])
        session = session.with_program("given_masks", given)
    tallies = {name: Tally() for name in ("artifact", *against)}
    vocab, alone = session.shape.vocab, 1 if stride else 0
    grouped = batches(windows[:alone], vocab) + batches(windows[alone:], vocab)
    for index, ids in enumerate(track(grouped)):
        tokens = ids.shape[1]
        # The last token of the context predicts the first new one.
        context = max(tokens - stride - 1, 1) if stride and index else None
        prompt = 1 if session.policy.refresh else context or tokens // 2
        first = context or prompt
        tallies["artifact"].add(ids, teacher_forced(session, ids, prompt=prompt), first)
        if "dense" in tallies:
            tallies["dense"].add(ids, teacher_forced(session, ids, prompt=tokens), first)
        for name, make in masks.items():
            results = teacher_forced(session, ids, prompt=prompt, masks=make(ids, prompt))
            tallies[name].add(ids, results, first)
    return {name: tally.to_json() for name, tally in tallies.items()}


def batches(
    windows: Sequence[Sequence[int]], vocab: int, logits: int = BATCH_LOGITS
) -> list[Tensor]:
    """Windows of equal length together, int64 [B, T], so that the logits stay few."""
    found: list[list[Sequence[int]]] = []
    for window in windows:
        most = max(1, logits // (len(window) * vocab))
        if not found or len(found[-1][0]) != len(window) or len(found[-1]) >= most:
            found.append([])
        found[-1].append(window)
    return [torch.tensor(batch) for batch in found]


def accuracy(
    session: Session, loaded: LoadedModel, questions: Sequence[Question], *, dense: bool = False
) -> float:
    """Share of multiple-choice questions whose right choice is the likeliest.

    The question's tokens are masked too, unless the mask is made once, at the prompt's end.

    Args:
        session: The artifact.
        loaded: Its tokenizer, as `as_loaded` gives it.
        questions: Multiple-choice questions.
        dense: Run every unit instead.
    """
    requests: list[Request] = []
    for question in questions:
        for prompt, ending in question.choices:
            example = encode_answer(loaded, prompt, ending)
            start = example.scored.index(True)
            requests.append((example.ids[:start], example.ids[start:]))
    scores = iter([score for score, _ in log_likelihoods(session, requests, dense=dense)])
    right = 0
    for question in questions:
        found = [next(scores) for _ in question.choices]
        right += found.index(max(found)) == question.label
    return right / len(questions)


class _GivenScores(nn.Module):
    """A predictor that knows the scores already."""

    def __init__(self, heads: Tensor, neurons: Tensor) -> None:
        super().__init__()
        self.scores = heads[:, :, 1:], neurons

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """The given scores of layers 1.. (heads) and of all layers (neurons)."""
        return self.scores


def _mask_makers(
    session: Session, against: Sequence[str], oracle: Scores | None, seed: int
) -> dict[str, Callable[[Tensor, int], tuple[Tensor, Tensor]]]:
    """For each name that needs other masks: (ids, prompt) -> masks of heads and neurons."""
    for name in against:
        if name not in AGAINST:
            raise OptionError(
                f"nothing to compare with is called {name!r}", expected=", ".join(AGAINST)
            )
    others = [name for name in against if name != "dense"]
    if others and "mask_source" not in session.programs["masked"].inputs:
        raise OptionError(
            f"this artifact skips no units, so there is no {others[0]!r} to compare with",
            expected="--against dense",
        )
    shape = session.shape
    generator = torch.Generator().manual_seed(seed)

    def draw(ids: Tensor) -> tuple[Tensor, Tensor]:
        return (
            torch.rand(*ids.shape, shape.layers, shape.heads, generator=generator),
            torch.rand(*ids.shape, shape.layers, shape.ffn, generator=generator),
        )

    def static(ids: Tensor, prompt: int) -> tuple[Tensor, Tensor]:
        scores = (session.tensors[f"scores.{kind}"].cpu() for kind in ("heads", "neurons"))
        return _masks(StaticScores(*scores), session, ids, prompt)

    def ranked(scores: Scores) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
        return lambda ids, prompt: _masks(_GivenScores(*scores(ids)), session, ids, prompt)

    makers = {"static": static, "random": ranked(draw)}
    if "oracle" in others:
        if oracle is None:
            raise OptionError("the oracle needs the original model and its calibration")
        makers["oracle"] = ranked(oracle)
    return {name: makers[name] for name in others}


@torch.inference_mode()
def _masks(
    predictor: nn.Module, session: Session, ids: Tensor, prompt: int
) -> tuple[Tensor, Tensor]:
    batch, tokens = ids.shape
    source = mask_source(tokens, prompt=prompt, refresh=session.policy.refresh)
    shape, exact = session.shape, replace(session.policy, selection="topk")
    (whole,) = taps_of(shape.layers, (0,))
    maker = MaskMaker(predictor, *top_k(shape, exact, whole))
    _, _, heads, neurons = maker(torch.empty(batch, tokens, 1), source.expand(batch, -1))
    return torch.cat((torch.ones_like(heads[:, :, :1]), heads), dim=2), neurons


def evaluate_artifact(
    artifact: Artifact,
    *,
    data: str = "pydoc",
    seq_len: int = 256,
    stride: int | None = None,
    tokens: int = 8192,
    against: Sequence[str] = ("dense",),
    tasks: Sequence[str] = (),
    questions: int = 100,
    num_fewshot: int = 0,
    harness: bool = False,
    generate: int = 0,
    allow_jit: bool = False,
    track: Track = iter,
) -> dict[str, Any]:
    """Measure an artifact's quality: what `shadowc eval` does.

    Two perplexities of the same text: `perplexity` of a token, in windows across documents, and
    `word_perplexity`, by lm-evaluation-harness's protocol (see `likelihood`).

    Args:
        artifact: The artifact.
        data: Text it was not calibrated on.
        seq_len: Tokens of a window.
        stride: New tokens of each window but the first, the others being context; None: windows
            do not overlap.
        tokens: About how many tokens of text.
        against: Names out of `AGAINST`.
        tasks: Names of multiple-choice tasks, or TASK:FILE.jsonl.
        questions: The most questions of a task.
        num_fewshot: Answered questions before each question.
        harness: Have lm-evaluation-harness put the tasks, of which it knows more.
        generate: Tokens to generate beside the dense model; 0: none.
        allow_jit: As for `load`.
        track: Wraps the batches to show progress.

    Returns:
        The keys of the command line's `eval --json`.
    """
    if harness:  # first, because it may not be installed
        from shadowc.evaluation.lm_eval import run_tasks
    model = load(artifact.path, allow_jit=allow_jit)
    session, loaded = model.session, as_loaded(model)
    length = min(seq_len, session.max_seq_len)
    windows = held_out(model, data, length, tokens, stride)
    oracle = None
    if "oracle" in against and artifact.manifest["calibration"]:
        criterion = artifact.manifest["calibration"]["criterion"]
        oracle = true_scores(original(artifact), criterion, windows)
    variants = evaluate(
        session,
        windows,
        against=tuple(dict.fromkeys(("dense", *against))),
        stride=stride,
        oracle=oracle,
        track=track,
    )
    texts = documents(model, data, windows, tokens)
    for name in ("artifact", "dense"):
        variants[name]["word_perplexity"] = word_perplexity(
            session, loaded, texts, length, dense=name == "dense", track=track
        )
    if harness:
        results = run_tasks(session, loaded, tasks, questions, num_fewshot)
    else:
        results = {task: _ask(session, loaded, task, questions, num_fewshot) for task in tasks}
    return {
        **variants["artifact"],
        "dense_perplexity": variants["dense"]["perplexity"],
        "dense_word_perplexity": variants["dense"]["word_perplexity"],
        "variants": variants,
        "tasks": results,
        "num_fewshot": num_fewshot,
        "generation": compare_with_dense(session, windows, generate, track=track)
        if generate
        else None,
        "data": data,
        "seq_len": length,
        "stride": stride,
        "model": artifact.manifest["model"]["name"],
        "versions": versions(),
    }


def _ask(
    session: Session, loaded: LoadedModel, task: str, questions: int, shots: int
) -> dict[str, Any]:
    """One task, sparse and dense."""
    asked = load_questions(task, "evaluation")[:questions]
    asked = few_shot_prompts(loaded, task, asked, shots, session.max_seq_len)
    return {
        "accuracy": accuracy(session, loaded, asked),
        "dense_accuracy": accuracy(session, loaded, asked, dense=True),
        "questions": len(asked),
        "scorer": "shadowc",
    }
