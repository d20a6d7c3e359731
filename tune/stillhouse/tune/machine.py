"""What there is to train on, and what of the recipe it can do."""

from __future__ import annotations

import importlib.util
import logging
import os
from dataclasses import dataclass

from stillhouse.engine.errors import StillhouseError, UsageError
from stillhouse.tune.settings import TuneOptions

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a run takes place: `precision` is that of the arithmetic, "no" for plain FP32."""

    cuda: bool
    precision: str
    processes: int
    rank: int
    local_rank: int


def machine_for(options: TuneOptions) -> Machine:
    """The machine as the recipe wants it used. Raises StillhouseError, by name, for what it cannot do."""
    import torch

    available = torch.cuda.is_available()
    if options.device == "cuda" and not available:
        raise StillhouseError('device = "cuda", but torch sees no GPU', hint='device = "auto" takes what is there')
    cuda = available and options.device != "cpu"
    if options.qlora and not cuda:
        raise UsageError(
            "qlora needs a GPU (4-bit kernels), and there is none", hint="leave qlora out: plain LoRA works here"
        )
    if options.qlora and importlib.util.find_spec("bitsandbytes") is None:
        raise StillhouseError("qlora needs bitsandbytes, which is not installed", hint="pip install bitsandbytes")
    if options.mixed_precision == "fp16" and not cuda:
        raise UsageError("mixed_precision fp16 needs a GPU, and there is none", hint='say "auto", "bf16" or "no"')
    precision = options.mixed_precision
    if precision == "auto":
        precision = "no" if not cuda else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if cuda and processes == 1 and torch.cuda.device_count() > 1:
        log.info(
            "one of %d GPUs is used; all: accelerate launch --num_processes %d -m stillhouse.cli.main tune …",
            torch.cuda.device_count(),
            torch.cuda.device_count(),
        )
    return Machine(cuda, precision, processes, int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0")))
