"""Alternating patches: by hand equal at every length, as published wrong at most of them."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from looplift.models import alternating_patches
from looplift.models.alternating_patches import (
    CONFIGS,
    AlternatingPatches,
    MiscountedPatches,
    VectorizedPatches,
    build,
)
from torch import Tensor, nn
from torch.testing import assert_close

FORMS = [
    alternating_patches.model,
    alternating_patches.by_hand,
    alternating_patches.as_published,
]


def pair(
    form: type[AlternatingPatches], large: int = 8, small: int = 4
) -> tuple[AlternatingPatches, AlternatingPatches]:
    """The naive model and a form with its weights, in float64, unlike the form's initial ones."""
    config = replace(CONFIGS["tiny"], large=large, small=small)
    naive, other = build(config, AlternatingPatches), build(config, form)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in naive.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    other.load_state_dict(naive.state_dict())
    return naive.double(), other.double()


def series(length: int) -> Tensor:
    (x,) = alternating_patches.example_inputs("tiny", length=length)
    return x.double()


def outputs_and_gradients(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """A parameter that no patch reached has a zero gradient, or none: taken as the same."""
    leaves = {"x": x.clone().requires_grad_(), **dict(network.named_parameters())}
    y = network(leaves["x"])
    loss = torch.sin(y).sum()
    gradients = torch.autograd.grad(
        loss, list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    return {"y": y, **dict(zip(leaves, gradients, strict=True))}


@pytest.mark.parametrize(("large", "small"), [(8, 4), (4, 8), (4, 4), (3, 2), (5, 1)])
def test_by_hand_is_equal_at_every_length(large: int, small: int) -> None:
    naive, by_hand = pair(VectorizedPatches, large, small)
    for length in [*range(1, 27), 40]:
        x = series(length)
        assert by_hand(x).shape == x.shape
        expected, actual = outputs_and_gradients(naive, x), outputs_and_gradients(by_hand, x)
        assert_close(actual, expected, rtol=1e-9, atol=1e-12)
        assert_close(by_hand.embed(x), naive.embed(x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("length", "patches"), [(16, 3), (20, 3), (40, 7), (1024, 171)])
def test_as_published_miscounts_silently(length: int, patches: int) -> None:
    naive, published = pair(MiscountedPatches)
    x = series(length)
    with torch.no_grad():
        assert naive.embed(x).shape[1] == patches
        assert abs(published.embed(x).shape[1] - patches) == 1
        expected, actual = naive(x), published(x)
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() > 1e-4


@pytest.mark.parametrize("length", [10, 12, 24, 36])
def test_as_published_is_equal_at_some_lengths(length: int) -> None:
    naive, published = pair(MiscountedPatches)
    assert_close(published(series(length)), naive(series(length)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", FORMS)
def test_forms_export(make: Callable[[str], nn.Module]) -> None:
    inputs = alternating_patches.example_inputs("tiny")
    network = make("tiny")
    program = torch.export.export(network, inputs, strict=False).run_decompositions({})
    assert_close(program.module()(*inputs), network(*inputs))


def test_forms_share_state_dict() -> None:
    naive, *others = (make("tiny").state_dict() for make in FORMS)
    for other in others:
        assert list(naive) == list(other)
        for name in naive:
            assert_close(other[name], naive[name], rtol=0, atol=0)


def test_example_inputs_repeat() -> None:
    assert_close(series(5), series(5), rtol=0, atol=0)
