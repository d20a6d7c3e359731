"""The model as Triton's Python backend drives it: loaded, asked, ended, in the model's own process.

A request's way: execute() reads its tensors and hands it to a door thread (template, tokenizing), which submits it to
the engine; the engine's thread puts the answers into the outbox, whose thread sends them. Nothing waits in between, so
a model's requests run together.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from stillhouse.engine.errors import InvalidRequest, StillhouseError
from stillhouse.engine.model import LanguageModel
from stillhouse.engine.options import read_options
from stillhouse.engine.sampling import SamplingParams
from stillhouse.serve.answering import FINAL, Answering, Outbox, send_error
from stillhouse.serve.door import Door
from stillhouse.serve.ending import Ending
from stillhouse.serve.errors import one_line
from stillhouse.serve.metrics import Metrics
from stillhouse.serve.protocol import DRAIN_VARIABLE, LOAD_ERROR_MARK, OPTIONS_VARIABLE
from stillhouse.serve.tensors import TensorReader, read_question
from stillhouse.serve.under_way import CountedSender, UnderWay
from stillhouse.serve.watch import Watcher, end_with_server

log = logging.getLogger(__name__)

# How long the engine's thread waits for Python's lock while others send and read; the usual 5 ms are a part of a step.
_SWITCH_S = 0.0005
_CLOSE_TIMEOUT_S = 5.0
_WARM_TIMEOUT_S = 60.0


class ServedVersion:
    """One version of a model, for the life of its process."""

    def __init__(self, args: dict[str, str]) -> None:
        """Opens the version: hashes its files, loads it, has it answer once. `args` are those of initialize().

        Raises TritonModelException, after a line in the log for the launcher.
        """
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        end_with_server()
        sys.setswitchinterval(_SWITCH_S)
        name, version = args["model_name"], args["model_version"]
        try:
            self._model = _load(Path(args["model_repository"]), version)
            _warm(self._model)
        except StillhouseError as error:
            _report_load_error(name, version, error)
            raise pb_utils.TritonModelException(one_line(error)) from error
        self._door = Door(self._model.engine)
        self._outbox = Outbox()
        drain_file = os.environ.get(DRAIN_VARIABLE)
        self._ending = Ending(Path(drain_file) if drain_file else None)
        self._under_way = UnderWay(Path(drain_file).parent if drain_file else None)
        self._watcher = Watcher(lambda: self._model.failed, self._ending)
        self._metrics = Metrics(pb_utils, name, version, self._door.stats)

    def execute(self, requests: list[Any]) -> None:
        """Takes the requests in and returns at once; every answer goes through its response sender."""
        for request in requests:
            sender = CountedSender(request.get_response_sender(), self._under_way, FINAL)
            try:
                self._read(request, sender)
            except StillhouseError as error:
                self._refuse(sender, error)
            except Exception as error:  # the boundary: a client must never wait for an answer that cannot come
                log.exception("a request could not be read")
                self._refuse(sender, StillhouseError(f"{type(error).__name__}: {error}"))

    def close(self) -> None:
        """Ends the engine; what still runs ends as cancelled."""
        self._door.close()
        self._model.close(timeout_s=_CLOSE_TIMEOUT_S)
        self._outbox.close()
        self._watcher.close()
        self._metrics.close()
        self._under_way.close()
        gc.collect()

    def _refuse(self, sender: Any, error: StillhouseError) -> None:
        self._metrics.count_error(error)
        send_error(sender, error)

    def _read(self, request: Any, sender: Any) -> None:
        # What cannot be taken in costs nothing more than the refusal.
        if (refusal := self._ending.refusal) is not None:
            raise refusal
        self._door.check_room()
        # Nothing keeps `request`: it is Triton's again when execute() returns.
        question = read_question(_tensor_reader(request), _parameters_json(request), request.timeout())
        self._door.take(Answering(question, sender, self._model, self._outbox, self._watcher, self._metrics))


def _load(model_directory: Path, version: str) -> LanguageModel:
    overrides = json.loads(os.environ.get(OPTIONS_VARIABLE) or "{}")
    options = read_options(model_directory, overrides)
    return LanguageModel.load(model_directory / version, options)


def _warm(model: LanguageModel) -> None:
    """A prompt and two tokens: what cannot answer must not count as loaded, for the version before makes way for it."""
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    try:
        model.generate(model.prompt_ids(text="Hello, world"), params, timeout_s=_WARM_TIMEOUT_S)
    except StillhouseError:
        model.close(_CLOSE_TIMEOUT_S)
        raise


def _tensor_reader(request: Any) -> TensorReader:
    def read(name: str) -> Any:
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        return None if tensor is None else tensor.as_numpy()

    return read


def _parameters_json(request: Any) -> str:
    try:
        return str(request.parameters())
    except UnicodeDecodeError as error:
        raise InvalidRequest("request parameters must be UTF-8") from error


def _report_load_error(model: str, version: str, error: StillhouseError) -> None:
    report = {"model": model, "version": int(version), "message": str(error), "hint": error.hint}
    # One write, so that the line stays whole beside those of other processes.
    os.write(2, f"\n{LOAD_ERROR_MARK}{json.dumps(report)}\n".encode())
