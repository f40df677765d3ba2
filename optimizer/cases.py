"""The inputs and parameters that two programs are compared on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Leaves = tuple[Any, ...]
FIRST = "given inputs"
LAST_BITS = 4  # units in the last place, as rounding differs in a few operations


@dataclass(frozen=True)
class Case:
    """One call: flat inputs, and what is done to the parameters before it."""

    name: str
    inputs: Leaves
    parameters: Callable[[Tensor], Tensor]
    seed: int
    odd: bool = False  # NaN or infinities in it: nothing to say in float64
    usual: bool = True  # inputs of a size for which accuracy counts
    long: bool = False  # it says more the more steps there are


def cases(inputs: Leaves, seed: int, several: int = 2) -> Iterator[Case]:
    """The given inputs, `several` random ones like them, then the telling special ones.

    Random floating inputs have the given ones' mean and spread; random integers stay within
    the range of the given ones, so that an index table stays in range.
    """
    yield Case(FIRST, inputs, as_they_are, seed, long=True)
    for drawn_from in range(seed + 1, seed + 1 + several):
        drawn = drawn_like(inputs, drawn_from)
        yield Case(f"random inputs, seed {drawn_from}", drawn, as_they_are, drawn_from)
    yield Case("gates near one", drawn_like(inputs, seed), near_one, seed, long=True)


def odd_values(inputs: Leaves, seed: int) -> Iterator[Case]:
    """Inputs with NaN, with infinities, with NaN at their end alone (what a last step computes
    for nobody must reach no gradient), all zero, and very large."""
    if not any(isinstance(i, Tensor) and i.is_floating_point() and i.numel() for i in inputs):
        return
    nan, inf = float("nan"), float("inf")
    for name, number, share in (("NaN in", nan, 1 / 16), ("Inf in", inf, 1 / 16),
                                ("NaN at the end of", nan, 0)):
        drawn = tuple(sprinkled(leaf, number, share, seed + i) for i, leaf in enumerate(inputs))
        yield Case(f"{name} the inputs", drawn, as_they_are, seed, odd=True)
    for name, factor in (("zero inputs", 0.0), ("large inputs", 100.0)):
        scaled = tuple(
            laid_out_like(i, i.detach() * factor)
            if isinstance(i, Tensor) and i.is_floating_point() else i for i in inputs
        )
        yield Case(name, scaled, as_they_are, seed, usual=False)


def drawn_like(inputs: Leaves, seed: int) -> Leaves:
    """Random inputs like the given ones, each from a seed of its own."""
    return tuple(random_like(leaf, 1000 * seed + i) for i, leaf in enumerate(inputs))


def as_they_are(parameter: Tensor) -> Tensor:
    return parameter


def near_one(parameter: Tensor) -> Tensor:
    """Vectors pushed to where a sigmoid is almost one: what a recurrence forgets slowly counts."""
    return parameter + 4 if parameter.dim() == 1 else parameter


def random_like(leaf: Any, seed: int) -> Any:
    """A tensor like `leaf` with other contents (its strides are kept); other leaves as they are."""
    if not isinstance(leaf, Tensor) or leaf.numel() == 0:
        return leaf
    generator = torch.Generator().manual_seed(seed)
    if leaf.is_floating_point() or leaf.is_complex():
        wide = leaf.detach().to(torch.complex128 if leaf.is_complex() else torch.float64)
        spread = wide.std() if leaf.numel() > 1 else wide.abs().mean()
        noise = torch.randn(leaf.shape, generator=generator, dtype=wide.dtype)
        contents = wide.mean() + noise.to(leaf.device) * spread
    elif leaf.dtype == torch.bool:
        contents = torch.rand(leaf.shape, generator=generator) < 0.5
    else:
        low, high = int(leaf.min()), int(leaf.max())
        contents = torch.randint(low, high + 1, leaf.shape, generator=generator)
    return laid_out_like(leaf, contents)


def sprinkled(leaf: Any, number: float, share: float, seed: int) -> Any:
    """A copy of a floating tensor with a share of its values, and the last one, replaced."""
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.numel() == 0:
        return leaf
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(leaf.shape, generator=generator) < share
    chosen.view(-1)[-1] = True
    return laid_out_like(leaf, leaf.detach().masked_fill(chosen.to(leaf.device), number))


def slightly_moved(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """A copy of a floating tensor, its values moved up or down by a few units in the last place;
    one of whole numbers, as a mask, stays."""
    if not tensor.is_floating_point() or torch.equal(tensor, tensor.round()):
        return tensor
    signs = 2 * torch.randint(2, tensor.shape, generator=generator) - 1
    step = LAST_BITS * torch.finfo(tensor.dtype).eps
    return laid_out_like(tensor, tensor * (1 + step * signs.to(tensor)))


def laid_out_like(leaf: Tensor, contents: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`contents` in a new tensor like `leaf`: device, strides, requires_grad, dtype or `dtype`."""
    made = torch.empty_strided(
        leaf.shape, _strides_without_overlap(leaf), dtype=dtype or leaf.dtype, device=leaf.device
    )
    made.copy_(contents)
    return made.requires_grad_(leaf.requires_grad)


def _strides_without_overlap(leaf: Tensor) -> tuple[int, ...]:
    needed = 1 + sum((s - 1) * st for s, st in zip(leaf.shape, leaf.stride(), strict=True))
    overlapping = 0 in leaf.stride() or leaf.numel() > max(needed, 0)
    return torch.empty(leaf.shape, device="meta").stride() if overlapping else leaf.stride()


def copied(leaves: Leaves, convert: Callable[[Tensor], Tensor] = as_they_are) -> Leaves:
    """The leaves with each tensor copied, strides kept, and converted; one given twice, once."""
    made: dict[int, Tensor] = {}
    for leaf in leaves:
        if isinstance(leaf, Tensor) and id(leaf) not in made:
            converted = convert(leaf.detach())
            made[id(leaf)] = laid_out_like(leaf, converted, converted.dtype)
    return tuple(made.get(id(leaf), leaf) for leaf in leaves)


def attached(leaf: Tensor) -> Tensor:
    """A copy of a leaf through which gradients reach it, and which may be written to."""
    made = torch.empty_strided(
        leaf.shape, _strides_without_overlap(leaf), dtype=leaf.dtype, device=leaf.device
    )
    return made.copy_(leaf)


def flat_outputs(result: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """A result's leaves; a torch.Size is one, where pytree would make it a tuple."""
    return pytree.tree_flatten(result, is_leaf=lambda leaf: isinstance(leaf, torch.Size))


def flat(args: Any, kwargs: Any = None) -> tuple[Leaves, pytree.TreeSpec]:
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs or {})))
    return tuple(leaves), spec
