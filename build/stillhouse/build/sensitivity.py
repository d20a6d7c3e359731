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

from stillhouse.build.nbits import EMBEDDING, HEAD
from stillhouse.build.stream import LINEARS, LayerStream, node_of
from stillhouse.build.worker import Share

Change = Callable[[str, Tensor, Tensor], dict[str, Tensor]]
_ROWS = 256  # positions whose logits are worked on at a time


def divergence_by_weight(
    share: Share, stream: LayerStream, tokens: Tensor, nodes: Collection[str], change: Change, seed: int = 0
) -> tuple[dict[str, dict[str, float]], Tensor]:
    """For each of `nodes` and every variant that `change(node, weight, inputs)` names: the KL, nats a token.

    `tokens` (B, S); `change` gives the difference (N, K) of each variant to the weight (N, K), which is read by inputs
    (B, S, K). `nodes` may hold the head and the embedding; a tied one is priced as both. Also returned: the original's
    hidden states (B, S, D) before the final norm.
    """
    inputs = []
    hidden = stream.embed(tokens)
    with torch.no_grad():
        for index in range(stream.layers):
            inputs.append(hidden)
            hidden = stream.run(stream.layer(index), hidden)
            stream.release(index)
            share(0.25 * (index + 1) / stream.layers)
    gradient, costs = _through_head(stream, hidden, nodes, change, seed)
    for index in reversed(range(stream.layers)):
        gradient, own = _through_layer(stream, index, inputs.pop(), gradient, nodes, change)
        costs |= own
        share(1 - 0.7 * index / stream.layers)
    read = EMBEDDING if EMBEDDING in nodes else HEAD if HEAD in nodes and stream.tied else None
    if read is not None:
        lookups, as_head = _of_lookups(stream, tokens, gradient, read, change), costs.get(read, {})
        costs[read] = {variant: cost + as_head.get(variant, 0.0) for variant, cost in lookups.items()}
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


def _through_head(
    stream: LayerStream, hidden: Tensor, nodes: Collection[str], change: Change, seed: int
) -> tuple[Tensor, dict[str, dict[str, float]]]:
    """The gradient (B, S, D), at the last layer's output, of the log-probability of tokens drawn from the model.

    Beside it the head's costs, where `nodes` has it.
    """
    generator = torch.Generator().manual_seed(seed)
    norm, head = stream.final_norm(), stream.head()
    leaf = hidden.detach().requires_grad_()
    normed = norm(leaf)
    rows = normed.detach().reshape(-1, normed.shape[-1])
    differences = change(HEAD, head, rows) if HEAD in nodes else {}
    squares = dict.fromkeys(differences, 0.0)
    gradients = []
    for part in rows.split(_ROWS):
        delta = torch.softmax(part @ head.T, -1)
        drawn = torch.multinomial(delta, 1, generator=generator)
        delta.scatter_add_(1, drawn, torch.full(drawn.shape, -1.0))  # softmax minus the drawn token
        for variant, difference in differences.items():
            squares[variant] += float((part @ difference.T).mul_(delta).sum(-1).square().sum())
        gradients.append(delta @ head)
    normed.backward(torch.cat(gradients).reshape(normed.shape))
    costs = {variant: 0.5 * square / len(rows) for variant, square in squares.items()}
    return _grad(leaf), {HEAD: costs} if costs else {}


def _of_lookups(stream: LayerStream, tokens: Tensor, gradient: Tensor, node: str, change: Change) -> dict[str, float]:
    """The costs of the embedding that `tokens` (B, S) are looked up in, from the gradient (B, S, D) before layer 0."""
    used, places = tokens.unique(return_inverse=True)
    rows = stream.embed(used)
    return {
        variant: 0.5 * float((difference[places] * gradient).sum(-1).square().mean())
        for variant, difference in change(node, rows, rows).items()
    }


def _grad(tensor: Tensor) -> Tensor:
    if tensor.grad is None:
        raise ValueError("nothing flowed back through a linear")
    return tensor.grad


def place(costs: Mapping[str, tuple[float, float]], extra: Mapping[str, int], spare_bytes: int) -> list[str]:
    """Which weights to keep at 8 bits: by the divergence that each byte spares, as long as the bytes last.

    `costs` are (at 4 bits, at 8 bits) in nats a token, `extra` the bytes that 8 bits take more. One may be as large as
    many together (a head), and greed ends before it or because of it: what it spares is compared with what they do.
    """
    gains = {name: (four - eight) / extra[name] for name, (four, eight) in costs.items()}
    ranked = sorted((name for name in gains if gains[name] > 0), key=lambda name: (-gains[name], name))
    largest = max(ranked, key=lambda name: (extra[name], name), default="")
    others = [name for name in ranked if name != largest]

    def spared(chosen: list[str]) -> float:
        return sum(costs[name][0] - costs[name][1] for name in chosen)

    return max((_taken(order, extra, spare_bytes) for order in (ranked, [largest, *others], others)), key=spared)


def _taken(order: list[str], extra: Mapping[str, int], spare_bytes: int) -> list[str]:
    """The names of `order` that fit into the bytes, one after the other."""
    chosen = []
    for name in order:
        if name and extra[name] <= spare_bytes:
            chosen.append(name)
            spare_bytes -= extra[name]
    return chosen
