"""generation_config.json: what a model's authors recommend for sampling, and which tokens end an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stillhouse.engine.errors import VersionError
from stillhouse.engine.sampling import SamplingParams, parse_params


def generation_config(directory: Path) -> dict[str, Any]:
    """The file in the version at `directory`; {} where there is none. Raises VersionError for one that is no JSON."""
    file = directory / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_bytes())
    except json.JSONDecodeError as error:
        raise VersionError(f"{file} is not JSON: {error}") from error
    return config if isinstance(config, dict) else {}


def default_params(generation: dict[str, Any]) -> SamplingParams:
    """Sampling defaults that the model's authors put into generation_config.json; greedy where they say so."""
    if generation.get("do_sample") is False:
        return SamplingParams(temperature=0.0)
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    return parse_params({name: generation[name] for name in names if generation.get(name) is not None})
