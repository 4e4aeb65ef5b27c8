"""Signals that end a process: heard at once, or when the step that is running is done and written down."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
_TOGETHER = 1.0  # seconds within which signals count as one


class Signals:
    """Holds signals back while a step runs; used as a context, outside of which they do what they did before.

    Before one has its effect, which may be the end of the process, `closing` is called.

    A second Ctrl-C is never held back, nor another signal that comes again after a second: whoever sends it means it.

    Example:
        >>> with Signals() as signals:
        ...     signals.hold()
        ...     signals.release()
    """

    def __init__(self) -> None:
        self.came: int | None = None
        self.closing: Callable[[], None] = lambda: None
        self._holds = False
        self._heard_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # Python lets no other set handlers
            numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
            before = {number: signal.getsignal(number) for number in numbers}
            self._before = {n: one for n, one in before.items() if one not in (signal.SIG_IGN, None)}
            for number in self._before:
                signal.signal(number, self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if kind is None:
            self._deliver()

    def hold(self) -> None:
        """Hold back what comes from now on."""
        self._holds = True

    def release(self) -> None:
        """Let what has come have its effect, which is mostly that this raises KeyboardInterrupt; and hold no more."""
        self._holds = False
        if self.came is not None:
            self._restore()
            self._deliver()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._holds and self.came is None:
            self.came, self._heard_at = number, time.monotonic()
            print("stopping when this step is written down; once more to stop at once", file=sys.stderr, flush=True)
            return
        # Terminals and service managers send several at once.
        if self._holds and number != signal.SIGINT and time.monotonic() - self._heard_at < _TOGETHER:
            return
        if self._holds and number == signal.SIGINT and self.came != signal.SIGINT:
            self.came = number
            return
        self._restore()
        self.came = number
        self._deliver()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _deliver(self) -> None:
        came, self.came = self.came, None
        if came is not None:
            self.closing()
            signal.raise_signal(came)
