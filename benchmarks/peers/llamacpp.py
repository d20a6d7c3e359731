"""llama.cpp by its own server (continuous batching), embedded by the package xllamacpp, on a GGUF file.

One slot a sequence, a KV stream of its own for each (kv_unified off: no sequence attends over another's cells), prompt
cache off (no prompt repeats). Requests go to the server's handler directly: no HTTP, JSON it is.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from protocol import TTFT_TOKENS, file_bytes, serve, steady_rate, tokens_to_ask

BATCH_TOKENS, MICRO_BATCH_TOKENS = 2048, 512  # its defaults
GREEDY = {"temperature": 0, "samplers": ["top_k"], "top_k": 1, "ignore_eos": True, "cache_prompt": False}


class LlamaCpp:
    def load(self, model: Path, *, threads: int, sequences: int, context_tokens: int) -> dict[str, Any]:  # noqa: ARG002
        import xllamacpp

        self.xllamacpp, self.model, self.threads = xllamacpp, model, threads
        self.context_tokens, self.slots, self.server = context_tokens, 0, None
        self._serve(1)
        system = xllamacpp.get_system_info()
        return {
            "settings": {
                "version": xllamacpp.__version__,
                "weights": model.stem,
                "KV cache": "F16, a stream a sequence",
                "n_batch": BATCH_TOKENS,
                "n_ubatch": MICRO_BATCH_TOKENS,
                "flash attention": "auto (its default)",
                "compiled for": " ".join(part.split("=")[0].strip() for part in system.split("|") if "= 1" in part),
            },
            "model_bytes": file_bytes(model),
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
        raise NotImplementedError("its server gives no log-probabilities of a prompt")

    def _serve(self, slots: int) -> None:
        """(Re)starts the server with `slots` slots: each has a fixed share of the context, paid for in memory."""
        if self.slots == slots:
            return
        self.server = None
        params = self.xllamacpp.CommonParams()
        params.model.path = str(self.model)
        params.n_parallel = self.slots = slots
        params.n_ctx = slots * (self.context_tokens if slots == 1 else 256)
        params.kv_unified = False
        params.n_batch, params.n_ubatch = BATCH_TOKENS, MICRO_BATCH_TOKENS
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = self.threads
        params.cache_ram_mib = 0
        params.fit_params = params.warmup = False
        params.verbosity = -1
        self.server = self.xllamacpp.Server(params)

    def _run(self, prompts: list[list[int]], tokens: int) -> tuple[float, list[list[float]]]:
        """Submits all prompts at once, each from a thread; the moment of that, and those of every sequence's tokens."""
        self._serve(len(prompts))
        times_s: list[list[float]] = [[] for _ in prompts]
        errors: list[Any] = []

        def ask(prompt: list[int], times: list[float]) -> None:
            def take(chunk: Any) -> None:
                for part in chunk if isinstance(chunk, list) else [chunk]:
                    if "choices" not in part:
                        errors.append(part)
                        continue
                    # A chunk may bring several tokens (half a character is held back): the server counts them.
                    new = part["timings"]["predicted_n"] - len(times)
                    times.extend([time.perf_counter()] * new)

            request = GREEDY | {"prompt": prompt, "n_predict": tokens, "stream": True, "timings_per_token": True}
            self.server.handle_completions(request, take)

        threads = [threading.Thread(target=ask, args=pair) for pair in zip(prompts, times_s, strict=True)]
        submitted_s = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors or not all(times_s):
            raise RuntimeError(f"llama.cpp's server: {errors[0] if errors else 'a request got no token'}")
        return submitted_s, times_s


if __name__ == "__main__":
    serve(LlamaCpp(), imports=("xllamacpp",))
