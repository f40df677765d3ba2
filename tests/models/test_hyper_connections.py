"""Hyper-connections: hand and naive forms agree in every mode, and the constraints hold."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from looplift.models import hyper_connections
from looplift.models.hyper_connections import (
    QUINTIC,
    orthogonalise,
    orthogonalise_by_hand,
    orthostochastic,
    orthostochastic_by_hand,
    sinkhorn_log,
    sinkhorn_log_by_hand,
    sinkhorn_plain,
    sinkhorn_plain_by_hand,
)
from torch import Tensor, nn

Iteration = Callable[[Tensor, int], Tensor]

MODES: list[dict[str, Any]] = [
    {"mode": "hc"},
    {"mode": "hc", "dynamic": False},
    {"mode": "mhc"},
    {"mode": "mhc", "dynamic": True},
    {"mode": "mhc", "sinkhorn_domain": "plain"},
    {"mode": "mhc", "sinkhorn_domain": "plain", "dynamic": True},
    {"mode": "orthostochastic"},
    {"mode": "orthostochastic", "dynamic": True},
]
IN_EVERY_MODE = pytest.mark.parametrize(
    "mode", MODES, ids=lambda mode: "-".join(f"{value}" for value in mode.values())
)
# Every mode once, dynamic and static ones in all four layouts.
CAPTURED = [
    (False, 1, {"mode": "hc"}),
    (True, 2, {"mode": "hc", "dynamic": False}),
    (True, 1, {"mode": "mhc", "sinkhorn_domain": "plain"}),
    (True, 1, {"mode": "mhc", "dynamic": True}),
    (False, 2, {"mode": "orthostochastic"}),
    (False, 2, {"mode": "orthostochastic", "dynamic": True}),
]
SINKHORN = pytest.mark.parametrize(
    "sinkhorn", [sinkhorn_log, sinkhorn_log_by_hand, sinkhorn_plain, sinkhorn_plain_by_hand]
)
PAIRS = pytest.mark.parametrize(
    ("naive", "hand"),
    [
        (sinkhorn_log, sinkhorn_log_by_hand),
        (sinkhorn_plain, sinkhorn_plain_by_hand),
        (sinkhorn_log, sinkhorn_plain),
        (orthostochastic, orthostochastic_by_hand),
        (orthogonalise, orthogonalise_by_hand),
    ],
)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def run(module: nn.Module, batch: Tensor) -> list[Tensor]:
    """Output, then the gradients of a fixed projection of it to the batch and the parameters."""
    batch = batch.detach().clone().requires_grad_()
    output = module(batch)
    direction = random(*output.shape, seed=1)
    return [output, *torch.autograd.grad(output, [batch, *module.parameters()], direction)]


def random_twins(**options: Any) -> tuple[nn.Module, nn.Module]:
    """Both forms in double precision, with the same weights, none of them at a special value."""
    naive = hyper_connections.hyper_connections("tiny", **options).double()
    hand = hyper_connections.hyper_connections_by_hand("tiny", **options).double()
    for seed, parameter in enumerate(naive.parameters()):
        parameter.data += 0.5 * random(*parameter.shape, seed=seed)
    hand.load_state_dict(naive.state_dict())
    return naive, hand


@IN_EVERY_MODE
@pytest.mark.parametrize("channel_first", [False, True], ids=["channel-last", "channel-first"])
@pytest.mark.parametrize("num_fracs", [1, 2])
@pytest.mark.parametrize("num_streams", [1, 3, 4])
def test_forms_agree(
    mode: dict[str, Any], channel_first: bool, num_fracs: int, num_streams: int
) -> None:
    options = {"channel_first": channel_first, "num_fracs": num_fracs, "num_streams": num_streams}
    naive, hand = random_twins(**mode, **options)
    (batch,) = hyper_connections.example_inputs("tiny", channel_first=channel_first)
    expected, actual = run(naive, batch.double()), run(hand, batch.double())
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
    shapes = {key: value.shape for key, value in naive.state_dict().items()}
    assert {key: value.shape for key, value in hand.state_dict().items()} == shapes


@IN_EVERY_MODE
def test_forms_agree_where_no_gradient_is_recorded(mode: dict[str, Any]) -> None:
    naive, hand = random_twins(**mode)
    (batch,) = hyper_connections.example_inputs("tiny")
    before = {key: value.clone() for key, value in hand.state_dict().items()}
    with torch.no_grad():
        for _ in range(2):
            actual, expected = hand(batch.double()), naive(batch.double())
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(dict(hand.state_dict()), before, rtol=0, atol=0)


@IN_EVERY_MODE
def test_every_parameter_matters(mode: dict[str, Any]) -> None:
    """A weight without a gradient would let any hand form of it pass."""
    naive, _ = random_twins(**mode)
    (batch,) = hyper_connections.example_inputs("tiny")
    naive(batch.double()).square().sum().backward()
    middle = naive.get_submodule("layers.1")
    for name, parameter in middle.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-6, name


@pytest.mark.parametrize(("channel_first", "num_fracs", "mode"), CAPTURED)
def test_forms_can_be_captured(channel_first: bool, num_fracs: int, mode: dict[str, Any]) -> None:
    options = {**mode, "num_fracs": num_fracs, "channel_first": channel_first, "layers": 1}
    options |= {"sinkhorn_iterations": 2, "newton_schulz_iterations": 2}  # a node costs 3 ms
    inputs = hyper_connections.example_inputs("tiny", channel_first=channel_first)
    for module in (
        hyper_connections.hyper_connections("tiny", **options),
        hyper_connections.hyper_connections_by_hand("tiny", **options),
    ):
        program = torch.export.export(module, inputs, strict=False).run_decompositions({})
        torch.testing.assert_close(program.module()(*inputs), module(*inputs))


def test_default_forms_can_be_captured() -> None:
    inputs = hyper_connections.example_inputs("tiny")
    for module in (hyper_connections.model("tiny"), hyper_connections.by_hand("tiny")):
        program = torch.export.export(module, inputs, strict=False).run_decompositions({})
        torch.testing.assert_close(program.module()(*inputs), module(*inputs))


def test_default_is_manifold_constrained_with_twenty_iterations() -> None:
    for size in ("small", "full"):
        config = hyper_connections.SIZES[size]
        assert (config.mode, config.sinkhorn_iterations) == ("mhc", 20)


@SINKHORN
@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (3, 5, 5), (2, 3, 8, 8)], ids=str)
def test_sinkhorn_is_doubly_stochastic(sinkhorn: Iteration, shape: tuple[int, ...]) -> None:
    matrix = sinkhorn(random(*shape), 200)
    assert matrix.min() >= 0
    ones = torch.ones(shape[:-1], dtype=torch.float64)
    torch.testing.assert_close(matrix.sum(dim=-1), ones, rtol=0, atol=1e-9)
    torch.testing.assert_close(matrix.sum(dim=-2), ones, rtol=0, atol=1e-9)


@SINKHORN
def test_twenty_iterations_suffice_for_the_weights_a_layer_starts_with(sinkhorn: Iteration) -> None:
    matrix = sinkhorn(torch.eye(4, dtype=torch.float64) + 0.1 * random(4, 4), 20)
    torch.testing.assert_close(matrix.sum(dim=-1), torch.ones(4).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("sinkhorn", [sinkhorn_log, sinkhorn_log_by_hand])
def test_log_domain_keeps_what_would_underflow(sinkhorn: Iteration) -> None:
    logits = torch.tensor([[0.0, 0.0], [-2000.0, -2000.0]], dtype=torch.float64)
    torch.testing.assert_close(sinkhorn(logits, 5), torch.full((2, 2), 0.5).double())


@pytest.mark.parametrize("iterate", [orthogonalise, orthogonalise_by_hand])
@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (3, 5, 5)], ids=str)
def test_newton_schulz_is_nearly_orthogonal(iterate: Iteration, shape: tuple[int, ...]) -> None:
    matrix = iterate(torch.eye(shape[-1]).double() + 0.1 * random(*shape), 8)
    gram = matrix @ matrix.transpose(-2, -1)
    identity = torch.eye(shape[-1], dtype=torch.float64).expand(shape)
    torch.testing.assert_close(gram, identity, rtol=0, atol=1e-6)


def test_newton_schulz_polynomial_has_a_flat_fixed_point_at_one() -> None:
    a, b, c = QUINTIC
    assert (a + b + c, a + 3 * b + 5 * c, 6 * b + 20 * c) == (1, 0, 0)


@pytest.mark.parametrize("iterate", [orthostochastic, orthostochastic_by_hand])
def test_orthostochastic_is_doubly_stochastic(iterate: Iteration) -> None:
    matrix = iterate(torch.eye(4).double() + 0.1 * random(4, 4), 8)
    assert matrix.min() >= 0
    torch.testing.assert_close(matrix.sum(dim=-1), torch.ones(4).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(matrix.sum(dim=-2), torch.ones(4).double(), rtol=0, atol=1e-6)


@PAIRS
@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (3, 5, 5), (2, 3, 4, 4)], ids=str)
def test_iterations_agree(naive: Iteration, hand: Iteration, shape: tuple[int, ...]) -> None:
    logits = random(*shape).requires_grad_()
    results = []
    for iterate in (naive, hand):
        value = iterate(logits, 6)
        (gradient,) = torch.autograd.grad(value, logits, random(*shape, seed=1))
        results.append((value, gradient))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-11)
