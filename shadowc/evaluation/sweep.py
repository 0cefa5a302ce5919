"""Quality of many policies on one model, without an artifact for each.

What a policy means is its masked program; an artifact's decode program is checked against it when
it is compiled. So a table of criteria and budgets needs the model traced once and masked programs
only.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import fx

from shadowc.calibration.store import Calibration
from shadowc.config import Policy
from shadowc.models import LoadedModel
from shadowc.passes.canonicalize import canonicalize
from shadowc.passes.find_blocks import find_blocks
from shadowc.passes.insert_predictor import StaticScores, export_masks, insert_predictor
from shadowc.passes.manager import copy_module, run_passes
from shadowc.passes.mask_attention import mask_attention
from shadowc.passes.mask_mlp import mask_mlp
from shadowc.passes.pack_weights import Packed, pack_weights
from shadowc.runtime.program import to_program
from shadowc.runtime.session import Session


def masked_session(
    traced: fx.GraphModule,
    loaded: LoadedModel,
    calibration: Calibration,
    policy: Policy,
    dtype: torch.dtype,
) -> Session:
    """A session that has the masked program only: all that `evaluate` needs.

    Args:
        traced: What `trace` gave, as a module; left as it is.
        loaded: The model it came from.
        calibration: What chooses the units.
        policy: How many units run.
        dtype: Type of the stored matrices.
    """
    shape = loaded.shape
    means = calibration.mean_head_scores, calibration.mean_neuron_scores
    predictor = calibration.build_predictor() or StaticScores(*means)
    width = shape.heads * shape.head_dim if calibration.feature == "context" else shape.hidden
    masks = export_masks(predictor, shape, policy, width)
    packed: Packed = {}
    passes = (
        canonicalize,
        partial(find_blocks, shape=shape),
        partial(insert_predictor, masks=masks, feature=calibration.feature),
        mask_attention,
        mask_mlp,
        partial(pack_weights, dtype=dtype, packed=packed),
    )
    module = run_passes(copy_module(traced), passes)
    program = to_program(module, ("logits", "head_mask", "neuron_mask"))
    packed |= {"scores.heads": means[0], "scores.neurons": means[1]}
    return Session(shape, policy, {"masked": program}, packed, {}, shape.max_positions)
