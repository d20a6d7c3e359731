"""What is inside the door counts as waiting, and always comes out: begun, or with its error."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from stillhouse.engine.core import Stats
from stillhouse.engine.errors import EngineClosed, InvalidRequest, QueueFull, StillhouseError
from stillhouse.serve.door import Door


class Engine:
    """Has room for four beside the three that wait."""

    def stats(self) -> Stats:
        return Stats(0, 3, 0, 0, 0, 0)

    def check_room(self, coming: int = 0) -> None:
        if coming >= 4:
            raise QueueFull(f"{coming} requests are waiting, the queue holds 4")


class Asked:
    """A request of two answers whose prompt is being read until `go` is set."""

    num_answers = 2

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.go = threading.Event()
        self.failed: list[StillhouseError] = []

    def begin(self) -> None:
        assert self.go.wait(10)
        if self.error is not None:
            raise self.error

    def fail(self, error: StillhouseError) -> None:
        self.failed.append(error)


def made() -> tuple[Door, Callable[[Any], None]]:
    engine: Any = Engine()
    door = Door(engine)
    return door, door.take


def test_what_is_inside_takes_up_room_until_it_has_begun(wait_until: Callable[..., float]) -> None:
    door, take = made()
    inside = [Asked(), Asked()]
    door.check_room()
    for asked in inside:
        take(asked)
    assert door.stats().waiting == 4 + 3
    with pytest.raises(QueueFull, match="4 requests are waiting"):
        door.check_room()
    inside[0].go.set()

    def has_room() -> bool:
        try:
            door.check_room()
        except QueueFull:
            return False
        return True

    wait_until(has_room)
    inside[1].go.set()
    door.close()


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [(InvalidRequest("no such token"), InvalidRequest, "no such token"), (KeyError(3), StillhouseError, "KeyError: 3")],
)
def test_what_cannot_begin_fails_by_name_and_takes_up_no_room(
    error: Exception, kind: type[StillhouseError], words: str
) -> None:
    door, take = made()
    asked = [Asked(error), Asked(error)]
    for one in asked:
        one.go.set()
        take(one)
    door.close()
    door.check_room()
    for one in asked:
        assert [(type(said), str(said)) for said in one.failed] == [(kind, words)]


def test_a_door_that_is_closed_says_so() -> None:
    door, take = made()
    door.close()
    take(asked := Asked())
    assert [type(said) for said in asked.failed] == [EngineClosed]
    door.check_room()
