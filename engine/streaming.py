"""The asyncio front of a replica: one thread steps the core; requests come in and outputs go out without waiting for
it.

Outputs leave once per step and sink, not once per token and request: whatever a sink does (a network message, waking an
event loop) is paid per step.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Protocol

from shoal.engine.config import EngineConfig
from shoal.engine.core import EngineCore
from shoal.engine.executor import EngineFactory, ExecutorError, ExecutorInfo, Progress
from shoal.engine.request import EngineStats, FinishReason, Request, RequestId, RequestOutput

log = logging.getLogger(__name__)

IDLE_CHECK_S = 0.5
CLOSE_TIMEOUT_S = 10.0


class Sink(Protocol):
    """Where outputs go. Called in the engine's thread, at most once per step: it must not block."""

    def deliver(self, outputs: list[RequestOutput]) -> None: ...


class AsyncEngine:
    """One replica's engine, running. `submit`, `abort`, `stats` and `check` may be called from any thread.

    If the engine fails, every open request gets an output with finish reason ERROR, and `check()` raises from then on.
    """

    def __init__(
        self,
        factory: EngineFactory,
        *,
        on_progress: Progress | None = None,
        observer: Callable[[EngineCore], None] | None = None,
    ) -> None:
        """`factory` makes the config and the executor, in the engine's thread: `worker.local_engine(options)` for one
        rank in this process, `group.coordinator.group_engine(options, launcher)` for several.

        `observer` is called in the engine's thread after each step, once its outputs are delivered, after requests have
        come or gone, and every IDLE_CHECK_S otherwise. KV events are recorded for it, and it has to take them.
        """
        self._factory = factory
        self._observer = observer
        self._on_progress = on_progress or (lambda what, done, total: None)
        self._core: EngineCore | None = None
        self._inbox: queue.SimpleQueue[Callable[[EngineCore], None] | None] = queue.SimpleQueue()
        self._sinks: dict[RequestId, Sink] = {}
        self._lock = threading.Lock()  # guards _sinks and _error
        self._error: BaseException | None = None
        self._is_closed = False
        self._step_started_s: float | None = None
        self._thread: threading.Thread | None = None

    # -- life --------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load the model in the engine's thread. Raises ConfigError or whatever else made loading fail."""
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        loop = asyncio.get_running_loop()

        def settle(error: BaseException | None) -> None:
            if not started.done():
                started.set_exception(error) if error is not None else started.set_result(None)

        self._thread = threading.Thread(
            target=self._run,
            args=(lambda error: loop.call_soon_threadsafe(settle, error),),
            name="engine",
            daemon=True,
        )
        self._thread.start()
        await started

    async def close(self) -> None:
        """Stop stepping and free everything. Open requests end with ABORT."""
        self._is_closed = True
        self._inbox.put(None)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, CLOSE_TIMEOUT_S)
        if self._core is not None:
            self._core.close()  # ends a step that a rank would not

    @property
    def config(self) -> EngineConfig:
        return self._started.config

    @property
    def info(self) -> ExecutorInfo:
        return self._started.info

    @property
    def max_model_len(self) -> int:
        return self._started.max_model_len

    @property
    def _started(self) -> EngineCore:
        assert self._core is not None, "start() comes first"
        return self._core

    # -- requests ----------------------------------------------------------------------------------------------

    def submit(self, requests: Sequence[Request], sink: Sink) -> None:
        """Queue requests whose outputs go to `sink`. Raises RequestError for one that can never run, ExecutorError if
        the engine has failed or is closed; none of them is queued then.
        """
        core = self._started
        for request in requests:
            core.check_request(request)
        with self._lock:
            self._raise_if_down()
            for request in requests:
                for request_id in request.result_ids:
                    assert request_id not in self._sinks, f"request id {request_id} is in use"
                    self._sinks[request_id] = sink

        def add(core: EngineCore) -> None:
            for request in requests:
                if request.request_id in self._sinks:  # not aborted meanwhile
                    core.add(request)

        self._inbox.put(add)

    def abort(self, request_ids: Iterable[RequestId]) -> None:
        """Forget requests before the next step; ids that are not here are ignored. No output follows."""
        ids = tuple(request_ids)
        with self._lock:
            for request_id in ids:
                self._sinks.pop(request_id, None)

        def remove(core: EngineCore) -> None:
            for request_id in ids:
                core.abort(request_id)

        self._inbox.put(remove)

    async def generate(self, request: Request) -> AsyncIterator[RequestOutput]:
        """The outputs of one request. Closing the generator aborts it."""
        sink = QueueSink(asyncio.get_running_loop())
        self.submit([request], sink)
        open_ids = set(request.result_ids)
        try:
            while open_ids:
                output = await sink.get()
                if output.finish_reason is not None:
                    open_ids.remove(output.request_id)
                yield output
        finally:
            if open_ids:
                self.abort(open_ids)

    def stats(self) -> EngineStats:
        return self._started.stats()

    def check(self) -> None:
        """Raise ExecutorError if the engine has failed, or if its step is overdue."""
        with self._lock:
            self._raise_if_down()
        started_s, timeout_s = self._step_started_s, self._started.config.step_timeout_s
        if started_s is not None and time.monotonic() - started_s > timeout_s:
            raise ExecutorError(f"a step has been running for more than {timeout_s:g} s")

    def _raise_if_down(self) -> None:
        if self._error is not None:
            raise ExecutorError(f"the engine has failed: {self._error!r}") from self._error
        if self._is_closed:
            raise ExecutorError("the engine is closed")

    # -- the engine's thread -----------------------------------------------------------------------------------

    def _run(self, on_started: Callable[[BaseException | None], object]) -> None:
        core: EngineCore | None = None
        try:
            core = EngineCore(*self._factory(self._on_progress), record_kv_events=self._observer is not None)
            core.start()
        except BaseException as error:
            self._error = error
            if core is not None:
                core.close()
            on_started(error)
            return
        self._core = core
        on_started(None)
        failure: Exception | None = None
        try:
            self._loop(core)
        except Exception as caught:
            log.exception("the engine failed")
            failure = caught
        finally:
            self._fail_open_requests(failure)
            core.close()

    def _loop(self, core: EngineCore) -> None:
        is_checked = True
        while not self._is_closed:
            if core.has_work:
                if self._take_messages(core, timeout_s=0):
                    self._observe(core)
                self._step_started_s = time.monotonic()
                self._deliver(core.step())
                self._step_started_s = None
                is_checked = False
            elif not self._take_messages(core, timeout_s=IDLE_CHECK_S):
                core.check_ranks()
                if not is_checked:
                    core.check()  # idle for a while: audit the pool
                    is_checked = True
            self._observe(core)

    def _observe(self, core: EngineCore) -> None:
        if self._observer is not None:
            self._observer(core)

    def _take_messages(self, core: EngineCore, timeout_s: float) -> bool:
        """Carry out all that has come in, waiting for the first message; False if none came."""
        is_any = False
        while True:
            try:
                message = self._inbox.get(block=not is_any and timeout_s > 0, timeout=timeout_s)
            except queue.Empty:
                return is_any
            is_any = True
            if message is not None:
                message(core)

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        by_sink: dict[Sink, list[RequestOutput]] = {}
        with self._lock:
            for output in outputs:
                sink = (
                    self._sinks.get(output.request_id)
                    if output.finish_reason is None
                    else self._sinks.pop(output.request_id, None)
                )
                if sink is not None:
                    by_sink.setdefault(sink, []).append(output)
        for sink, group in by_sink.items():
            sink.deliver(group)

    def _fail_open_requests(self, error: BaseException | None) -> None:
        with self._lock:
            self._error = error
            self._is_closed = True
            ids = list(self._sinks)
        reason = FinishReason.ABORT if error is None else FinishReason.ERROR
        text = "the engine is closing" if error is None else f"the engine has failed: {error!r}"
        self._deliver([RequestOutput(request_id, (), finish_reason=reason, error=text) for request_id in ids])


class QueueSink:
    """Outputs into an asyncio loop: one wake-up per step, however many requests share the sink."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue: asyncio.Queue[RequestOutput] = asyncio.Queue()

    def deliver(self, outputs: list[RequestOutput]) -> None:
        self._loop.call_soon_threadsafe(self._put, outputs)

    def _put(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            self._queue.put_nowait(output)

    async def get(self) -> RequestOutput:
        return await self._queue.get()
