"""A loaded artifact as a transformers model: `generate` with everything it can do."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from shadowc.errors import LengthError, OptionError
from shadowc.runtime.ahead import sample_ahead
from shadowc.runtime.cache import KVCache
from shadowc.runtime.config import ShadowcConfig
from shadowc.runtime.session import Session, no_tokens
from shadowc.runtime.watch import Watch

_LOADING = ("config", "device_map", "dtype", "torch_dtype", "quantization_config")


class ShadowcForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A causal language model that runs an artifact's programs.

    Greedy search, sampling, beam search, streamers, stopping criteria and batches padded on the
    left are transformers' own; this class brings the forward pass, the cache and, for a GPU, a loop
    that does not wait for every token.

    Attributes:
        session: The programs; `session.step` is the loop's bare step.
        manifest: What the artifact says of itself.
        watch: Probes every n-th request, if asked.
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
        watch: Watch | None = None,
    ) -> None:
        super().__init__(config)
        self.generation_config = generation_config
        self.session, self.manifest, self.tokenizer = session, manifest, tokenizer
        self.watch = watch or Watch()
        self.eval()

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> ShadowcForCausalLM:
        """Load an artifact, as `AutoModelForCausalLM.from_pretrained` does.

        Args:
            path: The directory that `shadowc compile` wrote.
            **options: Those of `shadowc.load`. Of transformers' own, `dtype` and `device_map` must
                agree with the artifact, whose types and device were fixed when it was compiled;
                the others have nothing to act on.

        Raises:
            OptionError: If an option asks for what the artifact is not.
            ArtifactError: If it is missing or damaged.
        """
        from shadowc.runtime.loading import load

        own = {
            name: options[name] for name in inspect.signature(load).parameters if name in options
        }
        model = load(path, **own)
        asked = {name: options[name] for name in _LOADING if options.get(name) is not None}
        dtype, device = asked.get("dtype", asked.get("torch_dtype")), asked.get("device_map")
        if isinstance(device, dict):
            device = device.get("")
        stored = model.manifest["dtype"]
        if str(dtype).removeprefix("torch.") not in ("None", "auto", stored):
            raise OptionError(
                f"{path} has weights of one type",
                expected=f'dtype="auto" or {stored}',
                got=dtype,
                fix="leave dtype out, or compile with another --dtype",
            )
        if device not in (None, "auto") and not _is_here(device, model.device):
            raise OptionError(
                f"{path} runs where its target is",
                expected=f'device_map="auto" or {model.device} (target {model.manifest["target"]})',
                got=device,
                fix="leave device_map out, or compile for another --target",
            )
        if "quantization_config" in asked:
            raise OptionError(f"{path} is compiled: it cannot be quantised when it is loaded")
        return model

    def save_pretrained(self, *arguments: Any, **options: Any) -> None:
        """Refused: an artifact is a directory already.

        Raises:
            OptionError: Always.
        """
        raise OptionError(
            "a loaded artifact is not saved again", fix="copy the artifact's directory instead"
        )

    def to(self, *arguments: Any, **options: Any) -> ShadowcForCausalLM:
        """The model where it is.

        Raises:
            OptionError: If it shall go to another device or type.
        """
        device, dtype, *_ = torch._C._nn._parse_to(*arguments, **options)
        here = device is None or _is_here(device, self.device)
        if not here or dtype not in (None, self.dtype):
            raise OptionError(
                "an artifact runs on the device and with the types that it was compiled for",
                expected=f"{self.device}, {self.dtype}",
                got=device or dtype,
                fix="compile for another --target",
            )
        return self

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
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: KVCache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **ignored: Any,
    ) -> CausalLMOutputWithPast:
        """One step of generation, or the logits of whole sequences.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, filled + T] of 0 and 1; None means no padding. With a cache zeros
                are on the left, the same as when it was new; without one they are on the right.
            past_key_values: The cache to go on with.
            use_cache: True starts a cache where none is given. Otherwise, without a cache, whole
                sequences run in one pass, every token but the first with the mask that decoding
                gives it: what scoring needs.
            labels: int64 [B, T], -100 where nothing is scored: adds transformers' `loss`.
            inputs_embeds: Refused, as what is within an artifact is not reached from outside.
            output_hidden_states: As `inputs_embeds`.
            output_attentions: As `inputs_embeds`.
            **ignored: Other arguments that `generate` passes and that change nothing here.

        Returns:
            Logits fp32 [B, 1, V] of the last token with a cache, [B, T, V] without.

        Raises:
            LengthError: If the tokens exceed the compiled length.
            OptionError: If the padding is on the other side, or more is asked than logits.
        """
        if input_ids is None or inputs_embeds is not None:
            raise OptionError("an artifact takes token ids", expected="input_ids")
        if output_hidden_states or output_attentions:
            raise OptionError(
                "an artifact returns logits, no hidden states and no attentions",
                fix="leave output_hidden_states and output_attentions out",
            )
        cache = past_key_values
        if cache is not None and not isinstance(cache, KVCache):
            raise OptionError(
                "an artifact has a cache of its own",
                expected="past_key_values=model.session.new_cache(batch), or none",
                got=type(cache).__name__,
            )
        if cache is None and not use_cache:
            return self._score(input_ids, attention_mask, labels)
        if labels is not None:
            raise OptionError("labels are for whole sequences", fix="leave use_cache out")
        if cache is None:
            cache = self.session.new_cache(input_ids.shape[0])
        _set_padding(cache, attention_mask, input_ids.shape[1])
        logits = self.session.step(input_ids, cache)["logits"]
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def counters(self) -> dict[str, float]:
        """What ran since the artifact was loaded: `Counters.read` and `Watch.mean`."""
        with self.session.lock:
            return {
                **self.session.counters.read(),
                "requests": self.watch.requests,
                **self.watch.mean(),
            }

    def _score(
        self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None
    ) -> CausalLMOutputWithPast:
        """Logits of all tokens, in one pass over the masked program."""
        from shadowc.evaluation.masks import teacher_forced

        if attention_mask is not None:
            padding(attention_mask.flip(1))
        if not input_ids.numel():
            raise no_tokens()
        if input_ids.shape[1] > self.session.max_seq_len:
            raise LengthError(
                "the sequence is longer than the compiled length",
                expected=f"at most {self.session.max_seq_len} tokens",
                got=input_ids.shape[1],
                fix="score shorter windows, or compile with a larger --max-seq-len",
            )
        logits = teacher_forced(self.session, input_ids)["logits"]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def generate(self, *arguments: Any, **options: Any) -> Any:
        """As transformers' own; every n-th request is probed, if that was asked for."""
        inputs = arguments[0] if arguments else options.get("inputs", options.get("input_ids"))
        if isinstance(inputs, Tensor) and not inputs.numel():
            raise no_tokens()
        found = super().generate(*arguments, **options)
        if getattr(options.get("generation_config"), "is_assistant", False):
            return found  # a draft is no request
        with self.session.lock:
            due = self.watch.due()
        if due:
            ids = found if isinstance(found, Tensor) else found.sequences
            mask = options.get("attention_mask")
            start = 0 if mask is None else int(padding(mask)[0])
            prompt = 1 if inputs is None else inputs.shape[1]
            ids = ids[:1, start : prompt + self._answer_length(ids[0, prompt:])]
            self.watch.probe(self.session, ids, prompt - start)
        return found

    def _answer_length(self, answer: Tensor) -> int:
        """Tokens of one row's answer, without the padding that follows its end."""
        ends = torch.tensor(self.generation_config.eos_token_id or [], device=answer.device)
        found = torch.isin(answer, ends).nonzero()
        return int(found[0]) + 1 if len(found) else len(answer)

    def _assisted_decoding(self, *arguments: Any, **options: Any) -> Any:
        """Refused: it verifies several tokens at once, and each has its own units.

        Raises:
            OptionError: Always.
        """
        raise OptionError(
            "an artifact cannot verify what an assistant drafts: several tokens at once would "
            "read all units",
            expected="no assistant_model, prompt_lookup_num_tokens or other drafts",
            fix="let the artifact draft for a dense model: "
            "dense.generate(..., assistant_model=artifact)",
        )

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
        _set_padding(cache, model_kwargs.get("attention_mask"), input_ids.shape[1] - cache.length)
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
        kind = generation_config.cache_implementation
        if generation_config.use_cache is False or kind not in (None, "static", "dynamic"):
            raise OptionError(
                "an artifact generates with its own static cache",
                expected='use_cache=True, cache_implementation "static", "dynamic" or none',
                got=kind or "use_cache=False",
            )
        limit = self.session.max_seq_len
        cache = model_kwargs.get("past_key_values")
        if isinstance(cache, KVCache):
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
            # A draft's cache serves the longer drafts that follow.
            room = None if generation_config.is_assistant else generation_config.max_length
            model_kwargs["past_key_values"] = self.session.new_cache(rows, room)


def _is_here(asked: Any, here: torch.device) -> bool:
    """Whether a device that was asked for, by number, name or as one, is this one."""
    try:
        device = torch.device(f"cuda:{asked}" if isinstance(asked, int) else asked)
    except (RuntimeError, TypeError):
        return False
    return device.type == here.type and device.index in (None, here.index or 0)


def _set_padding(cache: KVCache, attention_mask: Tensor | None, tokens: int) -> None:
    """Tell a new cache its padding; refuse another one for a cache that goes on.

    Raises:
        OptionError: If the padding is not on the left, or not what the cache began with.
    """
    if attention_mask is None or (cache.length and tokens == 1):
        return  # one token brings no padding, and asking costs as much as a small step
    start = padding(attention_mask)
    if not cache.length:
        cache.start = start
    elif not torch.equal(start.to(cache.start.device), cache.start):
        raise OptionError(
            "the attention mask has other padding than the cache began with",
            expected=f"{cache.start.tolist()} zeros on the left of the rows, then ones",
            got=start.tolist(),
            fix="pad all turns of a conversation in its first one, or begin a new cache",
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
