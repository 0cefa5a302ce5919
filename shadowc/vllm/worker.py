"""vLLM's CPU worker and model runner, which tell the model which tokens of a batch are decoded.

A token is a decoded one if its position is past its request's prompt. That also holds while vLLM
computes a request again that it had preempted, prompt and answer in one go: each token runs the
units that it ran before, so the answer goes on as before but for the order of sums.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from shadowc.native import use_openmp


class ShadowcRunner(CPUModelRunner):  # type: ignore[misc]
    """The runner, whose model is told more."""

    def _model_forward(
        self, input_ids: Tensor | None = None, positions: Tensor | None = None, **more: object
    ) -> Tensor:
        """Called by the runner for every batch."""
        hidden: Tensor = self.model(
            input_ids=input_ids, positions=positions, decoded=self._decoded(positions), **more
        )
        return hidden

    def _decoded(self, positions: Tensor | None) -> Tensor:
        """bool [T]: which tokens of this batch are past their request's prompt."""
        assert positions is not None  # None only with encoders
        requests = self.input_batch.num_reqs
        scheduled = np.diff(self.query_start_loc.np[: requests + 1])
        prompts = np.repeat(self.input_batch.num_prompt_tokens[:requests], scheduled)
        decoded = torch.zeros(len(positions), dtype=torch.bool)
        decoded[: len(prompts)] = positions[: len(prompts)] >= torch.from_numpy(prompts)
        return decoded


class ShadowcWorker(CPUWorker):  # type: ignore[misc]
    """The worker with that runner."""

    def init_device(self) -> None:
        """Called once, before the model is loaded."""
        super().init_device()
        self.model_runner = ShadowcRunner(self.vllm_config, self.device)
        use_openmp()  # as vLLM's attention does, and on its CPUs

    def shadowc_counters(self) -> dict[str, int]:
        """What ran so far; for `LLM.collective_rpc("shadowc_counters")`."""
        counters: dict[str, int] = self.model_runner.get_model().counters.read()
        return counters
