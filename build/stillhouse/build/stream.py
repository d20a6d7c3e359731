"""A checkpoint one decoder layer at a time: what a layer needs is loaded when its turn comes, so that memory holds
one layer and the activations, whatever the model's size. The layers are transformers' own modules, in float32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from stillhouse.build.nbits import EMBEDDING, HEAD

# A MatMul of the graph (below "/model/layers.<index>/") and the checkpoint's modules whose rows it holds.
LINEARS: dict[str, tuple[str, ...]] = {
    "attn/qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn/q_proj": ("self_attn.q_proj",),
    "attn/k_proj": ("self_attn.k_proj",),
    "attn/v_proj": ("self_attn.v_proj",),
    "attn/o_proj": ("self_attn.o_proj",),
    "mlp/gate_proj": ("mlp.gate_proj",),
    "mlp/up_proj": ("mlp.up_proj",),
    "mlp/down_proj": ("mlp.down_proj",),
}
# Modules that read the same input, in the order in which a layer reaches them.
SAME_INPUT: tuple[tuple[str, ...], ...] = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def node_of(layer: int, linear: str) -> str:
    """The graph's name of a layer's linear, e.g. "/model/layers.3/mlp/down_proj/MatMul"."""
    return f"/model/layers.{layer}/{linear}/MatMul"


def layer_of(node: str) -> int:
    """The layer that a node belongs to."""
    return int(node.split("/")[2].rpartition(".")[2])


def modules_of(node: str) -> list[str]:
    """The checkpoint's modules whose rows a node holds, in their order."""
    if node == HEAD:
        return ["lm_head"]
    if node == EMBEDDING:
        return ["model.embed_tokens"]
    linear = node.split("/", 3)[3].rpartition("/")[0]
    return [f"model.layers.{layer_of(node)}.{name}" for name in LINEARS[linear]]


class LayerStream:
    """The merged checkpoint at `folder`, run layer by layer. Hidden states are (B, S, D) float32."""

    def __init__(self, folder: Path) -> None:
        self.config: Any = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        self.config._attn_implementation = "sdpa"
        self._files = _tensor_files(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
        self._model: Any = model.eval().requires_grad_(False)
        self._rotary = type(model.model.rotary_emb)(self.config)
        self.layers = int(self.config.num_hidden_layers)

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding's weight."""
        return "lm_head.weight" not in self._files

    def tensor(self, name: str) -> Tensor:
        """A tensor of the checkpoint in float32."""
        with safe_open(str(self._files[name]), framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor.float()

    def weight(self, node: str) -> Tensor:
        """The weight (N, K) of a node of the graph: a linear of a layer, the head or the embedding."""
        if node == HEAD:
            return self.head()
        parts = [self.tensor(f"{module}.weight") for module in modules_of(node)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def embed(self, tokens: Tensor) -> Tensor:
        """The hidden states (B, S, D) that enter the first layer."""
        return nn.functional.embedding(tokens, self.tensor("model.embed_tokens.weight"))

    def layer(self, index: int) -> nn.Module:
        """Layer `index` with its weights."""
        return self._filled(self._model.model.layers[index], f"model.layers.{index}.")

    def release(self, index: int) -> None:
        """Lets go of layer `index`'s weights."""
        self._model.model.layers[index].to("meta")

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """What `layer` makes of `hidden`, causally from position 0."""
        positions = torch.arange(hidden.shape[1])[None]
        rotary = self._rotary(hidden, positions)
        result = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary)
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output

    def final_norm(self) -> nn.Module:
        """The norm before the head."""
        return self._filled(self._model.model.norm, "model.norm.")

    def head(self) -> Tensor:
        """The head's weight (V, D); the embedding's where they are tied."""
        return self.tensor("model.embed_tokens.weight" if self.tied else "lm_head.weight")

    def _filled(self, module: nn.Module, prefix: str) -> nn.Module:
        state = {name: self.tensor(prefix + name) for name in module.state_dict()}
        module.load_state_dict(state, assign=True)
        return module.requires_grad_(False)


def _tensor_files(folder: Path) -> dict[str, Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
        return {name: folder / file for name, file in shards.items()}
    file = folder / "model.safetensors"
    with safe_open(str(file), framework="pt") as tensors:
        return dict.fromkeys(tensors.keys(), file)
