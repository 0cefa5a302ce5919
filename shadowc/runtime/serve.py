"""`shadowc serve`: transformers' own server, which then knows artifacts.

The server, its options and its OpenAI endpoints are those of `transformers serve`. Two things are
ours, because an artifact has a compiled length: a request that does not fit is answered 400 before
anything runs (transformers finds out while it generates: 500, or an error within the stream), and
no number of new tokens, or transformers' default of 1,024, means as many as fit.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from shadowc.artifact import open_artifact
from shadowc.errors import LengthError, OptionError, ShadowcError
from shadowc.runtime.session import no_tokens
from shadowc.runtime.watch import ALARM, EVERY, Watch

_DEFAULT_NEW_TOKENS = 1024  # of transformers


def serve(
    artifact: str, options: Sequence[str], probe_every: int | None, probe_alarm: float | None
) -> None:
    """Serve an artifact until interrupted.

    Args:
        artifact: The directory that `shadowc compile` wrote.
        options: Further options of `transformers serve`.
        probe_every: Probe every n-th request; see `runtime/watch.py`.
        probe_alarm: Recall below which probes warn.

    Raises:
        OptionError: If transformers' server is not installed, or an option does not fit.
        ArtifactError: If the artifact is missing or damaged.
    """
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise OptionError("transformers' server is not installed",
                          fix="pip install 'shadowc[serve]'")  # fmt: skip
    if {"--continuous-batching", "--compile", "--quantization"} & set(options):
        raise OptionError(
            "an artifact is compiled: it decodes one request at a time as it is",
            fix="leave --continuous-batching, --compile and --quantization out; for batches of "
            "requests serve it with vLLM",
        )
    Watch(probe_every, probe_alarm)  # refuses what is out of range before anything is loaded
    for name, value in ((EVERY, probe_every), (ALARM, probe_alarm)):
        if value is not None:
            os.environ[name] = str(value)
    open_artifact(artifact)
    _extend()
    from transformers.cli.transformers import app

    app(["serve", artifact, *options], standalone_mode=True)


def _extend() -> None:
    """Give transformers' server our model class, our limit and our errors."""
    import transformers
    from fastapi import Request
    from fastapi.responses import JSONResponse
    from transformers.cli.serving import server, utils

    from shadowc.runtime.config import ARCHITECTURE, ONNX_ARCHITECTURE
    from shadowc.runtime.model import ShadowcForCausalLM

    for name in (ARCHITECTURE, ONNX_ARCHITECTURE):  # where it looks architectures up
        setattr(transformers, name, ShadowcForCausalLM)
    build = server.build_server

    class Manager(utils.GenerateManager):  # type: ignore[misc]
        """Looks at a request's length first."""

        def generate_streaming(self, model: Any, processor: Any, inputs: Any, config: Any,
                               *rest: Any, **more: Any) -> Any:  # fmt: skip
            _fit(model, inputs, config)
            return super().generate_streaming(model, processor, inputs, config, *rest, **more)

        async def generate_non_streaming(self, model: Any, processor: Any, inputs: Any, config: Any,
                                         *rest: Any, **more: Any) -> Any:  # fmt: skip
            _fit(model, inputs, config)
            run = super().generate_non_streaming
            return await run(model, processor, inputs, config, *rest, **more)

    def build_server(*arguments: Any, **options: Any) -> Any:
        """Its app, with our errors, and what ran at /counters."""
        app = build(*arguments, **options)

        @app.exception_handler(ShadowcError)  # type: ignore[untyped-decorator]
        async def refuse(_: Request, error: ShadowcError) -> JSONResponse:
            body = {"message": str(error), "type": "invalid_request_error", "code": 400}
            return JSONResponse({"error": body}, status_code=400)

        @app.get("/counters")  # type: ignore[untyped-decorator]
        def counters() -> dict[str, Any]:
            loaded = arguments[0].loaded_models
            return {
                name: one.model.counters()
                for name, one in loaded.items()
                if isinstance(one.model, ShadowcForCausalLM)
            }

        return app

    utils.GenerateManager = Manager
    server.build_server = build_server


def _fit(model: Any, inputs: Any, config: Any) -> None:
    """Refuse a request that is empty or longer than the artifact; bound one of no length."""
    limit, prompt = model.session.max_seq_len, inputs["input_ids"].shape[-1]
    if not prompt:
        raise no_tokens()
    new = config.max_new_tokens
    if new in (None, _DEFAULT_NEW_TOKENS):
        new = config.max_new_tokens = max(1, min(_DEFAULT_NEW_TOKENS, limit - prompt))
    if prompt + new > limit:
        raise LengthError(
            "the request is longer than the compiled length",
            expected=f"at most {limit} tokens, prompt and answer together",
            got=f"{prompt} + {new}",
            fix="ask for fewer new tokens (max_tokens), or shorten the prompt",
        )
