"""stillhouse's engine on a version directory, asked by token ids. Settings: its defaults."""

from __future__ import annotations

import queue
import time
from pathlib import Path
from typing import Any

from protocol import TTFT_TOKENS, file_bytes, serve, steady_rate, tokens_to_ask


class Ours:
    def load(
        self, model: Path, *, threads: int, sequences: int, context_tokens: int, weights_cache: bool = True
    ) -> dict[str, Any]:
        from stillhouse.engine.model import LanguageModel
        from stillhouse.engine.options import EngineOptions

        options = EngineOptions(
            threads=threads, max_num_seqs=sequences, max_model_len=context_tokens, weights_cache=weights_cache
        )
        self.model = LanguageModel.load(model, options, verify=False)
        defaults = options.model_dump(exclude={"threads", "max_num_seqs", "max_model_len"}, exclude_none=True)
        quantization = self.model.version.manifest.recipe.get("int4", "as built")
        return {
            "settings": {"weights": f"INT4 ({quantization})", "KV cache": "FP32"} | defaults,
            "model_bytes": file_bytes(model / "model.onnx", model / "model.onnx.data"),
        }

    def decode(self, prompts: list[list[int]], tokens: int) -> float:
        return steady_rate(self._run(prompts, tokens_to_ask(tokens, len(prompts)))[1])

    def prefill(self, prompt: list[int]) -> float:
        submitted_s, times_s = self._run([prompt], 1)
        return len(prompt) / (times_s[0][0] - submitted_s)

    def ttft(self, prompts: list[list[int]]) -> list[float]:
        submitted_s, times_s = self._run(prompts, TTFT_TOKENS)
        return [times[0] - submitted_s for times in times_s]

    def perplexity(self, windows: list[list[int]]) -> tuple[float, int]:
        from stillhouse.engine.request import Token
        from stillhouse.engine.sampling import SamplingParams

        nll, count = 0.0, 0
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        for window in windows:
            answers: queue.SimpleQueue[Token] = queue.SimpleQueue()
            self.model.engine.submit(window, params, answers.put)
            token = answers.get()
            if token.error is not None or token.prompt_logprobs is None:
                raise token.error or RuntimeError("the engine gave no prompt_logprobs")
            nll -= sum(entry.logprob for entry in token.prompt_logprobs)
            count += len(token.prompt_logprobs)
        return nll, count

    def _run(self, prompts: list[list[int]], tokens: int) -> tuple[float, list[list[float]]]:
        """Submits all prompts at once; the moment of that, and those of every sequence's tokens."""
        from stillhouse.engine.request import Token
        from stillhouse.engine.sampling import SamplingParams

        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        times_s: list[list[float]] = [[] for _ in prompts]
        ended: queue.SimpleQueue[Token] = queue.SimpleQueue()

        def take(times: list[float], token: Token) -> None:
            times.append(time.perf_counter())
            if token.finish_reason is not None:
                ended.put(token)

        submitted_s = time.perf_counter()
        for prompt, times in zip(prompts, times_s, strict=True):
            self.model.engine.submit(prompt, params, lambda token, times=times: take(times, token))
        for _ in prompts:
            if (error := ended.get().error) is not None:
                raise error
        return submitted_s, times_s


if __name__ == "__main__":
    serve(Ours(), imports=("onnxruntime", "stillhouse.engine.runner", "stillhouse.engine.model"))
