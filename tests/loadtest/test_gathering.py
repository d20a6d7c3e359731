"""Numbers and one zero for all users of a test."""

from __future__ import annotations

import subprocess
import sys
import textwrap


def test_nobody_gets_the_zero_before_the_last_has_come() -> None:
    run_with_gevent(
        """
        gathering.restart(3, 0.5, lambda: ended.append(1))
        come(); come()
        assert answers == []
        before = time.time()
        come()
        assert [number for number, _, _ in answers] == [0, 1, 2]
        ((shares, zero_s),) = {answer[1:] for answer in answers}
        assert shares == 3 and before + 0.5 <= zero_s <= time.time() + 0.5
        come()
        assert answers[3] == (3, 3, zero_s), "who comes later has no share"
        """
    )


def test_a_closed_loop_waits_for_nobody() -> None:
    run_with_gevent(
        """
        gathering.restart(0, 0.0, lambda: ended.append(1))
        come()
        assert len(answers) == 1
        """
    )


def test_dispatchers_that_never_come_are_not_waited_for_forever() -> None:
    run_with_gevent(
        """
        module.GATHER_S = 0.05
        gathering.restart(2, 0.0, lambda: ended.append(1))
        come()
        gevent.sleep(0.2)
        assert [answer[:2] for answer in answers] == [(0, 1)], "the plan is whole, though one has it alone"
        gathering.restart(2, 0.0, lambda: ended.append(1))
        come()
        gathering.restart(2, 0.0, lambda: ended.append(1))
        gevent.sleep(0.2)
        assert len(answers) == 1, "who waited in a test that is over gets no answer of the next"
        """
    )


def test_a_test_ends_when_all_plans_are_at_their_end() -> None:
    run_with_gevent(
        """
        gathering.restart(2, 0.0, lambda: ended.append(1))
        come(); come()
        gathering.come_to_end()
        assert not ended
        gathering.come_to_end()
        assert ended == [1]
        """
    )


def test_a_plan_that_outlasts_the_patience_ends_by_itself() -> None:
    run_with_gevent(
        """
        module.GATHER_S = 0.05
        gathering.restart(2, 0.0, lambda: ended.append(1))
        come(); come()
        gevent.sleep(0.2)
        gathering.come_to_end(); gathering.come_to_end()
        assert ended == [1]
        come()
        assert answers[2] == (2, *answers[0][1:]), "shares and zero are the same for who comes later"
        """
    )


def run_with_gevent(body: str) -> None:
    """In a process of its own: gevent's hub stays out of pytest's."""
    head = """
    import time, gevent
    from stillhouse.loadtest import gathering as module
    gathering, answers, ended = module.Gathering(), [], []
    def come(): gathering.come(lambda *answer: answers.append(answer))
    """
    script = textwrap.dedent(head) + textwrap.dedent(body)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
