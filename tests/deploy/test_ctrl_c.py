"""A Ctrl-C that is swallowed on its way is still known."""

import os
import signal

import pytest

from deploy.ctrl_c import heard, remembered


def test_a_swallowed_interrupt_is_remembered() -> None:
    with remembered():
        assert not heard()
        try:
            os.kill(os.getpid(), signal.SIGINT)
            while True:  # the handler runs between two instructions
                pass
        except BaseException:  # noqa: BLE001 - what a careless import does
            pass
        assert heard()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_another_handler_is_left_alone() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with remembered():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupt_still_interrupts() -> None:
    with pytest.raises(KeyboardInterrupt), remembered():
        os.kill(os.getpid(), signal.SIGINT)
        while True:
            pass
