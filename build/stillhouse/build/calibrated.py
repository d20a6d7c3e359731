"""GPTQ over a model: layer after layer, each on the inputs that the layers before it, already rounded, give it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.build.blocks import BlockWeight
from stillhouse.build.gptq import gptq, hessian_of, output_error
from stillhouse.build.nbits import EMBEDDING, HEAD
from stillhouse.build.rounding import rounded
from stillhouse.build.stream import LINEARS, SAME_INPUT, LayerStream, node_of
from stillhouse.build.worker import Share
from stillhouse.engine.errors import StillhouseError


@dataclass(slots=True)
class _Calibrated:
    """The linears of a model as they are rounded: 4 bits by GPTQ, 8 bits to nearest; `keep` gets each.

    `errors` of those of 4 bits: the output's relative error by GPTQ, and rounded to nearest.
    """

    bits: Mapping[str, int]
    keep: Callable[[str, BlockWeight], None]
    block_size: int
    symmetric: bool
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)

    def round_readers(
        self, index: int, layer: nn.Module, names: tuple[str, ...], _: nn.Module, arguments: tuple[Any, ...]
    ) -> None:
        """Rounds the modules `names` of layer `index`, which all read the input that just arrived."""
        readers = {node_of(index, linear): own for linear, own in LINEARS.items() if own[0] in names}
        mine = {node: own for node, own in readers.items() if node in self.bits}
        hessian = hessian_of(arguments[0]) if any(self.bits[node] == 4 for node in mine) else None
        for node, members in mine.items():
            self._round(node, [layer.get_submodule(name) for name in members], hessian)

    def _round(self, node: str, modules: list[Any], hessian: Tensor | None) -> None:
        """Rounds one node's weight, and puts what it became into the modules that it is made of."""
        chosen = self.round(node, torch.cat([module.weight for module in modules]), hessian)
        parts = torch.from_numpy(chosen.dequantized()).split([len(module.weight) for module in modules])
        for module, part in zip(modules, parts, strict=True):
            module.weight = nn.Parameter(part, requires_grad=False)

    def round(self, node: str, weight: Tensor, hessian: Tensor | None) -> BlockWeight:
        """Rounds one node's weight, keeps it, and returns what it became."""
        bits = self.bits[node]
        symmetric = self.symmetric or bits == 8
        chosen = nearest = rounded(weight, "rtn", bits=bits, block_size=self.block_size, symmetric=symmetric)
        if hessian is not None and bits == 4:
            chosen = gptq(weight, hessian, bits=bits, block_size=self.block_size, symmetric=symmetric)
            errors = [output_error(weight, torch.from_numpy(each.dequantized()), hessian) for each in (chosen, nearest)]
            if not errors[1] > 0:
                chosen = nearest  # zeros, or weights that lie on the grid: there is nothing to do better
            elif not errors[0] < errors[1]:
                raise StillhouseError(
                    f"GPTQ did nothing for {node}: its output error is {errors[0]:.3g}, to nearest {errors[1]:.3g}",
                    hint='is the calibration text long enough? method = "k_quant" needs none',
                )
            self.errors[node] = (errors[0], errors[1])
        self.keep(node, chosen)
        return chosen


def gptq_layers(
    share: Share,
    stream: LayerStream,
    tokens: Tensor,
    bits: Mapping[str, int],
    keep: Callable[[str, BlockWeight], None],
    *,
    block_size: int,
    symmetric: bool = False,
) -> dict[str, tuple[float, float]]:
    """Rounds the linears of all layers that `bits` names and hands each to `keep`; `tokens` (B, S) calibrate.

    `bits` may name the head and the embedding too. An embedding has no inputs: its scales are searched, no more.
    Returns the relative output error of each one of 4 bits: by GPTQ, and rounded to nearest. Raises StillhouseError
    where GPTQ did no better: that is a fault, not a result.
    """
    result = _Calibrated(bits, keep, block_size, symmetric)
    hidden = stream.embed(tokens)
    for index in range(stream.layers):
        layer = stream.layer(index)
        # The whole calibration goes through a layer at once: as an input arrives, all that reads it is rounded first.
        hooks = [
            layer.get_submodule(names[0]).register_forward_pre_hook(partial(result.round_readers, index, layer, names))
            for names in SAME_INPUT
        ]
        with torch.no_grad():
            hidden = stream.run(layer, hidden)
        for hook in hooks:
            hook.remove()
        stream.release(index)
        share((index + 1) / stream.layers)
    if HEAD in bits:
        with torch.no_grad():
            result.round(HEAD, stream.head(), hessian_of(stream.final_norm()(hidden)))
    if EMBEDDING in bits:
        weight = stream.weight(EMBEDDING)
        keep(EMBEDDING, gptq(weight, torch.eye(weight.shape[1]), bits=4, block_size=block_size, symmetric=symmetric))
    return result.errors
