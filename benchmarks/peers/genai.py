"""onnxruntime-genai on the same version directory, so at the same fidelity.

Its Engine API batches on the CPU too ("static batching": its paged cache needs CUDA), but decodes 16 sequences three
times slower than its Generator with a batch; so the Generator it is, with past and present in the same buffer.
Prompts of unequal length are padded on the left, as its own batches are.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from protocol import TTFT_TOKENS, file_bytes, serve


class GenAI:
    def load(self, model: Path, *, threads: int, sequences: int, context_tokens: int) -> dict[str, Any]:  # noqa: ARG002
        import onnxruntime_genai as og

        config = og.Config(str(model))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self.model = og.Model(config)
        og.Tokenizer(self.model)  # the others' loading reads theirs too
        self.pad_id = json.loads((model / "genai_config.json").read_bytes())["model"]["pad_token_id"]
        return {
            "settings": {
                "version": og.__version__,
                "weights": "the same file as ours",
                "KV cache": "FP32, past_present_share_buffer",
                "API": "Generator, one batch",
            },
            "model_bytes": file_bytes(model / "model.onnx", model / "model.onnx.data"),
        }

    def decode(self, prompts: list[list[int]], tokens: int) -> float:
        generator = self._start(prompts, tokens + 2)
        generator.generate_next_token()
        started_s = time.perf_counter()
        for _ in range(tokens):
            generator.generate_next_token()
        return len(prompts) * tokens / (time.perf_counter() - started_s)

    def prefill(self, prompt: list[int]) -> float:
        started_s = time.perf_counter()
        self._start([prompt], 1).generate_next_token()
        return len(prompt) / (time.perf_counter() - started_s)

    def ttft(self, prompts: list[list[int]]) -> list[float]:
        started_s = time.perf_counter()
        self._start(prompts, TTFT_TOKENS).generate_next_token()
        return [time.perf_counter() - started_s] * len(prompts)

    def perplexity(self, windows: list[list[int]]) -> tuple[float, int]:
        import numpy as np

        nll, count = 0.0, 0
        for window in windows:
            logits = self._start([window], 1).get_output("logits")[0, :-1].astype(np.float64)  # (tokens - 1, vocab)
            top = logits.max(axis=1)
            log_sum = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
            nll += float((log_sum - logits[np.arange(len(window) - 1), window[1:]]).sum())
            count += len(window) - 1
        return nll, count

    def _start(self, prompts: list[list[int]], tokens: int) -> Any:
        """A generator whose prompts are prefilled; min_length keeps it from ending early."""
        import numpy as np
        import onnxruntime_genai as og

        longest = max(map(len, prompts))
        ids = np.array([[self.pad_id] * (longest - len(prompt)) + prompt for prompt in prompts], np.int32)
        params = og.GeneratorParams(self.model)
        length = longest + tokens
        params.set_search_options(do_sample=False, batch_size=len(prompts), max_length=length, min_length=length)
        generator = og.Generator(self.model, params)
        generator.append_tokens(ids)
        return generator


if __name__ == "__main__":
    serve(GenAI(), imports=("onnxruntime_genai", "numpy"))
