"""How much heads and layers matter to the loss on given examples.

Heads: gradient times activation, |Σ a · ∂L/∂a| of a head's output a, a first-order estimate of the loss change when it
is masked (Michel et al., 2019, https://arxiv.org/abs/1905.10650). Layers: the loss change itself when a layer is left
out (as Men et al., 2024, ShortGPT, https://arxiv.org/abs/2403.03853, find that some may be).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from stillhouse.tune.encoding import Example, collate

Examples = Sequence[Example]


def head_importance(
    model: Any, examples: Examples, share: Callable[[float], None] = lambda _: None
) -> list[list[float]]:
    """For each layer the importance of each of its heads: the mean over examples, in nats a token."""
    layers, heads = model.model.layers, model.config.num_attention_heads
    outputs: list[Any] = [None] * len(layers)

    def catch(at: int) -> Any:
        def hook(_: Any, inputs: tuple[Any, ...]) -> None:
            inputs[0].retain_grad()
            outputs[at] = inputs[0]

        return hook

    hooks = [layer.self_attn.o_proj.register_forward_pre_hook(catch(at)) for at, layer in enumerate(layers)]
    total = torch.zeros(len(layers), heads, dtype=torch.float64)
    try:
        for done, example in enumerate(examples, 1):
            model.zero_grad(set_to_none=True)
            model(**_inputs(model, [example])).loss.backward()
            for at, output in enumerate(outputs):
                product = (output * output.grad)[0].detach().double()  # (S, heads · head_dim)
                total[at] += product.reshape(len(product), heads, -1).sum((0, 2)).abs().cpu()
            share(done / len(examples))
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
    means: list[list[float]] = (total / len(examples)).tolist()
    return means


def layer_importance(model: Any, examples: Examples, share: Callable[[float], None] = lambda _: None) -> list[float]:
    """For each layer how much the loss, in nats a token, grows when it is left out."""
    whole, found = mean_loss(model, examples), []
    for done, layer in enumerate(model.model.layers, 1):
        forward = layer.forward
        layer.forward = lambda hidden_states, *_, **__: hidden_states
        try:
            found.append(mean_loss(model, examples) - whole)
        finally:
            layer.forward = forward
        share(done / len(model.model.layers))
    return found


def mean_loss(model: Any, examples: Examples, batch: int = 8) -> float:
    """The mean loss of an answer token, in nats."""
    nats = tokens = 0.0
    with torch.no_grad():
        for start in range(0, len(examples), batch):
            inputs = _inputs(model, examples[start : start + batch])
            count = inputs["labels"].numel()
            nats, tokens = nats + float(model(**inputs).loss) * count, tokens + count
    return nats / tokens


def _inputs(model: Any, examples: Examples) -> dict[str, Any]:
    device = next(model.parameters()).device
    return {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in collate([examples]).items()
    }
