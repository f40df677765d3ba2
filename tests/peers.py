"""What looplift is compared with beside the naive model and torch.compile: PyTorch's own scans."""

from __future__ import annotations

from typing import Any, cast

import looplift
import torch
from looplift.passes.batch_timesteps import BatchTimesteps
from looplift.passes.reroll_loops import RerollLoops
from torch import nn
from torch.fx import GraphModule, Node


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
        with torch._dynamo.patch_dynamo_config(capture_scalar_outputs=True):  # a step's number
            made = self.graph(*(next(left) if name is None else state[name] for name in self.given))
        return made[0] if len(made) == 1 else made


def _cloned(module: GraphModule) -> None:
    """Let no loop begin with one tensor twice, and no step return one twice, or one that it was
    given: `scan` wants it so."""
    def clones(before: Node, nodes: Any) -> list[Node]:
        with module.graph.inserting_before(before):
            return [module.graph.call_function(torch.ops.aten.clone.default, (n,)) for n in nodes]

    for scan in module.graph.find_nodes(op="call_function", target=torch.ops.higher_order.scan):
        body, carries, *rest = scan.args
        scan.args = (body, clones(scan, carries), *rest)
        inner = cast(GraphModule, getattr(module, str(cast(Node, body).target)))
        end = inner.graph.output_node()
        _cloned(inner)
        results: Any = end.args[0]
        with inner.graph.inserting_before(end):
            end.args = ([inner.graph.call_function(torch.ops.aten.clone.default, (result,))
                         for result in results],)
        inner.recompile()
    module.recompile()
