# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The rule that one thread at a time uses an engine, and the error of those who break it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class OneThread:
    """Lets one thread in at a time; for another thread, it raises an error and does not wait.

    The thread that is inside may enter again, as callbacks do. Threads may enter one after another.

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
        """A context that one thread at a time may be in.

        Args:
          what: the name of the call, for the error.

        Raises:
          RuntimeError: another thread is inside.
        """
        if not self._lock.acquire(blocking=False):
            name = self._last.name if self._last is not None else "another"
            raise RuntimeError(
                f"{what}: thread {threading.current_thread().name!r} calls while thread {name!r} is"
                f" in {self._what}; an engine is for one thread at a time: call it from one thread,"
                " or guard every call with a lock of your own"
            )
        with self._lock:  # `with` takes it again, and releases it even after an interrupt
            self._lock.release()  # the first time it was taken
            before = self._what
            self._last, self._what = threading.current_thread(), what
            try:
                yield
            finally:
                self._what = before

    def is_mine(self) -> bool:
        """Whether this thread was the last one inside, or is inside; True if there was none."""
        return self._last in (None, threading.current_thread())
