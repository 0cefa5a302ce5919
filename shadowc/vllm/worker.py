"""vLLM's CPU worker and model runner, which tell the model which tokens of a batch are decoded.

A token is a decoded one if its position is past its request's prompt. That also holds while vLLM
computes a request again that it had preempted, prompt and answer in one go: each token runs the
units that it ran before, so the answer goes on as before but for the order of sums.
"""

from __future__ import annotations

import os
import re

import numpy as np
import torch
from torch import Tensor
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from shadowc.native import CPU_LAUNCHERS

#: How vLLM says which CPUs a worker's threads are bound to, for one OpenMP library or another.
_BOUND = {
    "GOMP_CPU_AFFINITY": r"(\d+(?: \d+)*)",
    "KMP_AFFINITY": r"granularity=fine,explicit,proclist=\[([\d,]+)\]",
    "OMP_PLACES": r"\{([\d,]+)\}",
}


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
        _start_threads()

    def shadowc_counters(self) -> dict[str, int]:
        """What ran so far; for `LLM.collective_rpc("shadowc_counters")`."""
        counters: dict[str, int] = self.model_runner.get_model().counters.read()
        return counters


def _start_threads() -> None:
    """Start the native library's threads on all CPUs that vLLM gave this worker.

    OpenMP binds each of its threads to one of them, and this one too: threads that it started later
    would all share its CPU.
    """
    own = os.sched_getaffinity(0)
    said = (re.fullmatch(form, os.environ.get(name, "")) for name, form in _BOUND.items())
    bound = {int(cpu) for match in said if match for cpu in re.findall(r"\d+", match[1])}
    os.sched_setaffinity(0, bound or own)
    CPU_LAUNCHERS["linear"](torch.zeros(1, 1, 64), torch.zeros(1 << 14, 64), None)
    os.sched_setaffinity(0, own)
