"""What looplift is compared with beside the naive model and torch.compile: PyTorch's own scans."""

from __future__ import annotations

from typing import Any, cast

import looplift
import torch
from looplift.passes.batch_timesteps import BatchTimesteps
from looplift.passes.reroll_loops import RerollLoops
from torch import nn
from torch.fx import GraphModule


class AsScan(nn.Module):
    """A model's loops as `torch.ops.higher_order.scan`, as one would write them for torch.compile:
    folded, with what no later step depends on outside."""

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        super().__init__()
        folded = looplift.apply_passes(model, inputs, passes=(RerollLoops(), BatchTimesteps()),
                                       measure=False, verify=False)
        self.model, self.graph = model, cast(GraphModule, folded.graph_module)
        _cloned(self.graph)
        state = dict([*model.named_parameters(), *model.named_buffers()])
        named = {name.replace(".", "_"): name for name in state}
        self.given = [named.get(node.name) for node in self.graph.graph.nodes
                      if node.op == "placeholder"]

    def forward(self, *args: Any) -> Any:
        left, state = iter(args), dict([*self.model.named_parameters(),
                                        *self.model.named_buffers()])
        made = self.graph(*(next(left) if name is None else state[name] for name in self.given))
        return made[0] if len(made) == 1 else made


def _cloned(module: nn.Module) -> None:
    """Let no step return the same tensor twice, or one it was given: `scan` wants it so."""
    for body in module.children():
        if isinstance(body, GraphModule):
            _cloned(body)
            end = body.graph.output_node()
            results: Any = end.args[0]
            with body.graph.inserting_before(end):
                end.args = ([body.graph.call_function(torch.ops.aten.clone.default, (result,))
                             for result in results],)
            body.recompile()
