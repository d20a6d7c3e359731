"""Converts a checkpoint to OpenVINO's 4 bits, in the peer's own environment: python openvino_convert.py BASE OUT.

As OpenVINO's documents advise for small models without calibration data: asymmetric INT4 in groups that divide the
model's widths, with data-free AWQ; embedding and head stay INT8 (nncf's default). `--ratio` leaves the layers that
suffer most at INT8.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--ratio", type=float, default=1.0)
    parser.add_argument("--awq", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()

    import openvino as ov
    from openvino_tokenizers import convert_tokenizer
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
    from transformers import AutoTokenizer

    config = OVWeightQuantizationConfig(
        bits=4,
        sym=False,
        group_size=args.group_size,
        ratio=args.ratio,
        quant_method="awq" if args.awq else "default",
    )
    model = OVModelForCausalLM.from_pretrained(args.base, export=True, quantization_config=config, compile=False)
    model.save_pretrained(args.out)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    tokenizer.save_pretrained(args.out)
    for part, name in zip(
        convert_tokenizer(tokenizer, with_detokenizer=True), ("tokenizer", "detokenizer"), strict=True
    ):
        ov.save_model(part, args.out / f"openvino_{name}.xml")
    settings = {"group_size": args.group_size, "ratio": args.ratio, "awq": args.awq, "symmetric": False}
    (args.out / "conversion.json").write_text(json.dumps(settings) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
