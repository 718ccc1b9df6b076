import os
import signal

import pytest

from latentprior.runtime.events import Event
from latentprior.runtime.stopping import Stopped, StopSignals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_at_once_and_again_at_the_next_event(number):
    before = signal.getsignal(number)
    with StopSignals() as stop:
        stop.check(Event("base"))
        with pytest.raises(Stopped):
            os.kill(os.getpid(), number)
        with pytest.raises(Stopped):
            stop.check(Event("base"))
    assert signal.getsignal(number) == before
