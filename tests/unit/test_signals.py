"""Signals that ask for a save: counted while the watch is open, and the handler of before is back after it."""

import os
import signal
import threading

import pytest

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.plan.save_rules import OnSignal
from rl_ckpt.plan.when import SavePolicy
from rl_ckpt.signals import SignalWatch


def test_a_signal_makes_a_save_due_and_reaches_who_listened_before():
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        mine = signal.getsignal(signal.SIGUSR1)
        with SignalWatch() as asked:
            policy = SavePolicy(OnSignal(asked.count))
            assert policy.due(1) is None
            os.kill(os.getpid(), signal.SIGUSR1)
            due = policy.due(1)
            assert due is not None
            policy.began(due)
            assert policy.due(1) is None
        assert signal.getsignal(signal.SIGUSR1) is mine
        os.kill(os.getpid(), signal.SIGUSR1)
        assert (heard, asked.count()) == ([signal.SIGUSR1] * 2, 1)
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL, 0, 4000])
def test_signals_that_end_processes_are_refused(number):
    with pytest.raises(InvalidInputError, match="SignalWatch"):
        SignalWatch(number)


def test_only_the_main_thread_can_watch():
    said = []

    def enter():
        try:
            SignalWatch().__enter__()
        except InvalidInputError as error:
            said.append(str(error))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert "main thread" in said[0]
