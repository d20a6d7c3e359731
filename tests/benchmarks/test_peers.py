"""The peers' protocol, the prompts, and one real run against our own peer."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "peers")]

import protocol  # noqa: E402
import roster  # noqa: E402
from workload import Workload  # noqa: E402

IDS = list(range(10_000))


def test_a_steady_rate_counts_while_every_sequence_decodes() -> None:
    # The second sequence begins at 2 s, the first ends at 4 s: two tokens of each lie between.
    assert protocol.steady_rate([[1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0]]) == pytest.approx(4 / 2)


def test_a_steady_rate_of_sequences_that_never_meet_is_refused() -> None:
    with pytest.raises(ValueError, match="same time"):
        protocol.steady_rate([[1.0, 2.0], [3.0, 4.0]])


def test_the_same_seed_gives_the_same_prompts_and_another_seed_others() -> None:
    first, again, other = (Workload(IDS, seed).prompts(4, 0, "decode") for seed in (0, 0, 1))
    assert first == again != other
    assert all(64 <= len(prompt) <= 128 for prompt in first)


def test_no_prompt_comes_from_the_held_out_text() -> None:
    workload = Workload(IDS, 0, held_out_tokens=1024)
    assert [len(window) for window in workload.windows()] == [512, 512]
    assert workload.windows()[1][-1] == 1023
    assert min(min(prompt) for prompt in workload.prompts(50, "any")) >= 1024


def test_a_text_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="are needed"):
        Workload(IDS[:3000], 0)


def test_memory_is_read_from_the_system() -> None:
    held = protocol.memory()
    assert 0 < held["anonymous_bytes"] < held["peak_rss_bytes"]


def test_what_a_runtime_prints_does_not_get_into_the_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = small_peer(tmp_path, monkeypatch)
    with roster.PeerProcess(peer, tmp_path, timeout_s=30, threads=1, sequences=1, context_tokens=8) as process:
        assert process.about["settings"] == {"threads": 1}
        assert process.ask("decode", prompts=[[1, 2]], tokens=3)["tokens_per_s"] == 3.0
        assert process.ask("perplexity", windows=[[1, 2]]) == {"unsupported": "no logits"}


def test_an_error_and_a_death_of_a_peer_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = small_peer(tmp_path, monkeypatch)
    with roster.PeerProcess(peer, tmp_path, timeout_s=30, threads=1, sequences=1, context_tokens=8) as process:
        with pytest.raises(roster.PeerError, match="ttft: RuntimeError: not today"):
            process.ask("ttft", prompts=[[1]])
        with pytest.raises(roster.PeerError, match="died during prefill, exit status 3"):
            process.ask("prefill", prompt=[1])


def test_a_peer_without_its_environment_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster, "ENVIRONMENTS", tmp_path)
    assert "--setup llama.cpp" in (roster.known()["llama.cpp"].why_not(tmp_path) or "")
    assert roster.known()["stillhouse"].why_not(tmp_path) is None


def small_peer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> roster.PeerSpec:
    """A peer that answers by rote: its script lies in `folder`, the protocol is the real one."""
    (folder / "peers").mkdir()
    (folder / "peers/small.py").write_text(
        f"""
import os, sys
sys.path.insert(0, {str(BENCHMARKS / "peers")!r})
from protocol import serve

class Small:
    def load(self, model, *, threads, sequences, context_tokens):
        print("a banner")
        os.system("echo a banner of a child")
        return {{"settings": {{"threads": threads}}, "model_bytes": 1}}
    def decode(self, prompts, tokens):
        return float(len(prompts) * tokens)
    def ttft(self, prompts):
        raise RuntimeError("not today")
    def prefill(self, prompt):
        os._exit(3)
    def perplexity(self, windows):
        raise NotImplementedError("no logits")

serve(Small())
"""
    )
    monkeypatch.setattr(roster, "HERE", folder)
    return roster.PeerSpec("small", "small.py")


@pytest.mark.slow
def test_our_own_peer_answers_everything(support_repository: Path) -> None:
    version = support_repository / "support-int4/1"
    workload = Workload.of_manual(version / "tokenizer.json", seed=0, held_out_tokens=1024)
    peer = roster.known()["stillhouse"]
    with roster.PeerProcess(peer, version, timeout_s=240, threads=2, sequences=4, context_tokens=1024) as process:
        assert process.about["model_bytes"] > 50e6 and process.about["load_s"] < process.start_s
        assert process.ask("decode", prompts=workload.prompts(4, "decode"), tokens=8)["tokens_per_s"] > 0
        assert process.ask("prefill", prompt=workload.prompt(256))["tokens_per_s"] > 0
        times_s = process.ask("ttft", prompts=workload.prompts(4, "ttft"))["ttft_s"]
        assert len(times_s) == 4 and min(times_s) > 0
        assert process.ask("memory")["peak_rss_bytes"] > 100e6
        answer = process.ask("perplexity", windows=workload.windows()[:1])
        assert answer["tokens"] == 511 and 1 < answer["nll"] / 511 < 5
