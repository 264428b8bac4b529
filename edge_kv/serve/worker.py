"""One decoder for many clients: a bounded queue that takes turns, and a thread that answers.

A device decodes one reply at a time. Who waits, waits fairly: clients take turns, however many
requests one of them sends. A request that nobody waits for any more is dropped, also while it runs.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from edge_kv.errors import EdgeKVError, RuntimeFault
from edge_kv.runtime.chat import Piece, Reply, Turn

Begin = Callable[[Callable[[], bool]], Turn]
_STOPPING = "The server is stopping."


class TimeIsUp(RuntimeFault):
    """The time limit of a request ran out before its reply began."""


class QueueFull(RuntimeFault):
    """As many requests wait as the queue takes."""


@dataclass
class Job:
    """One request: `begin` makes its reply on the decoder's thread, `told` hears what comes of it.

    `begin` is given what tells, before every step, whether to stop. `told` gets pieces, then the
    reply or the error that ended it; it must not block.
    """

    client: str
    begin: Begin
    told: Callable[[Piece | Reply | Exception], None]
    deadline: float  # time.monotonic() after which the reply is cut off
    cancelled: threading.Event = field(default_factory=threading.Event)

    def over(self) -> bool:
        """Whether nobody waits for it any more, or its time has run out."""
        return self.cancelled.is_set() or time.monotonic() > self.deadline


class Worker:
    """The decoder's thread and the queue before it."""

    def __init__(self, waiting: int) -> None:
        """`waiting`: requests that may wait beside the one that runs."""
        self._waiting = waiting
        self._queues: OrderedDict[str, deque[Job]] = OrderedDict()  # clients, the next one first
        self._changed = threading.Condition()
        self._stopping = False
        self._running: Job | None = None
        self._thread = threading.Thread(target=self._run, name="decoder", daemon=True)
        self._thread.start()

    @property
    def queued(self) -> int:
        """Requests that wait."""
        with self._changed:
            return sum(map(len, self._queues.values()))

    @property
    def busy(self) -> bool:
        """Whether a reply is being made."""
        return self._running is not None

    def submit(self, job: Job) -> None:
        """Queue a request.

        Raises:
            QueueFull: too many wait already, or the server is stopping.
        """
        with self._changed:
            for queue in self._queues.values():  # those that nobody waits for make room
                for old in [j for j in queue if j.cancelled.is_set()]:
                    queue.remove(old)
            count = sum(map(len, self._queues.values()))
            if self._stopping or count >= self._waiting:
                raise QueueFull(
                    _STOPPING
                    if self._stopping
                    else f"{count} requests wait already; try again in a moment."
                )
            self._queues.setdefault(job.client, deque()).append(job)
            self._changed.notify()

    def end(self) -> None:
        """Take no more requests, and end the one that runs and those that wait."""
        with self._changed:
            self._stopping = True
            if self._running:
                self._running.cancelled.set()
            self._changed.notify()

    def stop(self, seconds: float) -> None:
        """`end`, and wait for that."""
        self.end()
        self._thread.join(seconds)

    def _run(self) -> None:
        for job in self._jobs():
            if job.over():
                job.told(TimeIsUp("The request waited longer than its time limit."))
                continue
            try:
                self._answer(job)
            except EdgeKVError as e:
                job.told(e)
            except Exception as e:  # whatever it is, the next client is to be served
                job.told(e)

    def _jobs(self) -> Iterator[Job]:
        while True:
            with self._changed:
                self._running = None
                while not self._queues and not self._stopping:
                    self._changed.wait()
                if self._stopping:
                    left = [job for queue in self._queues.values() for job in queue]
                    self._queues.clear()
                    for job in left:
                        job.told(QueueFull(_STOPPING))
                    return
                client, queue = self._queues.popitem(last=False)
                if not queue:
                    continue
                job = queue.popleft()
                if queue:
                    self._queues[client] = queue  # behind the others
                if job.cancelled.is_set():
                    continue
                self._running = job
            yield job

    def _answer(self, job: Job) -> None:
        turn = job.begin(job.over)
        try:
            for piece in turn:
                job.told(piece)
                if job.over():
                    break
        finally:
            turn.close()
        if turn.reply is None and self._stopping:
            raise QueueFull(_STOPPING)
        if turn.reply is None:
            raise TimeIsUp(
                "The time limit of the request ran out while its prompt was read; what was read is "
                "kept, so that asking again goes on from there."
            )
        job.told(turn.reply)
