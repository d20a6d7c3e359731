"""What is measured of each request, and by which formula.

In seconds, from the moment the request was to be sent (in a closed loop that is when it was sent; in an open loop when
it was planned, so that waiting for a stalled server or a busy client counts):
- TTFT: to the first token; time to first answer token: to the first token after the thoughts (`</think>`)
- end to end: to the last token
- inter-token latency of a request: (end to end - TTFT) / (tokens - 1), for two tokens and more; of answers that the
  test's end cut off too, or the slowest would be missing
"""

from __future__ import annotations

from dataclasses import dataclass

OK = "ok"
CUT = "cut"  # the test ended first


@dataclass(frozen=True)
class Sample:
    """One request. `start_s` and `end_s` are of the wall clock, so that those of several machines go together."""

    model: str
    start_s: float  # when it was planned, or in a closed loop sent
    end_s: float
    ttft_s: float | None  # None: no token came
    last_s: float | None  # to the last token that came
    tokens: int  # counted by the server, else by --tokenizer, else by the responses that came
    counted_by_server: bool
    outcome: str  # OK, CUT, or the error's class name
    answer_s: float | None = None  # to the first token after the thoughts; None: none came
    late_s: float = 0.0  # how long after its planned time the client sent it
    prompt_tokens: int | None = None  # as the server counted them
    recounted: int | None = None  # tokens of the answer's text, as --tokenizer cuts it

    @property
    def itl_s(self) -> float | None:
        if self.ttft_s is None or self.last_s is None or self.tokens < 2:
            return None
        return (self.last_s - self.ttft_s) / (self.tokens - 1)

    @property
    def e2e_s(self) -> float:
        return self.end_s - self.start_s
