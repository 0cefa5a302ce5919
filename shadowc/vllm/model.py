"""An artifact as a model of vLLM's: its own programs, over vLLM's paged cache.

Prompts run the program `dense`; a batch with decoded tokens runs the program that decodes, each
decoded token with its own heads and neurons (see `cut.py`), prompts beside them with all. vLLM's
attention has the cache; everything else is the artifact's graph (see `body.py`). Weights are mapped
from the artifact's files once they are checked; vLLM's loaders read nothing.

There are no probes here (`runtime/watch.py`): they ask programs for gradients through a cache of
our own. Serve with transformers to watch for drift.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention

from shadowc.artifact import open_artifact
from shadowc.errors import OptionError
from shadowc.native import CPU_LAUNCHERS
from shadowc.runtime.loading import load_session
from shadowc.runtime.watch import Counters, announce
from shadowc.vllm.body import Body, make_body
from shadowc.vllm.cut import Cut


class ShadowcForCausalLM(nn.Module):
    """The model that vLLM makes of an artifact.

    Args:
        vllm_config: vLLM's configuration; `plugin.Checks` has seen it.
        prefix: What names of layers begin with.

    Attributes:
        counters: What ran so far.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        artifact = open_artifact(vllm_config.model_config.model)
        session = load_session(artifact)
        self.counters, self._session = session.counters, session
        self._cut = Cut(1 - session.policy.neuron_sparsity)
        name = session.step_program(session.new_cache(1, 1))
        self._dense, self._step = self._body("dense"), self._body(name)
        self._head = session.tensors[self._step.head]
        shape = session.shape
        self.layers = nn.ModuleList(
            Attention(
                shape.heads,
                shape.head_dim,
                scale,
                shape.kv_heads,
                cache_config=vllm_config.cache_config,
                prefix=f"{prefix}.layers.{layer}.attn".lstrip("."),
            )
            for layer, scale in enumerate(self._step.scales)
        )
        self._metrics = _Metrics() if "PROMETHEUS_MULTIPROC_DIR" in os.environ else None
        announce(artifact.path, artifact.manifest, "vLLM")

    def _body(self, name: str) -> Body:
        session = self._session
        return make_body(
            session.program(name), session.tensors, self._cut, self._attend, session.shape.head_dim
        )

    def _attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        context: Tensor = self.layers[layer](query, key, value)
        return context

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Refused: programs begin with tokens.

        Raises:
            OptionError: Always.
        """
        raise OptionError("an artifact takes tokens, not embeddings")

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        decoded: Tensor | None = None,
    ) -> Tensor:
        """One batch.

        Args:
            input_ids: int [T], the tokens of all requests, one after the other.
            positions: int64 [T], each token's place in its request.
            intermediate_tensors: None: there is no pipeline.
            inputs_embeds: None: prompts are tokens.
            decoded: bool [T], which tokens are past their prompts; None in vLLM's dummy runs, which
                do not count.

        Returns:
            float32 [T, C], what `compute_logits` takes.
        """
        count = 0 if decoded is None else int(decoded.sum())
        body = self._step if count else self._dense
        given = {"input_ids": input_ids.long()[:, None], "position_ids": positions[:, None]}
        if decoded is not None and count:
            self._cut.begin(decoded)
            for name, sets in self._session.static_keep.items():
                given[name] = sets.expand(-1, count, *sets.shape[2:]).contiguous()
        hidden, *kept = body.run(*(given[name] for name in body.inputs))
        if decoded is not None:
            found = dict(zip(body.kept, kept, strict=True))
            self._count(len(input_ids) - count, count, found or given)
        return hidden[:, 0]

    def _count(self, prompt: int, decoded: int, kept: dict[str, Tensor]) -> None:
        batch = Counters(self._session.shape)
        for counters in (self.counters, batch):
            counters.prompt_tokens += prompt
            if decoded:
                counters.decoded(decoded, kept)
        if self._metrics is not None:
            self._metrics.add(batch)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Logits float32 [n, V] of hidden states [n, C]."""
        logits: Tensor = CPU_LAUNCHERS["linear"](hidden_states.contiguous(), self._head, None)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Nothing is left to load."""
        return set()


class _Metrics:
    """The counters at vLLM's `/metrics`, which another process answers."""

    def __init__(self) -> None:
        from prometheus_client import Counter

        self._counters = {
            "prompt_tokens": Counter("shadowc_prompt_tokens", "Tokens of prompts, which run dense"),
            "tokens": Counter("shadowc_tokens", "Tokens decoded"),
            "heads": Counter("shadowc_heads", "Heads that ran for decoded tokens"),
            "neurons": Counter("shadowc_neurons", "Neurons that ran for decoded tokens"),
            "heads_dense": Counter("shadowc_heads_dense", "Heads that dense decoding would run"),
            "neurons_dense": Counter("shadowc_neurons_dense", "Neurons that it would run"),
        }

    def add(self, batch: Counters) -> None:
        """Add what ran for a batch."""
        for name, value in batch.read().items():
            self._counters[name].inc(value)
