"""`stillhouse edge doctor | bench | pull | bundle`: looks after the device and its versions; nothing heavy here."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

log = logging.getLogger(__name__)

_AS_JSON = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
_ROOT = Annotated[
    Path | None,
    typer.Option(
        help="The folder that /proc, /sys and /etc lie in: to read a recorded board.",
        envvar="STILLHOUSE_EDGE_ROOT",
        show_default="/",
    ),
]
_REPOSITORY = Annotated[Path, typer.Option(help="The model repository on this device.")]


def doctor(root: _ROOT = None, as_json: _AS_JSON = False) -> None:
    """Tell what this device is and can do, and what to do where it cannot; fails where no model can run.

    Example: stillhouse edge doctor
    """
    from stillhouse.edge.device import Device
    from stillhouse.edge.doctor import examine, report

    device = Device(root)
    if as_json:
        found = report(device)
        print(json.dumps(found, indent=2, ensure_ascii=False))
        usable = bool(found["providers"])
    else:
        from stillhouse.edge.tables import print_checks

        checks = examine(device)
        print_checks(checks)
        usable = any(check.name.endswith("ExecutionProvider") and check.state == "ok" for check in checks)
    if not usable:
        raise typer.Exit(1)


def bench(
    directory: Annotated[Path, typer.Argument(help="A version directory: model_repository/NAME-PRECISION/VERSION.")],
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 128,
    output_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 64,
    grid: Annotated[
        bool, typer.Option("--grid", help="Prompts of 128 to 2,048 × answers of 64 to 256 tokens, 20 requests each.")
    ] = False,
    repeats: Annotated[int | None, typer.Option(min=1, help="Requests of each shape.", show_default="5")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="ONNX Runtime's threads; one a core by default.")] = None,
    provider: Annotated[str | None, typer.Option(help="cpu, cuda, tensorrt or auto.", show_default="auto")] = None,
    root: _ROOT = None,
    as_json: _AS_JSON = False,
) -> None:
    """Measure a version on this device, one request at a time: speed, latency, memory, and a Jetson's power and heat.

    Example: stillhouse edge bench model_repository/support-int4/1 --grid --json > orin-nano-25w.json
    """
    from stillhouse.edge.runtime import require_onnxruntime

    require_onnxruntime()
    from stillhouse.edge import benching
    from stillhouse.edge.device import Device
    from stillhouse.edge.loading import ONE_ANSWER, load

    prompts, outputs = (
        (benching.GRID_PROMPT_TOKENS, benching.GRID_OUTPUT_TOKENS) if grid else ([prompt_tokens], [output_tokens])
    )
    shapes = list(benching.shapes_of(prompts, outputs))
    longest = max(shape.prompt_tokens + shape.output_tokens for shape in shapes)
    # A prompt found in the cache would not be measured.
    options = {**ONE_ANSWER, "prefix_slots": 0, "max_model_len": longest + 1, "threads": threads, "provider": provider}
    with load(directory, options) as model:
        count = repeats or (benching.GRID_REPEATS if grid else 5)
        report = benching.bench(model, shapes, count, Device(root), _tell)
    if as_json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        from stillhouse.edge.tables import print_bench

        print_bench(report)


def pull(
    url: Annotated[str, typer.Argument(help="…/MODEL: the version that is live there; …/MODEL/VERSION: that one.")],
    repository: _REPOSITORY = Path("model_repository"),
    prune: Annotated[bool, typer.Option("--prune", help="Keep the live version and the one before alone.")] = False,
) -> None:
    """Fetch a newer version from any static HTTP server (or a folder), try it, and make it the live one.

    An interrupted pull goes on where it stopped. What does not match its sha256 or does not answer is not taken: what
    was live stays live. A running 'stillhouse edge serve MODEL' switches by itself.

    Example: stillhouse edge pull http://192.168.1.10:8080/support-int4
    """
    from stillhouse.edge.pulling import pull as run

    pulled = run(url, repository, tell=_tell, progress=_progress(), prune=prune)
    before = f", before it was {pulled.previous}" if pulled.previous is not None else ""
    if pulled.new:
        typer.echo(f"{pulled.model}/{pulled.version} is live{before}")
    elif pulled.offered < pulled.version:
        typer.echo(f"{pulled.model}/{pulled.version} stays live: {url} offers {pulled.offered}, which is older")
    else:
        typer.echo(f"{pulled.model}/{pulled.version} is live already{before}")


def bundle(
    directory: Annotated[Path, typer.Argument(help="A version directory: model_repository/NAME-PRECISION/VERSION.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The tar to write.")],
    python: Annotated[
        str, typer.Option(help="The device's Python: 3.10 (JetPack 6), 3.12 (JetPack 7), 3.11.")
    ] = "3.10",
    machine: Annotated[str, typer.Option(help="The device's machine: aarch64 or x86_64.")] = "aarch64",
    runtime: Annotated[
        bool, typer.Option("--runtime/--no-runtime", help="Bring ONNX Runtime for the CPU, or use the device's own.")
    ] = True,
    wheel: Annotated[list[Path] | None, typer.Option(help="One more wheel to install; may be repeated.")] = None,
    constraints: Annotated[
        Path | None,
        typer.Option(
            help="Versions for pip in place of those that were tested, name==version a line; empty: the newest.",
            show_default="none",
        ),
    ] = None,
) -> None:
    """Put a version, all wheels and an install script into one tar, for a device without a network.

    For a Jetson's GPU: --no-runtime --wheel onnxruntime_gpu-….whl, from JetPack's own index.

    Example: stillhouse edge bundle model_repository/support-int4/1 -o support-int4.tar --python 3.10
    """
    from stillhouse.edge.bundling import bundle as run
    from stillhouse.edge.wheels import Target

    target = Target(python, machine)
    size = run(
        directory, output, target, runtime=runtime, further_wheels=wheel or (), constraints=constraints, tell=_tell
    )
    typer.echo(f"{output}: {size / 1e6:.0f} MB; on the device: tar xf {output.name} && sudo ./*/install.sh")


def _tell(line: str) -> None:
    log.info("%s", line)


def _silent(name: str, have: int, size: int) -> None:
    """Nobody looks."""


def _progress() -> Callable[[str, int, int], None]:
    """Shows how far a file has come, where somebody looks."""
    if not sys.stderr.isatty() or os.environ.get("STILLHOUSE_QUIET"):
        return _silent

    def show(name: str, have: int, size: int) -> None:
        sys.stderr.write(f"\r{name} {100 * have // max(1, size)} %" + ("\n" if have >= size else ""))
        sys.stderr.flush()

    return show
