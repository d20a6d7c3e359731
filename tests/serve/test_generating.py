"""The gateway's view of Triton's models, with the server's answers made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stillhouse.gateway.errors import ModelUnknown, Unavailable
from stillhouse.gateway.gateway import Gateway
from stillhouse.serve.generating import TritonGenerator
from stillhouse.serve.live import LiveModel


class HalfReady:
    """A server that has one model ready, and another not."""

    async def ready(self, model: str, version: int) -> bool:
        assert version == 1
        return model == "support-int4"


async def test_a_model_without_a_ready_version_is_refused_alone(support_repository: Path) -> None:
    client: Any = HalfReady()
    models = [LiveModel(support_repository / name, {}) for name in ("support-int4", "support-int8")]
    for model in models:
        await model.follow(client)
    generator = TritonGenerator("grpc://127.0.0.1:1", models)
    gateway = Gateway()
    gateway.generator = generator
    assert [model.name for model in gateway.models()] == ["support-int4"]
    assert gateway.model("support-int4").version == 1
    with pytest.raises(Unavailable, match="support-int8 cannot answer now: no version of it is ready"):
        gateway.model("support-int8")
    with pytest.raises(ModelUnknown, match="Models here: support-int4"):
        gateway.model("other")
    assert gateway.fault() == "support-int8 cannot answer now: no version of it is ready"
    await generator.close()
