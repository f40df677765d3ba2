"""The image and text encoders: each hand form equals its naive one, and all can be captured."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from looplift.models import vision_transformer
from looplift.models.vision_transformer import (
    IMAGE_SIZES,
    CausalAttention,
    CausalAttentionByHand,
    PatchEmbedding,
    PatchEmbeddingByHand,
)
from torch import Tensor, nn

Factory = Callable[[str], nn.Module]
Inputs = Callable[[str], tuple[Tensor, ...]]

IMAGE = (vision_transformer.model, vision_transformer.by_hand, vision_transformer.example_inputs)
TEXT = (
    vision_transformer.text_encoder,
    vision_transformer.text_encoder_by_hand,
    vision_transformer.text_inputs,
)
ENCODERS = pytest.mark.parametrize(
    ("naive_form", "hand_form", "inputs"), [IMAGE, TEXT], ids=["image", "text"]
)


def run(module: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Output, then the gradients of a fixed projection of it to inputs and parameters."""
    leaves = [value.detach().clone() for value in inputs]
    sources = [leaf.requires_grad_() for leaf in leaves if leaf.is_floating_point()]
    output = module(*leaves)
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(output.shape, generator=generator, dtype=output.dtype)
    gradients = torch.autograd.grad(output, [*sources, *module.parameters()], direction)
    return [output, *gradients]


def random_twins(naive: nn.Module, hand: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Both forms in double precision, with the same weights, none of them at a special value."""
    generator = torch.Generator().manual_seed(2)
    for parameter in naive.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    hand.load_state_dict(naive.state_dict())
    return naive.double(), hand.double()


def doubled(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(value.double() if value.is_floating_point() else value for value in inputs)


@ENCODERS
def test_forms_agree(naive_form: Factory, hand_form: Factory, inputs: Inputs) -> None:
    naive, hand = random_twins(naive_form("tiny"), hand_form("tiny"))
    values = doubled(inputs("tiny"))
    torch.testing.assert_close(run(hand, values), run(naive, values), rtol=1e-9, atol=1e-12)


@ENCODERS
def test_forms_share_their_state(naive_form: Factory, hand_form: Factory, inputs: Inputs) -> None:
    naive, hand = naive_form("tiny").state_dict(), hand_form("tiny").state_dict()
    shapes = {key: value.shape for key, value in naive.items()}
    assert {key: value.shape for key, value in hand.items()} == shapes


@ENCODERS
def test_forms_can_be_captured(naive_form: Factory, hand_form: Factory, inputs: Inputs) -> None:
    values = inputs("tiny")
    for module in (naive_form("tiny"), hand_form("tiny")):
        program = torch.export.export(module, values, strict=False).run_decompositions({})
        torch.testing.assert_close(program.module()(*values), module(*values))


@ENCODERS
def test_inputs_are_the_same_at_every_call(
    naive_form: Factory, hand_form: Factory, inputs: Inputs
) -> None:
    for size in ("tiny", "small", "full"):
        torch.testing.assert_close(inputs(size), inputs(size), rtol=0, atol=0)


def test_naive_image_encoder_embeds_every_patch_alone() -> None:
    values = vision_transformer.example_inputs("tiny")
    calls = {}
    for form in (vision_transformer.model, vision_transformer.by_hand):
        module = form("tiny")
        rows: list[int] = []
        linear = module.get_submodule("embedding.project")
        linear.register_forward_hook(lambda _, __, output, rows=rows: rows.append(len(output)))
        module(*values)
        calls[form.__name__] = len(rows)
    assert calls == {"model": IMAGE_SIZES["tiny"].patches, "by_hand": 1}


def test_patches_are_embedded_row_by_row() -> None:
    config = IMAGE_SIZES["tiny"]
    embedding = PatchEmbeddingByHand(config)
    nn.init.zeros_(embedding.position)
    image = torch.zeros(1, config.channels, config.height, config.width)
    empty = embedding(image)
    image[0, 1, 2, 5] = 1.0  # patch row 1, patch column 2 of 4
    changed = (embedding(image) != empty).any(dim=-1).nonzero()
    assert changed.tolist() == [[0, 1 * 4 + 2]]


def test_a_rim_narrower_than_a_patch_is_ignored() -> None:
    config = IMAGE_SIZES["tiny"]
    naive, hand = random_twins(PatchEmbedding(config), PatchEmbeddingByHand(config))
    shape = (2, config.channels, config.height + 1, config.width + 1)
    wide = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    exact = wide[:, :, : config.height, : config.width]
    for image in (wide, wide.transpose(2, 3).contiguous().transpose(2, 3)):
        torch.testing.assert_close(hand(image), naive(exact), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(naive(image), naive(exact), rtol=0, atol=0)


@pytest.mark.parametrize("attention", [CausalAttention, CausalAttentionByHand])
def test_text_does_not_see_later_tokens(attention: type[CausalAttention]) -> None:
    module = attention(vision_transformer.TEXT_SIZES["tiny"]).double()
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randn(1, 5, 24, generator=generator, dtype=torch.float64)
    before = module(tokens)
    tokens[:, 3] += 1.0
    changed = (module(tokens) - before).abs().amax(dim=(0, 2))
    assert changed[:3].max() < 1e-12 < changed[3:].min()


def test_rotation_depends_on_distance_only() -> None:
    module = CausalAttention(vision_transformer.TEXT_SIZES["tiny"]).double()
    generator = torch.Generator().manual_seed(5)
    query, key = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    score = module.rotate(query.expand(5, 6)) @ module.rotate(key.expand(5, 6)).T
    for distance in range(-4, 5):
        for first, second in pairwise(score.diagonal(distance).tolist()):
            assert first == pytest.approx(second, abs=1e-6)
