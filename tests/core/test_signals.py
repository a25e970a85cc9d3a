"""Signals that ask a long piece of work to end in good order."""

import signal

from mlip_md.signals import Interruptions


def test_ctrl_c_is_left_alone_where_it_is_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruptions(signal.SIGINT) as interruptions:
            signal.raise_signal(signal.SIGINT)
        assert interruptions.reason is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
