"""What a build needs, as reckoned before it begins."""

from __future__ import annotations

from pathlib import Path

from stillhouse.build.checkpoint import open_checkpoint
from stillhouse.build.quantize import METHODS
from stillhouse.build.reckon import Sizes, disk, memory

GIB = 2**30
HALF, INT8 = METHODS["fp16"][0], METHODS["int8"][0]
AUTO, K_QUANT = METHODS["int4"][0], METHODS["int4"][2]
ALL = ["merge", "fp32"]


def sizes_of(parameters: int, vocabulary: int, hidden: int, widest: int) -> Sizes:
    """Of a checkpoint in bfloat16."""
    return Sizes(4 * parameters, 4 * vocabulary * hidden, 2 * parameters, 4 * vocabulary, 4 * widest**2)


R1_1_5B = sizes_of(1_777_000_000, 151_936, 1536, 8960)
R1_7B = sizes_of(7_615_000_000, 152_064, 3584, 18_944)


def test_the_1_5b_is_reckoned_within_12_gib_and_the_7b_beyond_24() -> None:
    assert 10.3 * GIB < memory(R1_1_5B, ALL, [HALF, INT8, AUTO]) < 12 * GIB  # 10.3 were measured
    assert memory(R1_7B, ALL, [HALF, INT8, AUTO]) > 24 * GIB


def test_a_cached_merge_and_export_need_neither_memory_nor_disk() -> None:
    assert memory(R1_1_5B, [], [HALF]) < memory(R1_1_5B, ["fp32"], [HALF]) < memory(R1_1_5B, ALL, [HALF])
    saved = disk(R1_1_5B, ALL, [HALF], "cpu") - disk(R1_1_5B, [], [HALF], "cpu")
    assert saved == 2 * R1_1_5B.weights


def test_the_scratch_of_a_choice_and_of_cuda_counts_as_disk() -> None:
    assert disk(R1_1_5B, ALL, [AUTO], "cpu") > disk(R1_1_5B, ALL, [K_QUANT], "cpu") + 8 * 255 * R1_1_5B.logits
    assert disk(R1_1_5B, ALL, [INT8], "cuda") - disk(R1_1_5B, ALL, [INT8], "cpu") == R1_1_5B.weights // 2


def test_the_sizes_are_those_of_the_checkpoint(tiny_base: Path) -> None:
    base = open_checkpoint(str(tiny_base))
    sizes = Sizes.of(base)
    assert sizes.weights == 4 * base.parameters
    assert sizes.vocabulary == 4 * 1024 * 128
    assert sizes.files == (tiny_base / "model.safetensors").stat().st_size
