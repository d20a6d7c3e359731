"""The FP32 checkpoint itself, by transformers: what perplexity is held against. It knows no other operation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from protocol import serve


class Reference:
    def load(self, model: Path, *, threads: int, sequences: int, context_tokens: int) -> dict[str, Any]:  # noqa: ARG002
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        return {"settings": {"weights": "FP32"}, "model_bytes": (model / "model.safetensors").stat().st_size}

    def perplexity(self, windows: list[list[int]]) -> tuple[float, int]:
        import torch

        nll, count = 0.0, 0
        with torch.inference_mode():
            for window in windows:
                ids = torch.tensor(window)
                log_probs = self.model(ids[None]).logits[0, :-1].double().log_softmax(-1)  # (tokens - 1, vocab)
                nll -= float(log_probs.gather(1, ids[1:, None]).sum())
                count += len(window) - 1
        return nll, count


if __name__ == "__main__":
    serve(Reference())  # type: ignore[arg-type]
