# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The rule that one thread at a time uses an engine, and the error that says so."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class OneThread:
    """Lets one thread in; others are not made to wait, they are told.

    The thread inside may come in again, as callbacks do. Threads may take turns.

    >>> alone = OneThread()
    >>> with alone("Engine.step"), alone("Engine.abort"):
    ...     pass
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._last: threading.Thread | None = None
        self._what = ""

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """The part of the program that one thread at a time may be in; `what` names it.

        Raises:
          RuntimeError: another thread is in it.
        """
        if not self._lock.acquire(blocking=False):
            name = self._last.name if self._last is not None else "another"
            raise RuntimeError(
                f"{what}: thread {threading.current_thread().name!r} calls while thread {name!r} is"
                f" in {self._what}; an engine is for one thread at a time: call it from one thread,"
                " or put a lock of yours around every call"
            )
        with self._lock:  # which lets go of it whatever comes, an interrupt included
            self._lock.release()
            before = self._what
            self._last, self._what = threading.current_thread(), what
            try:
                yield
            finally:
                self._what = before

    def is_mine(self) -> bool:
        """Whether the thread that was in last, and may still be, is this one, or there is none."""
        return self._last in (None, threading.current_thread())
