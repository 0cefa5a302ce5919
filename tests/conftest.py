"""Tiny OPT and Llama models, traced once, for tests that need a graph rather than a good model."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch import Tensor, fx
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from shadowc.calibration.damage import LEVELS
from shadowc.calibration.predictor import ShadowPredictor
from shadowc.calibration.quantiles import QUANTILES, histogram
from shadowc.calibration.quantiles import quantiles as quantiles_of
from shadowc.calibration.store import Calibration
from shadowc.compiler import build_programs
from shadowc.config import Policy, taps_of
from shadowc.models import LoadedModel, ModelSource, load_model, model_shape
from shadowc.passes.canonicalize import canonicalize
from shadowc.passes.find_blocks import find_blocks
from shadowc.passes.insert_predictor import TapMasks, export_masks, insert_predictor
from shadowc.passes.manager import copy_module, run_passes
from shadowc.passes.mask_attention import mask_attention
from shadowc.passes.mask_mlp import mask_mlp
from shadowc.runtime.session import Session
from shadowc.selection import selections
from shadowc.targets import load_target
from shadowc.trace import trace

VOCAB = 8192  # that of the bundled tokenizer
#: Files that take minutes, which begin first: so no process is left alone with one at the end.
SLOW = ("cuda/test_ops.py", "cuda/test_nodes.py", "test_cli.py", "test_cuda_target.py",
        "test_killed.py", "test_cpp.py", "cuda/test_select.py", "test_faults.py",
        "serving/test_transformers.py", "test_sweep.py", "test_examples.py", "test_rules.py",
        "test_ranks.py", "test_stored.py")  # fmt: skip


def pytest_collection_modifyitems(items):
    def rank(item):
        path = item.path.as_posix()
        return next((place for place, name in enumerate(SLOW) if path.endswith(name)), len(SLOW))

    items.sort(key=rank)


@dataclass
class Tiny:
    """A model of three layers with its traced graph and a calibration of random weights."""

    loaded: LoadedModel
    traced: fx.GraphModule
    calibration: Calibration
    built: dict[object, object] = field(default_factory=dict)

    @property
    def shape(self):
        return self.loaded.shape

    def ids(self, batch: int = 2, tokens: int = 12, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(5, VOCAB, (batch, tokens), generator=generator)

    def inputs(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What a stateless graph takes."""
        batch, tokens = ids.shape
        causal = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(batch, 1, -1, -1)
        return ids, torch.arange(tokens).expand(batch, -1), causal

    def graph(self, stage: str, policy: Policy | None = None) -> fx.GraphModule:
        """A fresh graph after `canonicalize`, `find_blocks`, `insert_predictor` or `masked`."""
        stages = ["canonicalize", "find_blocks", "insert_predictor", "masked"]
        policy = policy or Policy(0.5, 0.5, min_neurons=2)
        passes = [(), (partial(find_blocks, shape=self.shape),)]
        wanted = stages.index(stage)
        if wanted >= 2:
            feature = self.calibration.feature
            insert = partial(insert_predictor, masks=self.masks(policy), feature=feature)
            passes.append((insert,))
            passes.append((mask_attention, mask_mlp))
        module = copy_module(self.traced)
        for group in passes[: wanted + 1]:
            run_passes(module, group)
        return module

    def masks(self, policy: Policy) -> list[TapMasks]:
        """Predictors and selections, exported once a policy."""
        if policy not in self.built:
            predictors, chosen = (
                self.calibration.build_predictors(),
                selections(self.calibration, policy),
            )
            self.built[policy] = export_masks(predictors, chosen, self.shape.hidden)
        return self.built[policy]

    def with_taps(
        self, taps: tuple[int, ...], feature: str = "residual", random_features: int = 16
    ) -> Tiny:
        """The same model with predictors at other taps."""
        key = ("taps", taps, feature, random_features)
        if key not in self.built:
            calibration = random_calibration(
                self.loaded, taps=taps, random_features=random_features, feature=feature
            )
            self.built[key] = Tiny(self.loaded, self.traced, calibration)
        return self.built[key]

    @staticmethod
    def bind(module, packed):
        """A packed module that runs: with the tensors that a program finds under its names."""
        for node in module.graph.find_nodes(op="get_attr"):
            owner, _, leaf = node.target.rpartition(".")
            module.get_submodule(owner).register_buffer(leaf, packed[node.target].make())
        return module

    def session(self, policy: Policy, *, dtype=torch.float32, calibration=None) -> Session:
        """The lowered programs, as an artifact would hold them (built once a policy)."""
        key = (policy, dtype, id(calibration))
        built = self.built.get(key) or build_programs(
            copy_module(self.traced),
            self.loaded,
            calibration or self.calibration,
            policy,
            load_target("cpu"),
            dtype,
        )
        self.built[key] = built
        return Session(
            self.shape, policy, built.programs, built.packed, built.keep, 64, built.predictor_bytes
        )


def _tiny(name: str) -> Tiny:
    torch.manual_seed(0)
    if name == "opt":
        config = OPTConfig(
            hidden_size=64, ffn_dim=96, num_hidden_layers=3, num_attention_heads=4,
            word_embed_proj_dim=64, vocab_size=VOCAB, max_position_embeddings=64, init_std=0.2,
        )  # fmt: skip
        model = OPTForCausalLM(config)
    else:
        config = LlamaConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, vocab_size=VOCAB, max_position_embeddings=64,
            initializer_range=0.2,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    for parameter in model.parameters():  # biases and norms are 0 and 1 in a fresh model
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
        parameter.requires_grad_(False)
    model.eval()
    shape = model_shape(config)
    source = ModelSource(name=name, kind="random", path=None, revision=None, fingerprint=name)
    tokenizer = load_model("opt-books-15m").tokenizer
    loaded = LoadedModel(model=model, tokenizer=tokenizer, shape=shape, source=source)
    traced = copy_module(run_passes(trace(model).module(check_guards=False), (canonicalize,)))
    return Tiny(loaded, traced, random_calibration(loaded))


def random_calibration(
    loaded: LoadedModel,
    predictor: str = "shadow",
    taps: tuple[int, ...] = (0,),
    random_features: int = 16,
    **changes: str,
) -> Calibration:
    """A calibration whose predictors have random weights, with the quantiles of what they score."""
    shape = loaded.shape
    generator = torch.Generator().manual_seed(1)
    weights, quantiles = (
        {},
        {"heads": torch.zeros(1, QUANTILES), "neurons": torch.empty(0, QUANTILES)},
    )
    residual = torch.randn(1, 400, shape.hidden, generator=generator)
    for tap in taps_of(shape.layers, taps):
        network = ShadowPredictor(shape, rank=8, random_features=random_features, tap=tap)
        for _, buffer in network.named_buffers():
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
        weights |= {f"{tap.layer}.{name}": value for name, value in network.state_dict().items()}
        for kind, scores in zip(quantiles, network(residual), strict=True):
            for layer in scores[0].unbind(1):
                own = quantiles_of(histogram(layer.contiguous()))
                quantiles[kind] = torch.cat((quantiles[kind], own[None]))
    fields = dict(
        model=vars(loaded.source), shape=shape, criterion="random", predictor=predictor,
        feature="residual", taps=taps, rank=8, random_features=random_features, data="none",
        examples=1, tokens=1, seq_len=1, seed=0, metrics={}, versions={},
        mean_head_scores=torch.rand(shape.layers, shape.heads, generator=generator),
        mean_neuron_scores=torch.rand(shape.layers, shape.ffn, generator=generator),
        zero_rate=torch.zeros(shape.layers, shape.ffn), head_quantiles=quantiles["heads"],
        neuron_quantiles=quantiles["neurons"],
        head_damage=torch.rand(shape.layers, LEVELS, generator=generator).cummax(1).values,
        neuron_damage=torch.rand(shape.layers, LEVELS, generator=generator).cummax(1).values,
        weights=weights if predictor != "static" else {},
    )  # fmt: skip
    return Calibration(**fields | changes)


@pytest.fixture(scope="session")
def tiny_opt() -> Tiny:
    return _tiny("opt")


@pytest.fixture(scope="session")
def tiny_llama() -> Tiny:
    return _tiny("llama")


@pytest.fixture(params=["opt", "llama"])
def tiny(request: pytest.FixtureRequest) -> Tiny:
    """Each of both architectures in turn."""
    return request.getfixturevalue(f"tiny_{request.param}")
