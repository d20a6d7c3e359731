"""OpenVINO GenAI's continuous batching pipeline, asked by token ids, on a folder that openvino_convert.py wrote.

Settings are its documented ones for throughput on a CPU: U8 KV cache and dynamic quantization of activations in
groups of 32 (both the plugin's defaults), 256 tokens a step with split-fuse, prefix caching off (no prompt repeats).
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from protocol import TTFT_TOKENS, file_bytes, serve, steady_rate, tokens_to_ask

KV_BYTES_PER_TOKEN = 30 * 2 * 3 * (64 + 8)  # U8 with scales, SmolLM2-135M; only sizes the pool
PROPERTIES = {"KV_CACHE_PRECISION": "u8", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "32"}


class OpenVINO:
    def load(self, model: Path, *, threads: int, sequences: int, context_tokens: int) -> dict[str, Any]:  # noqa: ARG002
        import openvino
        import openvino_genai

        self.genai, self.tensor = openvino_genai, openvino.Tensor
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = 0  # GB; 0: the pool grows with use
        scheduler.max_num_seqs = sequences
        scheduler.max_num_batched_tokens = 256
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = False
        properties = PROPERTIES | {"INFERENCE_NUM_THREADS": threads}
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(str(model), scheduler, "CPU", properties)
        self.ids = 0
        conversion = json.loads((model / "conversion.json").read_bytes())
        return {
            "settings": {
                "version": openvino_genai.get_version()
                if hasattr(openvino_genai, "get_version")
                else openvino.__version__,
                "weights": "INT4, " + ", ".join(f"{name} {value}" for name, value in conversion.items()),
                "KV cache": PROPERTIES["KV_CACHE_PRECISION"].upper(),
                "dynamic quantization group": PROPERTIES["DYNAMIC_QUANTIZATION_GROUP_SIZE"],
                "scheduler": "max_num_batched_tokens 256, dynamic_split_fuse, no prefix caching, cache grows with use",
            },
            "model_bytes": file_bytes(model / "openvino_model.xml", model / "openvino_model.bin"),
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
        nll, count = 0.0, 0
        config = self._config(1)
        config.echo, config.logprobs = True, 1
        for window in windows:
            handle = self._add(window, config)
            while self.pipeline.has_non_finished_requests():
                self.pipeline.step()
            output = handle.read_all()[0]
            if len(output.generated_log_probs) < len(window):
                raise NotImplementedError("the pipeline gives no log-probabilities of a prompt")
            nll -= sum(output.generated_log_probs[1 : len(window)])
            count += len(window) - 1
        return nll, count

    def _run(self, prompts: list[list[int]], tokens: int) -> tuple[float, list[list[float]]]:
        """Submits all prompts at once; the moment of that, and those of every sequence's tokens."""
        config = self._config(tokens)
        times_s: list[list[float]] = [[] for _ in prompts]
        submitted_s = time.perf_counter()
        handles = [self._add(prompt, config) for prompt in prompts]
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            now_s = time.perf_counter()
            for handle, times in zip(handles, times_s, strict=True):
                while handle.can_read():
                    times += [now_s for output in handle.read().values() for _ in output.generated_ids]
        return submitted_s, times_s

    def _config(self, tokens: int) -> Any:
        return self.genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True, do_sample=False)

    def _add(self, prompt: list[int], config: Any) -> Any:
        import numpy as np

        self.ids += 1
        return self.pipeline.add_request(self.ids, self.tensor(np.array([prompt], np.int64)), config)


if __name__ == "__main__":
    serve(OpenVINO(), imports=("openvino_genai", "numpy"))
