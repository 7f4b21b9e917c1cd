import os
import signal
import subprocess
import sys
import threading

import pytest

from domainbed import interruption


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_is_a_request(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with interruption.listen():
        interruption.check()
        assert not interruption.requested()
        os.kill(os.getpid(), number)
        assert interruption.requested()
        with pytest.raises(interruption.Preempted, match=number.name):
            interruption.check()
        os.kill(os.getpid(), number)  # again changes nothing
    assert signal.getsignal(number) == before
    with interruption.listen():
        assert not interruption.requested()


def test_what_takes_long_is_left_at_once() -> None:
    done = []

    def work() -> None:
        with interruption.at_once():
            done.append(1)
            os.kill(os.getpid(), signal.SIGTERM)
            done.append(2)

    with interruption.listen():
        with pytest.raises(interruption.Preempted, match="SIGTERM"):
            work()
        os.kill(os.getpid(), signal.SIGTERM)  # outside it only counts
        done.append(3)
    assert done == [1, 3]


def test_what_takes_long_is_not_even_begun_after_a_request() -> None:
    with interruption.listen():
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(interruption.Preempted), interruption.at_once():
            pytest.fail("begun")


def test_other_threads_cannot_listen_and_are_not_hindered() -> None:
    handler, done = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with interruption.listen():
            done.append(signal.getsignal(signal.SIGTERM) == handler)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]


def test_a_process_whose_parent_ignored_the_signals_hears_them() -> None:
    code = "import os; from domainbed import interruption as i\n"
    code += "with i.listen(): os.kill(os.getpid(), 15); print(i.requested())"
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # survives exec
    try:
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert run.stdout == "True\n"
