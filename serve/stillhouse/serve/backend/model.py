"""What Triton's Python backend loads for `backend: "stillhouse"`: a thin adapter over stillhouse.serve.

Triton starts one process only to complete the configuration and another to serve, so what each needs is imported
where it is needed.
"""

from __future__ import annotations

from typing import Any


class TritonPythonModel:
    """The interface that Triton's Python backend calls."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        from stillhouse.serve.tensors import complete_config

        return complete_config(auto_complete_model_config)

    def initialize(self, args: dict[str, str]) -> None:
        from stillhouse.serve.triton_model import ServedVersion

        self._served = ServedVersion(args)

    def execute(self, requests: list[Any]) -> None:
        self._served.execute(requests)

    def finalize(self) -> None:
        self._served.close()
