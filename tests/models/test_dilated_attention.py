"""Dilated attention: every form is equal, and equal to plain attention over the picked tokens."""

from collections.abc import Callable

import pytest
import torch
from looplift.models import dilated_attention
from looplift.models.dilated_attention import CONFIGS, DilatedAttention, build
from torch import Tensor, nn
from torch.testing import assert_close

Make = Callable[[str], nn.Module]

OTHERS = [
    dilated_attention.by_hand,
    dilated_attention.by_hand_in_one_pass,
    dilated_attention.as_published,
]


def with_same_weights(form: Make) -> tuple[nn.Module, nn.Module]:
    """The naive model and a form with its weights, in float64, unlike the form's initial ones."""
    naive, other = dilated_attention.model("tiny"), form("tiny")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in naive.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    other.load_state_dict(naive.state_dict())
    return naive.double(), other.double()


def tokens(length: int) -> Tensor:
    (x,) = dilated_attention.example_inputs("tiny", length=length)
    return x.double()


def outputs_and_gradients(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    leaves = {"x": x.clone().requires_grad_(), **dict(network.named_parameters())}
    y = network(leaves["x"])
    gradients = torch.autograd.grad(torch.sin(y).sum(), list(leaves.values()))
    return {"y": y, **dict(zip(leaves, gradients, strict=True))}


@pytest.mark.parametrize("form", OTHERS)
@pytest.mark.parametrize("length", [1, 2, 3, 7, 11, 12, 72, 144])
def test_forms_are_equal(form: Make, length: int) -> None:
    naive, other = with_same_weights(form)
    expected = outputs_and_gradients(naive, tokens(length))
    actual = outputs_and_gradients(other, tokens(length))
    assert all(tensor.isfinite().all() for tensor in expected.values())
    assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("length", [11, 72, 144])
def test_naive_is_masked_attention(length: int) -> None:
    """One full-length softmax per head, every pair that the definition rules out masked."""
    config = CONFIGS["tiny"]
    network = build(config, DilatedAttention).double()
    x, position = tokens(length), torch.arange(length)
    query, key, value = (
        p(x).unflatten(2, (config.heads, config.head_dim)).transpose(1, 2)
        for p in (network.query, network.key, network.value)
    )
    heads = []
    for head in range(config.heads):
        rate = config.rates[head]  # at tiny a group is one head
        segment_length = min(config.segment_lengths[head], length)
        picked = position % segment_length % rate == head % rate
        same_segment = position[:, None] // segment_length == position // segment_length
        scores = query[:, head] @ key[:, head].transpose(1, 2) / config.head_dim**0.5
        scores = scores.masked_fill(~(same_segment & picked), -torch.inf)
        attended = scores.softmax(dim=-1) @ value[:, head]
        heads.append(torch.where(picked[:, None], attended, 0.0))
    expected = network.output(torch.stack(heads, dim=2).flatten(2))
    assert_close(network(x), expected, rtol=1e-9, atol=1e-12)


def test_length_that_no_segment_divides_is_refused() -> None:
    with pytest.raises(ValueError, match="length 48 is no multiple of segment length 36"):
        dilated_attention.model("tiny").double()(tokens(48))


@pytest.mark.parametrize("make", [dilated_attention.model, *OTHERS])
def test_forms_export(make: Make) -> None:
    inputs = dilated_attention.example_inputs("tiny", length=6)  # capture takes ms per block
    network = make("tiny")
    program = torch.export.export(network, inputs, strict=False).run_decompositions({})
    assert_close(program.module()(*inputs), network(*inputs))


def test_forms_share_state_dict() -> None:
    naive = dilated_attention.model("tiny").state_dict()
    for form in OTHERS:
        other = form("tiny").state_dict()
        assert list(naive) == list(other)
        for name in naive:
            assert_close(other[name], naive[name], rtol=0, atol=0)


def test_example_inputs_repeat() -> None:
    assert_close(tokens(5), tokens(5), rtol=0, atol=0)
