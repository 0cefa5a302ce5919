"""A loaded artifact as a transformers model: `generate` with everything it can do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from shadowc.errors import LengthError, OptionError
from shadowc.runtime.ahead import sample_ahead
from shadowc.runtime.cache import KVCache
from shadowc.runtime.config import ShadowcConfig
from shadowc.runtime.session import Session


class ShadowcForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A causal language model that runs an artifact's programs.

    Greedy search, sampling, beam search, streamers, stopping criteria and batches padded on the
    left are transformers' own; this class brings the forward pass, the cache and, for a GPU, a loop
    that does not wait for every token.

    Attributes:
        session: The programs; `session.step` is the loop's bare step.
        manifest: What the artifact says of itself.
        tokenizer: The model's tokenizer.
    """

    config_class = ShadowcConfig
    main_input_name = "input_ids"
    _is_stateful = False
    _supports_sdpa = True  # whatever the config asks for: attention is in the programs
    _supports_flash_attn = True

    def __init__(
        self,
        config: PreTrainedConfig,
        generation_config: GenerationConfig,
        session: Session,
        manifest: dict[str, Any],
        tokenizer: Any = None,
    ) -> None:
        super().__init__(config)
        self.generation_config = generation_config
        self.session, self.manifest, self.tokenizer = session, manifest, tokenizer
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where inputs belong."""
        return self.session.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of activations and logits."""
        return torch.float32

    def can_generate(self) -> bool:
        """Yes; transformers asks because the class has no checkpoint of its own."""
        return True

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: KVCache | None = None,
        use_cache: bool | None = None,
        **ignored: Any,
    ) -> CausalLMOutputWithPast:
        """One step of generation, or a whole sequence at once.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, filled + T] of 0 and 1, zeros on the left only; None means no
                padding.
            past_key_values: The cache to go on with; None starts one.
            use_cache: False runs the masked program over the whole sequence instead, every token
                with its own mask, and returns the logits of all tokens: what scoring needs.
            **ignored: Other arguments that `generate` passes and that change nothing here.

        Returns:
            Logits fp32 [B, 1, V] (with a cache: of the last token) or [B, T, V].

        Raises:
            LengthError: If the tokens exceed the compiled length.
            OptionError: If the padding is not on the left.
        """
        if use_cache is False:
            from shadowc.evaluation.masks import teacher_forced

            return CausalLMOutputWithPast(logits=teacher_forced(self.session, input_ids)["logits"])
        cache = past_key_values
        if cache is None:
            cache = self.session.new_cache(input_ids.shape[0])
        if cache.length == 0 and attention_mask is not None:
            cache.start = padding(attention_mask)
        logits = self.session.step(input_ids, cache)["logits"]
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Greedy search and sampling: called by `generate` once everything is prepared."""
        cache = model_kwargs.get("past_key_values")
        plain = not (generation_config.return_dict_in_generate or synced_gpus)
        if not (plain and self.session.runs_ahead and isinstance(cache, KVCache)):
            return super()._sample(
                input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus,
                streamer, **model_kwargs,
            )  # fmt: skip
        mask = model_kwargs.get("attention_mask")
        if cache.length == 0 and mask is not None:
            cache.start = padding(mask)
        return sample_ahead(
            self.session, input_ids, cache, logits_processor, stopping_criteria,
            generation_config, streamer,
        )  # fmt: skip

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Called by `generate` before anything runs: refuse what does not fit, make the cache."""
        limit = self.session.max_seq_len
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            limit = cache.capacity
        if generation_config.max_length > limit:
            raise LengthError(
                "the prompt and the new tokens do not fit in the compiled length",
                expected=f"at most {limit} tokens together",
                got=generation_config.max_length,
                fix="ask for fewer new tokens, or compile with a larger --max-seq-len",
            )
        if cache is None:
            rows = batch_size * max(
                generation_config.num_beams or 1, generation_config.num_return_sequences or 1
            )
            model_kwargs["past_key_values"] = self.session.new_cache(
                rows, generation_config.max_length
            )


def padding(attention_mask: Tensor) -> Tensor:
    """Number of padding slots on the left of each row, int64 [B].

    Raises:
        OptionError: If a zero stands to the right of a one.
    """
    mask = attention_mask.to(torch.int64)
    start = mask.shape[1] - mask.sum(dim=1)
    slots = torch.arange(mask.shape[1], device=mask.device)
    if not torch.equal(mask, (slots >= start[:, None]).to(torch.int64)):
        raise OptionError(
            "the attention mask has padding that is not on the left",
            expected="zeros, then ones, in each row",
            fix='tokenize with padding_side="left"',
        )
    return start
