"""What a caller can see of one call of a module, and how two such observations differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .builder import storage
from .cases import Leaves, attached, flat_outputs
from .state import Attributes, State


@dataclass
class Observation:
    """`values` are compared as numbers, `facts` must be equal; both by name."""

    values: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    exception: str | None = None


def observe(
    model: nn.Module, inputs: Leaves, spec: pytree.TreeSpec, state: Sequence[State],
    before: Attributes, training: bool, seed: int, again: bool = False, attributes: bool = True,
    as_given: bool = False,
) -> Observation:
    """Call `model` once (with `again` twice) and note all there is to see.

    With `training`, gradients of a random projection of the outputs are taken to every
    floating input and every parameter; `as_given`, to inputs that require one. With
    `attributes`, what it assigns to those of its modules, which were as in `before`, is one of
    its outputs.
    """
    seen = Observation()
    wanted = {s.name: s.get() for s in state if s.get().requires_grad}
    if training:
        sources = {
            i: leaf.requires_grad_(True) for i, leaf in enumerate(inputs)
            if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())
            and (leaf.requires_grad or not as_given)
        }
        wanted |= {f"input {i}": leaf for i, leaf in sources.items()}
        inputs = tuple(attached(sources[i]) if i in sources else leaf
                       for i, leaf in enumerate(inputs))
    held = {f"input {i}": leaf for i, leaf in enumerate(inputs) if isinstance(leaf, Tensor)}
    held |= {s.name: s.get() for s in state}
    versions = {name: _version(tensor) for name, tensor in held.items()}
    args, kwargs = pytree.tree_unflatten(list(inputs), spec)
    torch.manual_seed(seed)
    try:
        with torch.set_grad_enabled(training):
            result = model(*args, **kwargs)
        flat, output_spec = flat_outputs(result)
        outputs = {f"output {position}": leaf for position, leaf in enumerate(flat)}
        changes = before.changes() if attributes or again else []
        for change in changes if attributes else ():
            flat, seen.facts[f"structure of {change.name}"] = flat_outputs(change.after)
            outputs |= {f"attribute {change.name} {i}".removesuffix(" 0"): leaf
                        for i, leaf in enumerate(flat)}
        seen.facts["random state"] = torch.get_rng_state().sum().item(), _digest(
            torch.get_rng_state())
        _outputs(seen, outputs, output_spec, held)
        _inputs(seen, held, versions)
        if training:
            _gradients(seen, outputs, wanted, seed)
        if again:
            before.put_back(changes)
            with torch.no_grad():
                leaves = pytree.tree_leaves(model(*args, **kwargs))
            seen.values |= {f"output {i} of a second call": _dense(leaf)
                            for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    except Exception as error:
        seen.exception = f"{type(error).__name__}: {error}"
    return seen


def _digest(tensor: Tensor) -> int:
    return hash(bytes(tensor.cpu().numpy().tobytes()))


def _outputs(
    seen: Observation, outputs: dict[str, Any], spec: pytree.TreeSpec, held: dict[str, Tensor]
) -> None:
    seen.facts["structure of the output"] = str(spec)
    owners = {_storage(tensor): name for name, tensor in reversed(held.items())}
    identities = {id(tensor): name for name, tensor in held.items()}
    for name, leaf in outputs.items():
        if not isinstance(leaf, Tensor):
            seen.facts[name] = (type(leaf), leaf)
            continue
        seen.facts[f"type of {name}"] = type(leaf)
        seen.facts[f"dtype of {name}"] = leaf.dtype
        seen.facts[f"shape of {name}"] = tuple(leaf.shape)
        seen.facts[f"layout of {name}"] = leaf.layout
        seen.facts[f"strides of {name}"] = _visible_strides(leaf)
        seen.facts[f"device of {name}"] = leaf.device
        seen.facts[f"requires_grad of {name}"] = leaf.requires_grad
        key = _storage(leaf)
        seen.facts[f"what {name} shares storage with"] = owners.get(key)
        seen.facts[f"what {name} is"] = identities.get(id(leaf))
        if key is not None:
            owners.setdefault(key, name)
        seen.values[name] = _dense(leaf)


def _visible_strides(tensor: Tensor) -> tuple[int | None, ...]:
    """Strides, without those of axes of size one or of empty tensors, which say nothing."""
    if tensor.numel() == 0 or tensor.layout is not torch.strided:
        return ()
    return tuple(st if size > 1 else None
                 for size, st in zip(tensor.shape, tensor.stride(), strict=True))


def _inputs(seen: Observation, held: dict[str, Tensor], versions: dict[str, int]) -> None:
    for name, tensor in held.items():
        seen.values[f"{name} after the call"] = tensor.detach().clone()
        if name.startswith("input"):  # state is compared by its values: batch_norm writes unseen
            seen.facts[f"whether {name} was written to"] = _version(tensor) != versions[name]


def _gradients(
    seen: Observation, outputs: dict[str, Any], wanted: dict[str, Tensor], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    roots, weights = [], []
    for leaf in outputs.values():
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            drawn = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
            roots.append(leaf)
            weights.append(drawn.to(device=leaf.device, dtype=leaf.dtype))
    if not roots or not wanted:
        return
    gradients = torch.autograd.grad(roots, list(wanted.values()), weights, allow_unused=True)
    for name, gradient in zip(wanted, gradients, strict=True):
        seen.facts[f"whether {name} has a gradient"] = gradient is not None
        if gradient is not None:
            seen.facts[f"dtype of the gradient of {name}"] = gradient.dtype
            seen.values[f"the gradient of {name}"] = gradient.detach()


def _dense(tensor: Tensor) -> Tensor:
    strided = tensor.layout is torch.strided
    return tensor.detach().clone() if strided else tensor.detach().to_dense()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _storage(tensor: Tensor) -> int | None:
    if tensor.layout is not torch.strided or tensor.numel() == 0:
        return None
    return storage(tensor)


def difference(want: Observation, got: Observation) -> tuple[str, str] | None:
    """What differs that no rounding explains: (what, detail), or None."""
    if _kind_of(want.exception) != _kind_of(got.exception):
        return "exceptions", f"{want.exception or 'none'} became {got.exception or 'none'}"
    for name, fact in want.facts.items():
        if name not in got.facts or got.facts[name] != fact:
            return name, f"{fact} became {got.facts.get(name)}"
    for name in got.facts.keys() - want.facts.keys():
        return name, f"nothing became {got.facts[name]}"
    for name, tensor in want.values.items():
        other = got.values.get(name)
        if other is None:
            return name, "missing"
        found = _value_difference(tensor, other, name.startswith("the gradient"))
        if found is not None:
            return name, found
    return None


def forgiving(want: Observation, truth: Observation, got: Observation) -> Observation:
    """`want`, but as `got` where that is NaN or infinite as `truth`, the same call in float64, is,
    or where both are somehow, and `truth` is not.

    Some operations answer otherwise in float32 than in float64, or for one element than for
    several: PyTorch's gelu(inf) is inf or NaN. And which of two numbers overflows first, of those
    that a diverging state is the sum of, is up to rounding.
    """
    values = {}
    for name, tensor in want.values.items():
        true, other = truth.values.get(name), got.values.get(name)
        values[name] = tensor
        if true is not None and other is not None and tensor.shape == true.shape == other.shape:
            alike = (special(true) == special(other)) & (special(tensor) != special(other))
            alike |= torch.isfinite(true) & ~torch.isfinite(tensor) & ~torch.isfinite(other)
            values[name] = torch.where(alike, other.to(tensor.dtype), tensor)
    return replace(want, values=values)


def special(tensor: Tensor) -> Tensor:
    """2 where a tensor is NaN, 1 and -1 where it is infinite (-1 if it is complex), else 0."""
    infinite = torch.isinf(tensor).int()
    negative = infinite if tensor.is_complex() else infinite * (tensor < 0)
    return torch.where(torch.isnan(tensor), 2, infinite - 2 * negative)


def _kind_of(exception: str | None) -> str | None:
    return exception.split(":")[0] if exception else None


def _value_difference(want: Tensor, got: Tensor, gradient: bool) -> str | None:
    if want.shape != got.shape:
        return f"shape {tuple(want.shape)} became {tuple(got.shape)}"
    if torch.equal(want, got):
        return None
    if not (want.is_floating_point() or want.is_complex()):
        return f"{int((want != got).sum())} values differ"
    if gradient:  # sums of infinities in another order: which are NaN is up to rounding
        fewer = bool((torch.isfinite(got) | ~torch.isfinite(want)).all())
        return None if fewer else "non-finite in other places"
    if not torch.equal(torch.isnan(want), torch.isnan(got)):
        return "NaN in other places"
    if want.is_floating_point():
        infinite = torch.isinf(want)
        if not torch.equal(infinite, torch.isinf(got)):
            return "Inf in other places"
        if not torch.equal(want[infinite], got[infinite]):
            return "Inf of another sign"
    return None
