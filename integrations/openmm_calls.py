"""How OpenMM enters a force, so that Ctrl-C at any moment is told and breaks nothing.

Python raises the KeyboardInterrupt of a waiting Ctrl-C where Python code is entered, before the
first line of a function can catch it. OpenMM asks an exception for its text, finds none, and says
``<NULL>``: nobody would know what happened. A generator that waits is entered inside its ``try``,
so here a generator answers the calls; and what leads from OpenMM's call to ``send`` of that
generator is not Python code (``property``, ``attrgetter``).
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Generator
from typing import Any, NamedTuple, TypeVar

from mlip_md.errors import CapacityError

Force = TypeVar("Force")
State = TypeVar("State")
Answer = TypeVar("Answer")

INTERRUPTED = "interrupted (Ctrl-C) inside the ML potential; the last step is incomplete"
"""What a force says to OpenMM, which passes on nothing but a text, when Ctrl-C fell into it."""

WITHOUT_TEXT = "<NULL>"
"""What OpenMM says when Ctrl-C fell between it and the force."""

ADVICE = (
    "A simulation in which this happens is probably unstable: relax its start with "
    "mlip_md.integrations.openmm.minimize, use a smaller time step, or look at the structure of "
    "the last saved frame."
)
"""The last line of a force's story, for whoever steps it by hand."""


class Told(NamedTuple):
    """What a force has told through OpenMM.

    Attributes:
        interrupted: whether Ctrl-C fell into it.
        full: whether a memory was full, the card's of OpenMM's own included.
        text: what happened, without the advice.
    """

    interrupted: bool
    full: bool
    text: str


def read_told(error: Exception) -> Told:
    """What a force has told through an exception of OpenMM, which holds nothing but a text.

    The one place that looks into that text: whoever calls forces has better advice than they.
    """
    text = str(error)
    interrupted = INTERRUPTED in text or text.strip() == WITHOUT_TEXT
    full = f": {CapacityError.__name__}: " in text or "OUT_OF_MEMORY" in text
    return Told(interrupted, full, text.replace(f"\n{ADVICE}", ""))


def enter_inside_try(method: Callable[[Force, State], Answer]) -> Callable[[Force, State], Answer]:
    """Decorator of ``__call__``, so that Ctrl-C finds no place where it would not be caught.

    Whatever the method raises becomes a RuntimeError with the whole story in its text.

    Args:
        method: takes a State and answers. Its class has ``_calls``, a ``Calls``, and ``story``,
            which makes one text of an error and the State (None if it is not known).

    Returns:
        What is called like the method.
    """
    return _Entry(method)  # type: ignore[return-value]  # what it gives an instance is one


class _Entry(property):
    """Gives an instance ``send`` of the generator that waits in this thread."""

    def __init__(self, method: Callable[..., Any]) -> None:
        super().__init__(operator.attrgetter("_calls.send"), doc=method.__doc__)
        self.method = method


class Calls(threading.local):
    """How a thread calls a force: ``send``, of a generator that waits for the next State.

    Args:
        force: a weak proxy, because threads keep what they are given.
    """

    def __init__(self, force: Any) -> None:
        self._force = force
        self.renew()

    def renew(self) -> None:
        """Wait for the next State, anew after an error has ended the generator."""
        answers = _answer_calls(self._force)
        next(answers)
        self.send = answers.send


def _answer_calls(force: Any) -> Generator[Any, Any, None]:
    """Answer one State after the other.

    Raises:
        RuntimeError: with the whole story in its text, because OpenMM passes on nothing else.
    """
    method = force.__class__.__call__.method
    answer = state = None
    try:
        while True:
            state = yield answer
            answer, state = method(force, state), None
    except GeneratorExit:
        return
    except BaseException as error:
        force._calls.renew()  # before all else, so that the next call finds a generator
        message = _tell(force, error, state)
    # Raised outside the handler and without the State: OpenMM never frees what the exception
    # holds on to.
    del answer, state
    raise RuntimeError(message)


def _tell(force: Any, error: BaseException, state: Any) -> str:
    """What happened, as one text."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    try:
        return str(force.story(error, state))
    except Exception as second:  # an exception that cannot even be printed
        return f"mlip-md: {type(error).__name__}, and no more to say ({type(second).__name__})"
