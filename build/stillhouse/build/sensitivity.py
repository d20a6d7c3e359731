"""How much each weight's rounding costs, measured: the divergence from the original that it alone would cause.

To second order a change ΔW of one linear adds ½ E[(δᵀ ΔW x)²] to KL(original ‖ changed), where x is the linear's input
and δ the gradient, with respect to its output, of the log-probability of tokens that the model itself draws (the Fisher
information; Martens, 2020, https://arxiv.org/abs/1412.1193). So one pass forth and back prices every weight at every
precision, where measuring each alone would take as many passes as there are weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from stillhouse.build.stream import LINEARS, LayerStream, node_of
from stillhouse.build.worker import Share

Change = Callable[[str, Tensor, Tensor], dict[str, Tensor]]
_ROWS = 256  # positions whose logits are worked on at a time


def divergence_by_weight(
    share: Share, stream: LayerStream, tokens: Tensor, nodes: Collection[str], change: Change, seed: int = 0
) -> tuple[dict[str, dict[str, float]], Tensor]:
    """For each of `nodes` and every variant that `change(node, weight, inputs)` names: the KL, nats a token.

    `tokens` (B, S); `change` gives the difference (N, K) of each variant to the weight (N, K), which is read by inputs
    (B, S, K). Also returned: the original's hidden states (B, S, D) before the final norm.
    """
    inputs = []
    hidden = stream.embed(tokens)
    with torch.no_grad():
        for index in range(stream.layers):
            inputs.append(hidden)
            hidden = stream.run(stream.layer(index), hidden)
            stream.release(index)
            share(0.25 * (index + 1) / stream.layers)
    gradient = _gradient_of_own_tokens(stream, hidden, seed)
    costs: dict[str, dict[str, float]] = {}
    for index in reversed(range(stream.layers)):
        gradient, own = _through_layer(stream, index, inputs.pop(), gradient, nodes, change)
        costs |= own
        share(1 - 0.7 * index / stream.layers)
    return costs, hidden


def _through_layer(
    stream: LayerStream, index: int, hidden: Tensor, gradient: Tensor, nodes: Collection[str], change: Change
) -> tuple[Tensor, dict[str, dict[str, float]]]:
    """The gradient before layer `index` from that behind it, and the costs of the layer's linears."""
    layer = stream.layer(index)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            output.retain_grad()
            seen[name] = (arguments[0].detach(), output)

        return hook

    modules = {name for names in LINEARS.values() for name in names}
    hooks = [layer.get_submodule(name).register_forward_hook(watch(name)) for name in sorted(modules)]
    hidden = hidden.detach().requires_grad_()
    stream.run(layer, hidden).backward(gradient)
    for handle in hooks:
        handle.remove()
    costs: dict[str, dict[str, float]] = {}
    for linear, names in LINEARS.items():
        node = node_of(index, linear)
        if node not in nodes:
            continue
        weight = torch.cat([layer.get_submodule(name).weight for name in names])
        delta = torch.cat([_grad(seen[name][1]) for name in names], -1)
        read = seen[names[0]][0]
        costs[node] = {
            variant: 0.5 * float(((read @ difference.T) * delta).sum(-1).square().mean())
            for variant, difference in change(node, weight, read).items()
        }
    stream.release(index)
    return _grad(hidden), costs


def _gradient_of_own_tokens(stream: LayerStream, hidden: Tensor, seed: int) -> Tensor:
    """The gradient (B, S, D), at the last layer's output, of the log-probability of tokens drawn from the model."""
    generator = torch.Generator().manual_seed(seed)
    norm, head = stream.final_norm(), stream.head()
    leaf = hidden.detach().requires_grad_()
    normed = norm(leaf)
    rows = normed.detach().reshape(-1, normed.shape[-1])
    gradients = []
    for part in rows.split(_ROWS):
        probabilities = torch.softmax(part @ head.T, -1)
        drawn = torch.multinomial(probabilities, 1, generator=generator)
        probabilities.scatter_add_(1, drawn, torch.full(drawn.shape, -1.0))  # softmax minus the drawn token
        gradients.append(probabilities @ head)
    normed.backward(torch.cat(gradients).reshape(normed.shape))
    return _grad(leaf)


def _grad(tensor: Tensor) -> Tensor:
    if tensor.grad is None:
        raise ValueError("nothing flowed back through a linear")
    return tensor.grad


def place(costs: Mapping[str, tuple[float, float]], extra: Mapping[str, int], spare_bytes: int) -> list[str]:
    """Which weights to keep at 8 bits: by the divergence that each byte spares, as long as the bytes last.

    `costs` are (at 4 bits, at 8 bits) in nats a token, `extra` the bytes that 8 bits take more.
    """
    gains = {name: (four - eight) / extra[name] for name, (four, eight) in costs.items()}
    chosen = []
    for name in sorted(gains, key=lambda name: (-gains[name], name)):
        if gains[name] > 0 and extra[name] <= spare_bytes:
            chosen.append(name)
            spare_bytes -= extra[name]
    return chosen
