"""The gateway before the real engine: the example's INT4 version, and the same with a template that opens <think>."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from stillhouse.edge.serving import open_engines
from stillhouse.engine.model import LanguageModel
from stillhouse.engine.options import EngineOptions
from stillhouse.gateway.gateway import Access
from stillhouse.gateway.server import GatewayServer

MODEL, THINKER = "support-int4", "thinker-int4"
# Without reuse of prompts: each test pays for its own prefill.
OPTIONS = EngineOptions(max_num_seqs=8, max_model_len=512, prefix_slots=0)


@pytest.fixture(scope="session")
def version_dir(support_repository: Path) -> Path:
    return support_repository / MODEL / "1"


@pytest.fixture(scope="session")
def thinker_dir(version_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy whose chat template ends with an open tag, as those of R1-Distill models do."""
    copy = tmp_path_factory.mktemp("thinker") / THINKER / "1"
    copy.mkdir(parents=True)
    for file in version_dir.iterdir():
        (copy / file.name).symlink_to(file)
    template = (version_dir / "chat_template.jinja").read_text("utf-8")
    opened = template.rstrip() + "{% if add_generation_prompt %}<think>\n{% endif %}{# ends with </think> #}"
    generation = json.loads((version_dir / "generation_config.json").read_text("utf-8"))
    changed = {"chat_template.jinja": opened, "generation_config.json": json.dumps(generation | {"do_sample": False})}
    manifest = json.loads((version_dir / "manifest.json").read_text("utf-8")) | {"model": THINKER}
    for record in manifest["files"]:
        if record["path"] in changed:
            data = changed[record["path"]].encode()
            record |= {"bytes": len(data), "sha256": _sha256(data)}
    for name, text in {**changed, "manifest.json": json.dumps(manifest)}.items():
        (copy / name).unlink()
        (copy / name).write_text(text, "utf-8")
    return copy


def _sha256(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="session")
def server(version_dir: Path, thinker_dir: Path) -> Iterator[GatewayServer]:
    """A gateway with both models, without keys."""
    with_both = [(version_dir, OPTIONS), (thinker_dir, OPTIONS)]
    yield from _running(GatewayServer("127.0.0.1", 0), with_both)


@pytest.fixture(scope="session")
def narrow_server(version_dir: Path) -> Iterator[GatewayServer]:
    """A gateway with keys, whose model decodes one sequence at a time while two wait."""
    options = EngineOptions(max_num_seqs=1, max_model_len=512, max_waiting=2, prefix_slots=0)
    yield from _running(GatewayServer("127.0.0.1", 0, Access(("sesame",))), [(version_dir, options)])


def _running(server: GatewayServer, versions: list[tuple[Path, EngineOptions]]) -> Iterator[GatewayServer]:
    server.start()
    try:
        server.plug(lambda: open_engines(versions))
        yield server
    finally:
        server.drain(0.0)


@pytest.fixture(scope="session")
def engine(version_dir: Path) -> Iterator[LanguageModel]:
    """The engine itself, to compare with."""
    with LanguageModel.load(version_dir, OPTIONS, verify=False) as model:
        yield model


@pytest.fixture(scope="session")
def client(server: GatewayServer) -> Iterator[openai.OpenAI]:
    """OpenAI's own client."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="session")
def http(server: GatewayServer) -> Iterator[httpx.Client]:
    """Plain HTTP to the gateway."""
    with httpx.Client(base_url=server.url, timeout=60) as made:
        yield made
