"""A rewritten graph as an `nn.Module` on the original's own parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import starmap
from operator import getitem
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from .builder import storage
from .capture import Capture
from .emit import compiled
from .state import State

GraphFor = Callable[[Sequence[Any]], Callable[[], GraphModule]]


class Rewritten(nn.Module):
    """Runs one rewritten graph; parameters, buffers and submodules are the original's own.

    Takes what the original takes, for inputs of the captured shapes; `code` is the source
    that runs.
    """

    original: nn.Module
    captured: Capture
    graph_module: GraphModule
    run: Callable[..., list[Any]]
    places: list[tuple[dict[str, Any], str]]  # of the model's tensors
    deep: list[tuple[int, State]]  # of these, the ones in tables and tuples
    code: str
    graph_for: GraphFor

    def __init__(
        self, original: nn.Module, captured: Capture, graph_module: GraphModule,
        graph_for: GraphFor | None = None,
    ) -> None:
        """`graph_for`: where the source holds for several lengths, gives the graph of inputs."""
        super().__init__()
        share(self, original)
        own = vars(self)
        own["original"], own["captured"], own["graph_module"] = original, captured, graph_module
        own["run"], own["code"] = compiled(graph_module)
        own["graph_for"] = graph_for or (lambda _: lambda: graph_module)
        own["places"] = [s.place() for s in captured.state]
        own["deep"] = [(i, s) for i, s in enumerate(captured.state) if s.path]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        return self.run_flat(leaves)

    def overlaps(self, leaves: Sequence[Any]) -> bool:
        """Whether it writes to tensors, and inputs lie in the memory of the model's own."""
        if not self.captured.written:
            return False
        own = {storage(tensor) for tensor in self._held()}
        return any(isinstance(leaf, Tensor) and storage(leaf) in own for leaf in leaves)

    def _held(self) -> list[Tensor]:
        """The model's tensors as they are now."""
        found: list[Tensor] = list(starmap(getitem, self.places))
        for place, state in self.deep:
            found[place] = state.get()
        return found

    def run_flat(self, leaves: list[Any]) -> Any:
        """The output for the flat inputs `leaves`."""
        captured = self.captured
        tensors = [*self._held(), *(leaves[i] for i in captured.tensor_inputs)]
        if not captured.written:
            return self._returned(self.run(*tensors))
        given = list(tensors)
        if torch.is_grad_enabled():
            for place in captured.written:  # autograd may save what is about to be overwritten
                given[place] = given[place].clone()
        results = self.run(*given)
        outputs = results[: captured.outputs]
        write_back(tensors, captured, results[captured.outputs :])
        for position, source in captured.same_as.items():
            outputs[position] = tensors[source]
        return self._returned(outputs)

    def _returned(self, outputs: list[Any]) -> Any:
        for position, constant in self.captured.constants.items():
            outputs[position] = constant
        for assigned in self.captured.assigned:
            assigned.assign(outputs)
        if self.captured.assigned:
            outputs = outputs[: self.captured.output_spec.num_leaves]
        if self.captured.output_spec.is_leaf():
            return outputs[0]
        return pytree.tree_unflatten(outputs, self.captured.output_spec)


def write_back(tensors: list[Tensor], captured: Capture, values: list[Tensor]) -> None:
    """Store the new values of what the model writes to; gradients flow through written inputs."""
    held = len(captured.state)
    for place, new in zip(captured.written, values, strict=True):
        if place < held:
            with torch.no_grad():
                tensors[place].copy_(new.detach())
        else:
            tensors[place].copy_(new)


def share(module: nn.Module, original: nn.Module) -> None:
    """Make `module` hold the very dictionaries of `original`: the same parameters, for good."""
    own = vars(module)
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        own[name] = vars(original)[name]
    own["training"] = original.training
