"""The gateway's view of Triton's models, with the server's answers made up."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stillhouse.gateway.errors import ModelUnknown, Unavailable
from stillhouse.gateway.gateway import Gateway
from stillhouse.serve import live
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


class Ready:
    async def ready(self, *_: object) -> bool:
        return True


async def test_a_model_is_called_what_its_folder_is_whatever_it_was_built_as(
    support_repository: Path, tmp_path: Path
) -> None:
    (tmp_path / "shop-bot").symlink_to(support_repository / "support-int4")
    models = [LiveModel(folder, {}) for folder in (tmp_path / "shop-bot", support_repository / "support-int4")]
    client: Any = Ready()
    for model in models:
        await model.follow(client)
    generator = TritonGenerator("grpc://127.0.0.1:1", models)
    gateway = Gateway()
    gateway.generator = generator
    assert [model.name for model in gateway.models()] == ["shop-bot", "support-int4"]
    assert gateway.model("shop-bot").version == 1
    await generator.close()


@pytest.mark.parametrize(
    ("target", "provider", "slots"),
    [("cpu", "auto", 32), ("cuda", "auto", 5), ("cpu", "cuda", 5), ("cuda", "tensorrt", 5), ("cuda", "cpu", 32)],
)
async def test_the_gateway_knows_as_many_slots_as_the_engine_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, provider: str, slots: int
) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "tokenizer.json").write_text("{}")
    manifest = SimpleNamespace(
        model="m-int4",
        target=target,
        network=SimpleNamespace(context_length=4096),
        memory=SimpleNamespace(kv_bytes_per_token=1000),
    )
    monkeypatch.setattr(live, "live_versions", lambda _: [1])
    monkeypatch.setattr(live, "open_version", lambda path, **_: SimpleNamespace(path=path, manifest=manifest))
    monkeypatch.setattr(live, "Tokenizer", lambda _: None)
    monkeypatch.setattr(live, "describe", lambda *given, **_: SimpleNamespace(version=1, slots=given[-1].slots))
    model = LiveModel(tmp_path, {"provider": provider, "max_model_len": 1000, "kv_cache_bytes": 5_500_000})
    client: Any = Ready()
    await model.follow(client)
    assert model.live.slots == slots


@pytest.mark.parametrize(("version", "ends"), [(1, ["live"]), (2, ["other"])])
async def test_the_death_of_a_version_ends_its_streams_alone(
    support_repository: Path, version: int, ends: list[str]
) -> None:
    client: Any = Ready()
    model = LiveModel(support_repository / "support-int4", {})
    await model.follow(client)
    generator = TritonGenerator("grpc://127.0.0.1:1", [model])
    pulse = generator._pulses["support-int4"]
    mailboxes: dict[str, Any] = {"live": asyncio.Queue(), "other": asyncio.Queue()}
    pulse.begin(mailboxes["live"], 1)
    pulse.begin(mailboxes["other"], 2)
    generator._loop = asyncio.get_running_loop()
    generator.fail("support-int4", version, "its process has died")
    await asyncio.sleep(0)
    assert [name for name, mailbox in mailboxes.items() if not mailbox.empty()] == ends
    assert (generator.fault() is None) == (version != model.live.version)
    await generator.close()
