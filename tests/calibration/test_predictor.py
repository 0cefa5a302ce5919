import torch
from torch.export import Dim

from shadowc.calibration.predictor import ShadowPredictor
from shadowc.config import ModelShape, taps_of

SHAPE = ModelShape("opt", 3, 4, 4, 8, 32, 48, 100, 64, "relu", False)


def predictor(random_features: int = 7) -> ShadowPredictor:
    torch.manual_seed(0)
    made = ShadowPredictor(SHAPE, 5, random_features)
    for name, value in made.named_buffers():
        setattr(made, name, torch.randn_like(value))
    return made


def test_shapes_and_formula():
    made, x = predictor(), torch.randn(2, 6, 32)
    heads, neurons = made(x)
    assert heads.shape == (2, 6, 2, 4) and neurons.shape == (2, 6, 3, 48)
    hidden = x @ made.first_weight.T + made.first_bias
    code = hidden[..., 7:] + hidden[..., :7].relu() @ made.mixer_weight.T
    torch.testing.assert_close(heads.flatten(2), code @ made.heads_weight.T + made.heads_bias)
    torch.testing.assert_close(neurons.flatten(2), code @ made.neurons_weight.T + made.neurons_bias)


def test_no_random_features_is_linear():
    made, x = predictor(0), torch.randn(3, 1, 32)
    middle = made((x[0:1] + x[1:2]) / 2)[1]
    torch.testing.assert_close(middle, (made(x[0:1])[1] + made(x[1:2])[1]) / 2)


def test_exports_with_dynamic_batch_and_tokens():
    made, x = predictor(), torch.randn(3, 17, 32)
    program = torch.export.export(
        made, (torch.randn(2, 4, 32),), dynamic_shapes=({0: Dim("B"), 1: Dim("T")},)
    )
    for got, expected in zip(program.module()(x), made(x), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_tap_scores_its_own_layers():
    torch.manual_seed(0)
    first, last = taps_of(SHAPE.layers, (0, 2))
    heads, neurons = ShadowPredictor(SHAPE, 5, 7, tap=first)(torch.randn(2, 6, 32))
    assert heads.shape == (2, 6, 2, 4) and neurons.shape == (2, 6, 2, 48)  # layers 1, 2 and 0, 1
    heads, neurons = ShadowPredictor(SHAPE, 5, 7, tap=last)(torch.randn(2, 6, 32))
    assert heads.shape[2] == 0 and neurons.shape == (2, 6, 1, 48)
