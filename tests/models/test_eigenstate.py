"""The eigenstate network: its right forms are equal, its published ones differ as documented."""

from collections.abc import Callable

import pytest
import torch
from looplift.models import eigenstate
from torch import Tensor, nn
from torch.testing import assert_close

Make = Callable[[str], nn.Module]

PAIRS = [
    (eigenstate.model, eigenstate.by_hand),
    (eigenstate.model_with_coupling, eigenstate.by_hand_with_coupling),
]
WRONG_PAIRS = [
    (eigenstate.model, eigenstate.as_published_cumsum),
    (eigenstate.model_with_coupling, eigenstate.as_published_coupling),
    (eigenstate.model, eigenstate.as_published_energy),
    (eigenstate.model, eigenstate.as_published_gelu),
]
# the other forms run the very same operators
EXPORTED = [
    eigenstate.model,
    eigenstate.by_hand,
    eigenstate.model_with_coupling,
    eigenstate.as_published_cumsum,
]


def with_same_weights(naive: Make, form: Make) -> tuple[nn.Module, nn.Module]:
    """Both at `tiny`, with weights unlike the form's own initial ones, so that loading counts."""
    first, second = naive("tiny"), form("tiny")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    second.load_state_dict(first.state_dict())
    return first, second


def outputs_and_gradients(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    leaves = {"x": x.clone().requires_grad_(), **dict(network.named_parameters())}
    y, energy = network(leaves["x"])
    loss = torch.sin(y).sum() + torch.cos(energy).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"y": y, "energy": energy, **dict(zip(leaves, gradients, strict=True))}


@pytest.mark.parametrize(("naive", "form"), PAIRS)
@pytest.mark.parametrize("length", [1, 2, 3, 6, 13])
def test_by_hand_is_equal(naive: Make, form: Make, length: int) -> None:
    first, second = with_same_weights(naive, form)
    (x,) = eigenstate.example_inputs("tiny", length=length)
    expected = outputs_and_gradients(first.double(), x.double())
    actual = outputs_and_gradients(second.double(), x.double())
    assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("naive", "form"), PAIRS + WRONG_PAIRS)
def test_forms_share_state_dict(naive: Make, form: Make) -> None:
    first, second = naive("tiny").state_dict(), form("tiny").state_dict()
    assert list(first) == list(second)
    for name in first:
        assert_close(second[name], first[name], rtol=0, atol=0)


@pytest.mark.parametrize("make", EXPORTED)
def test_forms_export(make: Make) -> None:
    inputs = eigenstate.example_inputs("tiny", length=3)  # capture takes milliseconds per step
    network = make("tiny")
    program = torch.export.export(network, inputs, strict=False).run_decompositions({})
    assert_close(program.module()(*inputs), network(*inputs))


def test_cumsum_is_equal_when_short_and_nan_when_long() -> None:
    naive, published = with_same_weights(eigenstate.model, eigenstate.as_published_cumsum)
    with torch.no_grad():
        for name, parameter in [*naive.named_parameters(), *published.named_parameters()]:
            if name.endswith("decay"):
                parameter.zero_()  # sigmoid(0): |λ| = 0.5
        (short,) = eigenstate.example_inputs("tiny", length=8)
        assert_close(published(short), naive(short), rtol=1e-4, atol=1e-5)
        (long,) = eigenstate.example_inputs("tiny", length=256)
        assert torch.isfinite(naive(long)[0]).all()
        assert torch.isnan(published(long)[0]).any()


def test_hoisted_coupling_is_off_by_percents() -> None:
    naive = eigenstate.model_with_coupling("tiny").double()
    published = eigenstate.as_published_coupling("tiny").double()
    (x,) = eigenstate.example_inputs("tiny")
    with torch.no_grad():
        for expected, actual in zip(naive(x.double()), published(x.double()), strict=True):
            error = (actual - expected).norm() / expected.norm()
            assert 0.01 < error < 0.1


def test_energy_over_the_last_dimension_is_silent_when_sizes_coincide() -> None:
    naive, published = with_same_weights(eigenstate.model, eigenstate.as_published_energy)
    with torch.no_grad():
        (x,) = eigenstate.example_inputs("tiny")
        (y, energy), (same_y, wrong_energy) = naive(x), published(x)
        assert_close(same_y, y)
        assert wrong_energy.shape == energy.shape == (2, 6)
        assert (wrong_energy - energy).norm() / energy.norm() > 0.1
        (longer,) = eigenstate.example_inputs("tiny", length=13)
        assert naive(longer)[1].shape == (2, 13)
        assert published(longer)[1].shape == (2, 6)


def test_tanh_gelu_differs_beyond_rounding() -> None:
    naive, published = with_same_weights(eigenstate.model, eigenstate.as_published_gelu)
    (x,) = eigenstate.example_inputs("tiny")
    with torch.no_grad():
        error = (published.double()(x.double())[0] - naive.double()(x.double())[0]).abs().max()
    assert 1e-5 < error < 1e-2


def test_example_inputs_repeat() -> None:
    for length in (None, 5):
        (first,), (second,) = (eigenstate.example_inputs("tiny", length) for _ in range(2))
        assert_close(first, second, rtol=0, atol=0)
