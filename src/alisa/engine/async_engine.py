"""The engine for asyncio: a thread of its own makes the steps, and every request is an asynchronous stream.

Only that thread ever calls the engine. Callers hand it requests and aborts through a queue that it empties between
steps; what comes out is put into the queues of their event loops.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from queue import SimpleQueue
from typing import TypeVar, cast

from alisa.config import SamplingParams
from alisa.engine.budgets import AS_CONFIGURED, ReadingParams
from alisa.engine.engine import Engine
from alisa.engine.inbox import Event, Inbox, Listener
from alisa.engine.output import EngineOutput
from alisa.errors import AlisaError, InputError
from alisa.outputs import TextDelta

T = TypeVar("T")


class EngineDiedError(AlisaError):
    """The thread that makes the steps has ended with an error; every open request ends with this."""


class EngineClosedError(InputError):
    """The engine has been closed, and takes no more requests."""


class AsyncEngine:
    """An engine that runs as long as this object is open.

    Args:
        engine: nobody else calls it from now on; it is closed with this object.
        observe: called by the engine's thread with all that comes out of it, before its readers get it.

    Example:
        >>> async with AsyncEngine(build_engine(model, config)) as engine:
        ...     async for event in engine.stream("It was a dark night", SamplingParams()):
        ...         print(event)
    """

    def __init__(self, engine: Engine, observe: Callable[[EngineOutput], object] = lambda _: None) -> None:
        self._engine = engine
        self._observe = observe
        self._calls: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._streams: dict[str, _Stream] = {}
        self._names = itertools.count()
        self._died: BaseException | None = None
        self._takes_calls = True
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="alisa-engine", daemon=True)
        self._thread.start()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def failure(self) -> BaseException | None:
        """What the engine's thread has ended with; None: it has not, or as it was told to."""
        return self._died

    async def add_request(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        continues: bool = False,
        client: str = "",
        reading: ReadingParams = AS_CONFIGURED,
    ) -> str:
        """Queue a request, whose events `events` gives; see `Engine.add_request`.

        Raises:
            RequestError: the prompt cannot be used.
            InputError: the name is taken, or its grammar cannot be used.
            CapacityError: the request cannot fit even when it runs alone.
            EngineClosedError: the engine is closed.
            EngineDiedError: there is no engine any more.
        """
        stream = _Stream(asyncio.get_running_loop())
        name = f"async-{next(self._names)}" if request_id is None else request_id

        def add() -> str:
            if name in self._streams:  # it may have finished, and not been read
                raise InputError(f"The request id {name!r} is in use; choose another one.")
            self._engine.add_request(
                prompt,
                params,
                request_id=name,
                priority=priority,
                cache_salt=cache_salt,
                continues=continues,
                client=client,
                reading=reading,
            )
            self._streams[name] = stream
            return name

        try:
            return await self._call(add)
        except asyncio.CancelledError:
            # Nobody will read it. If it was refused, or is another's, its stream is not ours, and stays.
            with suppress(EngineDiedError, InputError):
                self._post(lambda: self._abandon(name, stream))
            raise

    async def events(self, *request_ids: str) -> AsyncGenerator[Event]:
        """What requests give, as it comes: text as it grows, at last the output of each.

        Leaving early aborts those that have not ended.

        Raises:
            InputError: there is no such request, or it is being read already.
            EngineDiedError: the engine has ended with an error.
        """
        inbox, running = Inbox(), set(request_ids)
        with self.reading(request_ids, inbox):
            while running:
                for event in await inbox.take():
                    if not isinstance(event, TextDelta):
                        running.discard(event.request_id)
                    yield event

    @contextmanager
    def reading(self, request_ids: Sequence[str], reader: Listener) -> Iterator[None]:
        """In the block events of these requests go to the reader, first what has come before.

        Its end aborts those that have not ended. It is called by the event loop that has added them.

        Raises:
            InputError: there is no such request, or it is being read already.
        """
        streams = {name: self._unread(name) for name in request_ids}
        try:
            for stream in streams.values():
                stream.lead_to(reader)
            yield
        finally:
            for name, stream in streams.items():
                self._drop(name, stream)

    async def stream(
        self, prompt: str | Sequence[int], params: SamplingParams, *, priority: int = 0, cache_salt: str = ""
    ) -> AsyncGenerator[Event]:
        """`add_request` and `events` in one."""
        request_id = await self.add_request(prompt, params, priority=priority, cache_salt=cache_salt)
        async with aclosing(self.events(request_id)) as events:
            async for event in events:
                yield event

    async def abort(self, request_id: str) -> bool:
        """The request is over and what it held is free; whoever reads it gets what it had. False: there is none."""
        return await self._call(lambda: self._abort(request_id))

    def leave(self, request_id: str) -> None:
        """Nobody reads this request any more; if it has not ended, it does after the step that is being made."""
        if (stream := self._streams.get(request_id)) is not None:
            self._drop(request_id, stream)

    async def between_steps(self, work: Callable[[Engine], T]) -> T:
        """What `work` returns, called by the engine's thread, where nothing changes meanwhile."""
        return await self._call(lambda: work(self._engine))

    async def close(self) -> None:
        """Every request is aborted, the thread has ended, and the engine is closed. Closing again does nothing."""
        self._calls.put(None)
        await asyncio.to_thread(self._thread.join)

    async def _call(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises, called between two steps by the engine's thread."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def settle(result: T | None, error: BaseException | None) -> None:
            if done.cancelled():
                return
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(cast(T, result))

        def call() -> None:
            result, error = None, None
            try:
                result = work()
            except BaseException as raised:
                error = raised
            with suppress(RuntimeError):  # an event loop that is closed has nobody who waits
                loop.call_soon_threadsafe(settle, result, error)
            if error is not None and not isinstance(error, AlisaError):
                raise error

        self._post(call)
        return await done

    def _post(self, call: Callable[[], object]) -> None:
        """`call` is made by the engine's thread, between two steps.

        Raises:
            EngineDiedError: that thread has ended with an error.
            EngineClosedError: the engine is closed.
        """
        with self._lock:
            if self._died is not None:
                raise EngineDiedError(f"The engine has stopped: {self._died}") from self._died
            if not self._takes_calls:
                raise EngineClosedError("This engine is closed; make another one.")
            self._calls.put(call)

    def _abort(self, request_id: str) -> bool:
        output = self._engine.abort(request_id)
        if output is not None:
            self._deliver(EngineOutput(finished=(output,)))
        return output is not None

    def _unread(self, request_id: str) -> _Stream:
        stream = self._streams.get(request_id)
        if stream is None:
            raise InputError(f"There is no request {request_id!r}; it may have been read to its end.")
        if stream.is_read:
            raise InputError(f"The events of request {request_id!r} are being read already.")
        return stream

    def _abandon(self, request_id: str, stream: _Stream) -> None:
        """Nobody reads this stream any more: its request ends, if it has not."""
        if self._forget(request_id, stream):
            self._abort(request_id)

    def _drop(self, request_id: str, stream: _Stream) -> None:
        """Nobody reads this stream any more, which is of the event loop that calls; its request ends."""
        self._forget(request_id, stream)
        if not stream.has_ended:
            with suppress(EngineDiedError, EngineClosedError):
                self._post(lambda: self._abort(request_id))

    def _forget(self, request_id: str, stream: _Stream) -> bool:
        """Events of the request go nowhere any more; False: they did not go to this stream."""
        is_its = self._streams.get(request_id) is stream
        if is_its:
            del self._streams[request_id]
        return is_its

    def _run(self) -> None:
        """Make calls and steps until the queue says stop."""
        try:
            while self._make_calls():
                self._deliver(self._engine.step())
        except BaseException as error:  # whatever it is, nobody may wait forever
            self._died = error
            for stream in list(self._streams.values()):
                with suppress(RuntimeError):  # an event loop that is closed has no reader
                    told = EngineDiedError(f"The engine has stopped: {error}")
                    stream.loop.call_soon_threadsafe(stream.fail, told)
        else:
            for request_id in list(self._streams):
                self._abort(request_id)
        with self._lock:
            self._takes_calls = False
        self._engine.close()
        while not self._calls.empty():  # whoever still waits is told that the engine is closed
            call = self._calls.get()
            if call is not None:
                call()

    def _make_calls(self) -> bool:
        """Make the calls that are there, and wait for one where there is nothing to compute; False: stop.

        While nobody asks for anything, what was said is read, step by step.
        """
        while not (self._calls.empty() and self._engine.has_requests):
            if self._calls.empty() and self._engine.read_answer():
                continue
            call = self._calls.get()
            if call is None:
                return False
            call()
        return True

    def _deliver(self, output: EngineOutput) -> None:
        self._observe(output)
        # One call for each event loop: each wakes it up.
        found: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, Event]]] = {}
        for event in (*output.deltas, *output.finished):
            # A reader that has left early is not there any more; its abort is on the way.
            stream = self._streams.get(event.request_id)
            if stream is not None:
                found.setdefault(stream.loop, []).append((stream, event))
        for loop, events in found.items():
            with suppress(RuntimeError):  # a closed one has no readers
                loop.call_soon_threadsafe(_put_all, events)


class _Stream:
    """The events of one request on their way to its event loop, which alone calls this."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.has_ended = False
        self.reader: Listener = Inbox()
        """Where events go; at first they are kept."""
        self._kept: Inbox | None = self.reader

    @property
    def is_read(self) -> bool:
        """Whether there is somebody whom events go to."""
        return self._kept is None

    def lead_to(self, reader: Listener) -> None:
        """Somebody reads: from now on all events go there, those first that have come before."""
        kept, self._kept, self.reader = self._kept, None, reader
        assert kept is not None, "somebody reads already"
        kept.empty_into(reader)

    def fail(self, error: Exception) -> None:
        """Its reader is told that nothing more comes."""
        self.has_ended = True
        self.reader.fail(error)


def _put_all(events: Sequence[tuple[_Stream, Event]]) -> None:
    """Called by the event loop of these streams: each reader gets all that is for him at once."""
    found: dict[Listener, list[Event]] = {}
    for stream, event in events:
        stream.has_ended = not isinstance(event, TextDelta)
        found.setdefault(stream.reader, []).append(event)
    for reader, its_events in found.items():
        reader.put(its_events)
