"""One thread beside the caller: order, bound, errors, interruptions."""

import threading
import time

import pytest

from utils.background import Background


def test_all_is_done_in_order_by_another_thread():
    done, threads = [], set()
    with Background() as beside:
        for number in range(20):
            beside.do(
                lambda number=number: (done.append(number), threads.add(threading.get_ident()))
            )
    assert done == list(range(20))
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_the_caller_waits_when_the_thread_is_behind():
    """Frames of a whole video would be in memory if the encoder is slower than the network."""
    gate, given = threading.Event(), []

    def give():
        with Background(waiting=2) as beside:
            for number in range(6):
                beside.do(gate.wait)
                given.append(number)

    caller = threading.Thread(target=give)
    caller.start()
    caller.join(0.1)
    assert given == [0, 1, 2]  # one that is being done, two behind it
    gate.set()
    caller.join()
    assert len(given) == 6


@pytest.mark.parametrize("more", [0, 5], ids=["when it is left", "at the next piece"])
def test_an_error_reaches_the_caller_and_nothing_is_done_behind_it(more):
    done = []

    def give():
        with Background(waiting=1) as beside:
            beside.do(lambda: done.append("before"))
            beside.do(lambda: [].pop())
            for _ in range(more):
                beside.do(lambda: done.append("behind"))

    with pytest.raises(IndexError):
        give()
    assert done == ["before"]


def test_an_interruption_drops_what_waits_and_ends_what_is_being_done():
    begun, done = threading.Event(), []

    def slow():
        begun.set()
        time.sleep(0.05)
        done.append("slow")

    def give():
        with Background() as beside:
            beside.do(slow)
            beside.do(lambda: done.append("waited"))
            begun.wait()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        give()
    assert done == ["slow"]
