"""The thread that steps the engine, and the way from it back to whoever asked.

any thread: submit -> engine's queue        this thread: step, step, ...        events -> the asker's event loop
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence

from ..engine.base import Event, Request
from ..engine.embedded import EmbeddedEngine, Sequence_
from ..errors import CmqaError


class QueueFull(CmqaError):
    """As many requests wait as may."""


class Stopped(CmqaError):
    """The server left before an answer was whole."""


class Worker:
    """`most_waiting` requests may wait for a slot; one more is QueueFull."""

    def __init__(self, engine: EmbeddedEngine, most_waiting: int) -> None:
        self.engine, self.most_waiting = engine, most_waiting
        self._wake, self._ended = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended = True
        self._wake.set()
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def busy(self) -> bool:
        return any(self.engine.load)

    def check_room(self, requests: int) -> None:
        running, waiting = self.engine.load
        free = max(0, self.engine.max_batch - running)
        if waiting + requests > free + self.most_waiting:
            raise QueueFull(
                f"{waiting} requests wait already, at most {self.most_waiting} may", hint="Try again later."
            )

    def submit(self, requests: Sequence[Request]) -> Group:
        """Answers of one batch; called in an event loop, which then gets the events. All are taken or none."""
        group = Group(self)
        try:
            for i, request in enumerate(requests):
                group.sequences.append(self.engine.submit(request, group.listener(i)))
        except BaseException:
            group.cancel()
            raise
        self._wake.set()
        return group

    def fail_all(self) -> None:
        """Every request ends now, and is told so."""
        self.engine.fail_all(Stopped("the server stopped before the answer was whole", hint="Ask again."))

    def cancel(self, sequence: Sequence_) -> None:
        self.engine.cancel(sequence)
        self._wake.set()

    def _run(self) -> None:
        while not self._ended:
            self._wake.clear()
            if not self.engine.step():
                self._wake.wait(1.0)


class Group:
    """The events of some requests, in the loop that asked; left early, it frees their slots."""

    def __init__(self, worker: Worker) -> None:
        self.sequences: list[Sequence_] = []
        self._worker, self._loop = worker, asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    def listener(self, index: int) -> Callable[[Event], None]:
        def put(event: Event) -> None:
            try:
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))
            except RuntimeError:  # the loop is closed: nobody listens any more
                self.cancel()

        return put

    def cancel(self) -> None:
        for sequence in self.sequences:
            self._worker.cancel(sequence)

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """(index of the request, event) until each has ended. Raises what went wrong with any."""
        left = len(self.sequences)
        try:
            while left:
                index, event = await self._events.get()
                if event.error is not None:
                    raise event.error
                left -= event.finish_reason is not None
                yield index, event
        finally:
            self.cancel()
