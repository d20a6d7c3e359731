"""Packing changes nothing: each text in a packed sequence gets the hidden states that it gets alone."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

SUPPORT = Path(__file__).resolve().parents[2] / "examples" / "support"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    monkeypatch.syspath_prepend(str(SUPPORT))
    return importlib.import_module("packing"), importlib.import_module("records")


def test_texts_in_one_sequence_see_nothing_of_each_other(base_dir: Path, scripts: tuple[Any, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    packing, records = scripts
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    lines = (SUPPORT / "records.jsonl").read_text(encoding="utf-8").splitlines()[:3]
    examples = [records.encode(tokenizer, json.loads(line)) for line in lines]
    text = tokenizer.encode("The kettle sang on the stove.", add_special_tokens=False)
    prefix = packing.shared_prefix(examples)
    assert prefix > 20  # the system prompt is shared

    with torch.no_grad():
        packed = packing.pack(examples, [text], prefix)
        together = packing.hidden_states(model, packed)
        for example, span in zip(examples, packed.spans[:-1], strict=True):
            whole = packing.hidden_states(model, packing.pack([example], [], prefix))
            ids = torch.tensor([example.prompt_ids + example.answer_ids])
            plain = model.model(input_ids=ids, use_cache=False).last_hidden_state[0]
            assert torch.allclose(whole, plain, atol=1e-3)
            assert torch.allclose(together[span], plain[prefix:], atol=1e-3)
        alone = model.model(input_ids=torch.tensor([text]), use_cache=False).last_hidden_state[0]
        assert torch.allclose(together[packed.spans[-1]], alone, atol=1e-3)


def test_the_loss_is_on_the_answers_and_their_end_alone(base_dir: Path, scripts: tuple[Any, Any]) -> None:
    from transformers import AutoTokenizer

    packing, records = scripts
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    lines = (SUPPORT / "records.jsonl").read_text(encoding="utf-8").splitlines()[:2]
    examples = [records.encode(tokenizer, json.loads(line)) for line in lines]
    packed = packing.pack(examples, [], packing.shared_prefix(examples))
    expected = "".join(json.loads(line)["output"] + "<|im_end|>" for line in lines)
    assert tokenizer.decode(packed.answer_ids) == expected
    first = [packed.input_ids[0, position + 1].item() for position in packed.answers_at]
    assert first == packed.answer_ids.tolist()
    start = packed.answers_at[0].item()
    assert tokenizer.decode(packed.input_ids[0, start - 2 : start + 1]) == "assistant\n"
