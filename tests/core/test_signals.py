"""Signals that ask a long piece of work to end in good order."""

import signal

import pytest

from mlip_md.errors import StoppedError
from mlip_md.signals import ENDINGS, Interruptions


@pytest.mark.parametrize("number", ENDINGS)
def test_a_signal_is_left_alone_where_it_is_ignored(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with Interruptions(*ENDINGS) as interruptions:
            signal.raise_signal(number)
        assert interruptions.reason is None
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize(("name", "reason"), [("SIGTERM", "terminated"), ("SIGHUP", "hangup")])
@pytest.mark.parametrize("patient", [True, False])
def test_a_signal_of_the_system_is_noted_and_told(name, reason, patient, interruptible):
    number = signal.Signals[name]
    interruptions, reasons = Interruptions(*ENDINGS, patient=patient), []

    def work():
        with interruptions:
            signal.raise_signal(number)
            signal.raise_signal(number)
            reasons.append(interruptions.reason)
            interruptions.check()

    with pytest.raises(StoppedError, match=f"{name} .* saved"):
        work()
    assert interruptions.reason == reason
    assert reasons == [reason] * patient
    assert signal.getsignal(number) is signal.SIG_DFL


@pytest.mark.parametrize("patient", [True, False])
def test_inside_another_one_nothing_is_lost(patient, interruptible):
    """A library may swallow what the outer one raises; the inner one still knows of it."""
    with Interruptions(signal.SIGINT, patient=False) as outer:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with Interruptions(*ENDINGS, patient=patient) as inner:
            assert inner.reason == "keyboard"
            with pytest.raises(KeyboardInterrupt):
                inner.check()
            with pytest.raises(KeyboardInterrupt):  # pressed again
                signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert outer.reason == "keyboard"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_inside_another_one_the_inner_one_notes(interruptible):
    with Interruptions(signal.SIGINT, patient=False) as outer:
        with Interruptions(*ENDINGS) as inner:
            signal.raise_signal(signal.SIGINT)
            assert inner.reason == "keyboard"
        assert outer.reason is None
