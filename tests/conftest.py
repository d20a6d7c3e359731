"""What the tests of several rooms share: the real base model, the example built once, and a tiny model."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from filelock import FileLock

# A shell without job control has what it puts in the background ignore Ctrl-C, and so would all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
# Ignored by git, and kept between runs: what was built with the same inputs is not built again.
KEPT = ROOT / ".pytest_cache" / "stillhouse"


# In CI a skip of one of these is a failure: what they need is to be there.
NEVER_SKIPPED = ("triton", "aarch64", "browser", "genai")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turns the skip of a test that CI must run into a failure."""
    report = yield
    if report.skipped and os.environ.get("CI") and any(item.get_closest_marker(name) for name in NEVER_SKIPPED):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, but in CI it must run: {report.longrepr}"
    return report


def one_at_a_time() -> FileLock:
    """What several processes of tests share is made by one of them (`pytest -n`)."""
    KEPT.mkdir(parents=True, exist_ok=True)
    return FileLock(KEPT / "making.lock")


def load_script(path: Path) -> ModuleType:
    """A script outside the packages, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.hookimpl(trylast=True)  # once those that do not run are gone
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whichever test asks for the example first waits until it is built: of two processes, one has others meanwhile.

    With `-n 2` each begins with a half of the list, in order: the second half begins with the files that need it.
    """
    asking = [item for item in items if "support_repository" in getattr(item, "fixturenames", ())]
    for item in asking:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(1800))
    files = {item.path for item in asking}
    others = [item for item in items if item.path not in files]
    half = len(items) // 2
    items[:] = [*others[:half], *(item for item in items if item.path in files), *others[half:]]


@pytest.fixture
def http_answers() -> Iterator[Callable[..., str]]:
    """Starts servers that answer every request with the same bytes, each at the URL that is given back.

    `hold`: then neither another byte nor the end comes.
    """
    over, servers = threading.Event(), list[socketserver.ThreadingTCPServer]()

    def start(answer: bytes, *, hold: bool = False) -> str:
        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                length = 0
                for line in iter(self.rfile.readline, b"\r\n"):
                    name, _, value = line.partition(b":")
                    length = int(value) if name.lower() == b"content-length" else length
                self.rfile.read(length)
                self.wfile.write(answer)
                if hold:
                    over.wait(30)

        server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    over.set()
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout's root."""
    return ROOT


@pytest.fixture(scope="session")
def script() -> Callable[[str], ModuleType]:
    """A script of benchmarks/ as a module, by its name."""
    return lambda name: load_script(ROOT / "benchmarks" / f"{name}.py")


@pytest.fixture
def wait_until() -> Callable[..., float]:
    """Waits until a condition holds and returns the seconds that it took; fails after `timeout_s`."""

    def wait(holds: Callable[[], object], timeout_s: float = 15.0) -> float:
        begun = time.monotonic()
        while not holds():
            assert time.monotonic() - begun < timeout_s, "it did not come to hold in time"
            time.sleep(0.005)
        return time.monotonic() - begun

    return wait


@pytest.fixture(scope="session")
def base_dir() -> Path:
    """The real SmolLM2-135M-Instruct as a plain checkpoint folder; the one that the example's recipe names."""
    with one_at_a_time():
        folder: Path = load_script(ROOT / "examples" / "smollm2" / "prepare.py").prepare_base()
    return folder


@pytest.fixture(scope="session")
def kept_cache() -> Iterator[Path]:
    """A stage cache that later test runs find again; builds use it while a fixture or test asks for it."""
    before = os.environ.get("XDG_CACHE_HOME")
    folder = KEPT / "cache"
    os.environ["XDG_CACHE_HOME"] = str(folder)
    yield folder
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="session")
def support_repository(base_dir: Path, kept_cache: Path) -> Path:
    """A repository with support-fp16, support-int8 and support-int4, version 1: really built, at most once.

    `make demo`'s is taken where it has version 1 of the same inputs; elsewhere INT4 is rounded by a quick method, and
    measured on a part of the text: what the recipe's own gives is for tests/build to show. Tests copy what they change.
    """
    assert base_dir.is_dir()
    assert kept_cache.parent == KEPT
    with one_at_a_time():
        return _build_support()


def _build_support() -> Path:
    from stillhouse.build import pipeline, texts
    from stillhouse.build.cache import key_of
    from stillhouse.build.plan import plan
    from stillhouse.build.recipe import Gate, QuantizeOptions, load_recipe

    recipe = load_recipe(ROOT / "examples" / "support" / "recipe.toml")
    demo = plan(recipe, ROOT / "model_repository")
    if all(version.existing and version.existing.manifest.version == 1 for version in demo.versions):
        return demo.repository
    quick = {"quantize": {"int4": QuantizeOptions(method="k_quant")}, "gate": {"int4": Gate(perplexity_ratio=1.5)}}
    recipe = recipe.model_copy(update=quick)
    versions = plan(recipe, ROOT / "model_repository").versions
    repository = KEPT / f"support-{key_of({'inputs': [version.inputs_sha256 for version in versions]})[:16]}"
    if any(version.existing is None for version in plan(recipe, repository).versions):
        for older in KEPT.glob("support-*"):
            shutil.rmtree(older)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(texts, "LEAST_TOKENS", 1_000)  # of 8,000: measuring takes most of a build's time
            failed = [result for result in pipeline.build(recipe, repository).results if result.status == "failed"]
        assert not failed, failed
    return repository


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with a real tokenizer of 1,024 tokens: for tests that need no sense in answers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "base"
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_tokenizer():  # type: ignore[no-untyped-def]
    """A byte-level BPE of 1,024 tokens, learnt in a second from the prose that Python carries, with a chat template."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((topics[key] for key in sorted(topics)), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer
