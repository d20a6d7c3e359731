"""Whether a version loads and answers: asked before it is given to anybody.

`python -m stillhouse.edge.smoke DIR` asks in a process of its own, so that whatever a version does when it is loaded,
a crash or all of the memory, happens to nobody else.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from stillhouse.edge.memory import TooLittleMemory
from stillhouse.engine.errors import StillhouseError, VersionError

_CONTEXT_TOKENS = 256
_ANSWER_TOKENS = 4
_TIMEOUT_S = 600.0
_TOO_LITTLE_MEMORY = 3  # this process's exit status
# What a terminal's Ctrl-C and the end of a systemd unit send to every process of theirs, this one among them.
_ENDED_FROM_OUTSIDE = (-signal.SIGINT, -signal.SIGTERM, -signal.SIGHUP)


class Interrupted(StillhouseError):
    """The version was not heard to its end: nothing is known of it."""


def check_answers(directory: Path, timeout_s: float = _TIMEOUT_S) -> None:
    """Raises VersionError, with the reason in a line, for a version that does not load and answer.

    Raises Interrupted where somebody ended the process that asked, TooLittleMemory where it found no room to ask.
    """
    command = [sys.executable, "-m", __name__, str(directory)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=timeout_s,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise VersionError(f"{directory} did not answer within {timeout_s:g} s") from None
    if done.returncode in _ENDED_FROM_OUTSIDE:
        raise Interrupted(f"{directory} was not heard: whoever asked it was ended")
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no word"])[-1]
        if done.returncode == _TOO_LITTLE_MEMORY:
            raise TooLittleMemory(said)
        how = f"killed by signal {-done.returncode}" if done.returncode < 0 else said
        raise VersionError(f"{directory} does not answer: {how}")


def ask(directory: Path) -> None:
    """Loads the version and has it say a few tokens. Raises StillhouseError."""
    from stillhouse.edge.loading import ONE_ANSWER, load
    from stillhouse.engine.directory import open_version
    from stillhouse.engine.sampling import SamplingParams

    # As little memory as can be: another version may be serving beside it.
    context = min(_CONTEXT_TOKENS, open_version(directory, verify=False).manifest.network.context_length)
    with load(directory, {**ONE_ANSWER, "max_model_len": context, "prefix_slots": 0}) as model:
        prompt_ids = model.prompt_ids(text="The quick brown fox")
        answer = model.generate(prompt_ids, SamplingParams(max_tokens=_ANSWER_TOKENS, temperature=0.0))
    if not answer.token_ids:
        raise VersionError(f"{directory} answers with nothing")


def main() -> None:
    try:
        ask(Path(sys.argv[1]))
    except StillhouseError as error:
        print(error, file=sys.stderr)
        sys.exit(_TOO_LITTLE_MEMORY if isinstance(error, TooLittleMemory) else 1)


if __name__ == "__main__":
    main()
