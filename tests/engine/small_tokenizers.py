"""Small tokenizers of every kind in use, made in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RustTokenizer

from stillhouse.engine.text import Tokenizer

CORPUS = ["the quick brown fox", "naïve café, 你好世界", "emoji 👩‍👩‍👧 🎉", "def f(x):\n    return x"] * 5
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PIECES = ["▁", "▁the", "▁a", "a", "e", "t", "h", "n", "é", "你", "▁👩", "\ufffd"]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


def as_stored(hexadecimal: str) -> str:
    """How a vocabulary of bytes writes some of them (GPT-2's table): printable ones as they are, others from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + at) for at, byte in enumerate(others)}
    return "".join(letters[byte] for byte in bytes.fromhex(hexadecimal))


def byte_level() -> RustTokenizer:
    """As in GPT-2, Llama 3, Qwen, SmolLM: every token is bytes."""
    tokenizer = RustTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def joins_line_breaks() -> RustTokenizer:
    """GPT-2's bytes cut as in Qwen2.5 and Llama 3: punctuation takes the line breaks behind it along, words the sign
    before them; of <think>'s tags `.</`, `>` with line breaks and `>{` are tokens."""
    tokenizer = RustTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    thoughts = ["<think>\nwell.</think>\n\n{", "<think>well\n</think>{", "<think></think>\n\n"] * 5
    tokenizer.train_from_iterator(CORPUS + thoughts, trainer)
    return tokenizer


def one_token_a_tag(*, special: bool = False) -> RustTokenizer:
    """As in Qwen3 (and, where they are special tokens, in some that were converted)."""
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=special) for tag in ("<think>", "</think>")])
    return tokenizer


def byte_fallback() -> RustTokenizer:
    """As in Llama 2 and Mistral: words with ▁, and <0xNN> for what the vocabulary lacks."""
    vocab = {"<s>": 0, "</s>": 1, "<unk>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for piece in PIECES:
        vocab[piece] = len(vocab)
    tokenizer = RustTokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def metaspace() -> RustTokenizer:
    """As in T5 and newer Llama 2 conversions: ▁ before words, one of them put before the text; no bytes."""
    tokenizer = RustTokenizer(models.Unigram([("<unk>", 0.0), *((piece, -2.0) for piece in PIECES)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def odd_tokens() -> RustTokenizer:
    """GPT-2's bytes with added tokens that eat the spaces around them, a vocabulary with holes, and one token of half
    a character and the half of another."""
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens(
        [
            AddedToken("<tool>", lstrip=True, rstrip=True, normalized=False),
            AddedToken("naïve", single_word=True),
            AddedToken("\ufffd", normalized=False),
            AddedToken(as_stored("9F 98 80 F0"), normalized=False),
        ]
    )
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    return tokenizer


# Those of models that think, given a chat template that has the tags.
THINKERS = [one_token_a_tag, byte_level, joins_line_breaks]


def written(rust: RustTokenizer, directory: Path) -> Tokenizer:
    rust.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    (directory / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    return Tokenizer(directory)
