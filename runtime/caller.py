"""Who is in a call on a session: one thread at a time, of the process that made it."""

from __future__ import annotations

import os
import threading

from headinfer_compile.errors import CacheError


class Caller:
    """The thread that is in a call, if one is; it may never have come to leave."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._process = os.getpid()

    @property
    def busy(self) -> bool:
        """Whether a thread has entered and not left."""
        return self._thread is not None

    @property
    def is_this_thread(self) -> bool:
        """Whether it is the current thread that has entered."""
        return self._thread is threading.current_thread()

    @property
    def is_this_process(self) -> bool:
        """False in a fork."""
        return self._process == os.getpid()

    def check(self) -> None:
        """Check that the current thread may call; one that did not come to leave may call again.

        Raises:
            CacheError: Another thread is in a call, or this is a fork of the process.
        """
        other, this = self._thread, threading.current_thread()
        if other is not None and other is not this and other.is_alive():
            raise CacheError(
                f"thread {other.name!r} is in a call on this HeadInferCache, and thread "
                f"{this.name!r} made another: use one cache per thread, or one call at a time"
            )
        if not self.is_this_process:
            raise CacheError(
                f"this HeadInferCache was made in process {self._process} and is used in its fork "
                f"{os.getpid()}: streams and pinned pages do not survive a fork. Make a cache in "
                "each process"
            )

    def enter(self) -> None:
        """Begin a call of the current thread."""
        self._thread = threading.current_thread()

    def leave(self) -> None:
        """End the call of the current thread, if it is in one."""
        if self.is_this_thread:
            self._thread = None
