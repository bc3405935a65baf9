"""Pieces side by side: all of them, in order, by no more workers than there are."""

import threading
import time

import pytest
import torch

from superpose.backends.threads import Backend
from superpose.maths.side_by_side import Crew, alone, side_by_side


def test_without_a_crew_the_caller_does_it_all():
    threads = side_by_side(lambda _: threading.get_ident(), range(5), most=4)
    assert set(threads) == {threading.get_ident()}
    assert side_by_side(lambda piece: piece**2, [3, 1, 2], most=4) == [9, 1, 4]
    assert side_by_side(lambda piece: piece, [], most=4) == []


def in_crew(workers, function):
    """Call a function as the only one of a crew at work."""
    crew = Crew(workers)
    try:
        with crew.at_work():
            return function()
    finally:
        crew.close()


def test_idle_workers_take_part_and_results_keep_their_order():
    both = threading.Barrier(2, timeout=20)

    def meet(piece):
        if piece < 2:
            both.wait()  # passes only if two work at the same time
        return piece, threading.get_ident(), torch.get_num_threads()

    found = in_crew(2, lambda: side_by_side(meet, range(6), most=4))
    assert [piece for piece, _, _ in found] == list(range(6))
    assert len({thread for _, thread, _ in found}) == 2
    assert {threads for _, thread, threads in found if thread != threading.get_ident()} == {1}


@pytest.mark.parametrize(("workers", "most", "expected"), [(1, 4, 1), (3, 4, 3), (8, 2, 2)])
def test_no_more_work_at_a_time_than_there_are_workers_or_is_planned_for(workers, most, expected):
    lock, now, highest = threading.Lock(), [0], [0]

    def count(_):
        with lock:
            now[0] += 1
            highest[0] = max(highest[0], now[0])
        time.sleep(0.02)
        with lock:
            now[0] -= 1

    in_crew(workers, lambda: side_by_side(count, range(12), most=most))
    assert highest[0] == expected


def test_helpers_are_idle_again_afterwards():
    crew = Crew(3)
    with crew.at_work():
        for _ in range(5):
            assert len(set(side_by_side(lambda _: (time.sleep(0.02), threading.get_ident())[1], range(6), most=3))) == 3
    crew.close()


def test_workers_at_work_do_not_help():
    crew = Crew(2)
    with crew.at_work():
        done = []

        def other():
            with crew.at_work():
                done.append(set(side_by_side(lambda _: threading.get_ident(), range(4), most=4)))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    crew.close()
    assert len(done[0]) == 1


@pytest.mark.parametrize("failing", [0, 3])
def test_error_of_a_piece_comes_out(failing):
    def fail(piece):
        time.sleep(0.01)
        if piece == failing:
            raise ValueError(f"piece {piece}")

    with pytest.raises(ValueError, match=f"piece {failing}"):
        in_crew(2, lambda: side_by_side(fail, range(5), most=2))


def test_nothing_is_given_away_alone():
    def work():
        with alone():
            return side_by_side(lambda _: threading.get_ident(), range(4), most=4)

    assert set(in_crew(3, work)) == {threading.get_ident()}


def test_backend_lets_idle_threads_help():
    """One item and two workers: the second works on pieces of it."""
    both = threading.Barrier(2, timeout=20)
    backend = Backend(2, 10**9)
    results = list(backend.map(lambda _: side_by_side(lambda _: both.wait(), range(2), most=2), ["item"], [1]))
    assert len(results) == 1


def test_nobody_begins_another_piece_after_one_has_failed():
    begun = []

    def fail(piece):
        begun.append(piece)
        time.sleep(0.05)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        in_crew(2, lambda: side_by_side(fail, range(40), most=2))
    assert len(begun) <= 2


def test_helper_goes_back_when_it_is_crowded():
    """Three workers, two of which get work of their own while they help: no more than three compute in the end."""
    crew, lock, now = Crew(3), threading.Lock(), [0]
    highest, started = [0], threading.Event()

    def count(_):
        with lock:
            now[0] += 1
            highest[0] = max(highest[0], now[0]) if started.is_set() else 0
        time.sleep(0.02)
        with lock:
            now[0] -= 1

    def own_work():
        with crew.at_work():
            time.sleep(0.1)  # those who help see it after the piece in hand
            started.set()
            with lock:
                now[0] += 1
            time.sleep(0.3)
            with lock:
                now[0] -= 1

    with crew.at_work():
        others = [threading.Thread(target=own_work) for _ in range(2)]
        timer = threading.Timer(0.05, lambda: [thread.start() for thread in others])
        timer.start()
        side_by_side(count, range(25), most=3)
        timer.join()
        for thread in others:
            thread.join()
    crew.close()
    assert 0 < highest[0] <= 3
