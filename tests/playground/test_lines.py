"""One run at a time, in order, each person's bounded; and runs that are watched and stopped."""

from __future__ import annotations

import threading
from threading import Event

import pytest

from fs_plugins import SettingError
from fs_plugins.playground.line import Line
from fs_plugins.playground.live import Stopped, live


def test_the_first_is_served_and_the_others_are_told_their_place():
    line, go = Line(), Event()
    told: list[int] = []

    def second() -> None:
        with line.place("second") as place:
            told.extend(place.waiting(go))

    with line.place("first") as place:
        assert list(place.waiting(go)) == []
        waiting = threading.Thread(target=second)
        waiting.start()
        while not told:
            pass
        assert told == [1]
    waiting.join(10)
    assert told == [1]
    assert len(line) == 0


def test_nobody_has_more_places_than_others_get_to():
    line = Line(most=3, each=2)
    with line.place("a"), line.place("a"):
        with pytest.raises(SettingError, match="limit"), line.place("a"):
            pass
        with line.place("b"), pytest.raises(SettingError, match="Try again"), line.place("c"):
            pass
        with line.place("c"):
            assert len(line) == 3
    assert len(line) == 0


def test_who_stops_while_waiting_leaves_the_line():
    line, stop = Line(), Event()
    with line.place("first"):
        with pytest.raises(Stopped), line.place("second") as place:  # noqa: PT012
            for ahead in place.waiting(stop):
                assert ahead == 1
                stop.set()
        assert len(line) == 1


def test_work_tells_and_returns():
    def work(tell):
        for i in range(3):
            tell(i)
        return "done"

    found: list[int] = []

    def watch():
        result = yield from live(work, Event())
        assert result == "done"

    found += watch()
    assert found == sorted(found)
    assert found[-1] == 2


def test_an_error_in_the_work_is_the_callers():
    def work(tell):
        tell(1)
        raise SettingError("wrong")

    with pytest.raises(SettingError, match="wrong"):
        list(live(work, Event()))


@pytest.mark.parametrize("way", ["stop", "close"])
def test_work_that_is_stopped_ends(way):
    stop, ended = Event(), Event()

    def work(tell):
        try:
            while True:
                tell(1)
        finally:
            ended.set()

    running = live(work, stop)
    next(running)
    if way == "close":
        running.close()
    else:
        stop.set()
        with pytest.raises(Stopped):
            list(running)
    assert ended.is_set()
