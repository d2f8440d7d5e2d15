"""The compute thread of a stage: loads the model, then performs orders in their order.

One thread does all computing, so that the event loop never computes and the engine
needs no locks. Everything reaches it through one queue; it keeps its own state, and
posts what it has done to the event loop, one wake-up a result. What others wait for it
sends itself, where there is a shortcut to them. A micro-batch runs when its order and its
activations are both there, and when its link downstream is not too far behind; while it waits for
them, it is prepared. One that is abandoned is passed over when its turn comes, but for its updates.

Letters: T rows, H hidden size.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from penstock.v1 import stage_pb2

from core.errors import ProtocolViolation
from core.pipeline.batch import MicroBatch, SampledTokens, SequenceUpdates
from core.wire.frames import CompleteActivations, encode_frames
from services.stage.inbox import (
    Abandoned,
    Arrived,
    Close,
    Item,
    Open,
    Ordered,
    RoomAgain,
    Stop,
)
from services.stage.job import (
    NO_ROUTE,
    Job,
    Order,
    Outlet,
    Performed,
    Route,
    StageEngine,
    StepResult,
)
from services.stage.starvation import NOT_STARVED, Arrival, attribute

Post = Callable[..., object]
Model = TypeVar("Model")


class Worker(Generic[Model]):
    """Owner of the compute thread. All methods are called on the event loop's thread."""

    def __init__(self, post: Post) -> None:
        """`post(function, *arguments)` calls the function on the event loop's thread."""
        self._post = post
        self._inbox: SimpleQueue[Item] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(
        self,
        load: Callable[[], Model],
        *,
        engine_of: Callable[[Model], StageEngine],
        on_loaded: Callable[[Model], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        """Starts the thread: it loads, says so, and then performs orders until stopped.

        A daemon: a process that is told to stop need not wait for loading to end.
        """

        def run() -> None:
            try:
                model = load()
            except BaseException as error:
                self._post(on_failure, error)
                return
            self._post(on_loaded, model)
            _ComputeLoop(engine_of(model), inbox=self._inbox, post=self._post).run()

        self._thread = threading.Thread(target=run, name="compute", daemon=True)
        self._thread.start()

    def open(self, job: Job) -> None:
        """Drops whatever was there, sequences included, and begins with `job`."""
        self._inbox.put(Open(job))

    def close(self, job: Job) -> None:
        """Drops the job's orders and sequences, if it is still the current one."""
        self._inbox.put(Close(job))

    def submit(self, job: Job, order: Order, arrival: Arrival, *, route: Route = NO_ROUTE) -> None:
        """Adds an order; orders are performed in the order of submission."""
        self._inbox.put(Ordered(job, order, route, arrival))

    def abandon(self, job: Job, micro_batch_ids: Iterable[int]) -> None:
        """Passes over these micro-batches, as far as they are submitted and not begun."""
        self._inbox.put(Abandoned(job, frozenset(micro_batch_ids)))

    def deliver(self, job: Job, activations: CompleteActivations, arrival: Arrival) -> None:
        """Brings the activations of a micro-batch."""
        self._inbox.put(Arrived(job, activations, arrival))

    def note_room(self, job: Job) -> None:
        """Notes that a link of the job may have room again."""
        if job.held:
            self._inbox.put(RoomAgain())

    def stop(self, *, timeout_s: float) -> None:
        """Stops the thread after the order in hand, or gives up after `timeout_s`."""
        self._inbox.put(Stop())
        if self._thread is not None:
            self._thread.join(timeout_s)


class _ComputeLoop:
    """The state of the compute thread."""

    def __init__(self, engine: StageEngine, *, inbox: SimpleQueue[Item], post: Post) -> None:
        self._engine = engine
        self._inbox = inbox
        self._post = post
        self._job: Job | None = None
        self._live: set[int] = set()
        self._orders: deque[Ordered] = deque()
        self._arrived: dict[int, Arrived] = {}
        self._abandoned: set[int] = set()  # of the orders
        self._prepared: MicroBatch | None = None  # the first order, where its updates are applied
        self._stopped = False
        self._starved = NOT_STARVED  # since the last micro-batch

    def run(self) -> None:
        """Takes and performs until told to stop."""
        while True:
            self._take()
            if self._stopped:
                return
            self._perform(self._orders.popleft())

    def _take(self) -> None:
        """Takes everything from the inbox; waits until an order can be performed."""
        self._drain()
        if self._stopped or self._runnable():
            return
        since_ns = time.perf_counter_ns()
        while not self._stopped and not self._runnable():
            self._prepare_ahead()
            self._accept(self._inbox.get())
            self._drain()
        if not self._stopped:
            self._note_starvation(since_ns)

    def _drain(self) -> None:
        try:
            while True:
                self._accept(self._inbox.get_nowait())
        except Empty:
            return

    def _accept(self, item: Item) -> None:
        if isinstance(item, Ordered):
            if item.job is self._job:
                self._orders.append(item)
        elif isinstance(item, Arrived):
            if item.job is self._job:
                self._arrived[item.activations.micro_batch_id] = item
        elif isinstance(item, Abandoned):
            if item.job is self._job:
                self._abandoned |= item.micro_batch_ids & {_id_of(one) for one in self._orders}
        elif isinstance(item, Open):
            self._begin(item.job)
        elif isinstance(item, Close):
            if item.job is self._job:
                self._forget()
        elif isinstance(item, Stop):
            self._stopped = True

    def _runnable(self) -> bool:
        """Whether the first order can be performed."""
        if not self._orders or self._job is None:
            return False
        self._job.held = False
        ordered = self._orders[0]
        order, route = ordered.order, ordered.route
        if isinstance(order, SequenceUpdates) or order.id in self._abandoned:
            return True
        if route.upstream_link and order.id not in self._arrived:
            return False
        return route.outlet is None or not self._is_held(self._job, route.outlet)

    def _is_held(self, job: Job, outlet: Outlet) -> bool:
        # `held` is set before the second look, and the event loop looks at it after it has
        # counted: one of the two sees the other.
        if outlet.has_room:
            return False
        job.held = True
        return not outlet.has_room

    def _prepare_ahead(self) -> None:
        """Prepares the first order, which waits for its activations or for room."""
        if not self._orders:
            return
        ordered = self._orders[0]
        batch = ordered.order
        if not isinstance(batch, MicroBatch) or batch.replays or batch is self._prepared:
            return
        try:
            self._note_starts(batch.updates)
            self._engine.prepare(batch)
            self._note_ends(batch.updates)
        except Exception as error:  # the boundary of the thread, as in `_perform`
            self._fail(ordered, error)
        else:
            self._prepared = batch

    def _note_starvation(self, since_ns: int) -> None:
        """Says why it took until now. Without live sequences there was nothing to wait for."""
        ordered = self._orders[0]
        arrived = None
        if isinstance(ordered.order, MicroBatch):
            arrived = self._arrived.get(ordered.order.id)
        if arrived is None and not self._live:
            return
        self._starved += attribute(
            since_ns=since_ns if self._live else max(since_ns, ordered.arrival.at_ns),
            until_ns=time.perf_counter_ns(),
            order=ordered.arrival,
            activations=None if arrived is None else arrived.arrival,
        )

    def _perform(self, ordered: Ordered) -> None:
        listener, order = ordered.job.listener, ordered.order
        try:
            if isinstance(order, SequenceUpdates):
                performed = self._update(order)
            elif order.id in self._abandoned:
                performed = self._pass_over(ordered, order)
            else:
                performed = self._step(ordered, order)
        except Exception as error:  # the boundary of the thread: the session ends, not the process
            self._fail(ordered, error)
        else:
            self._post(listener.on_performed, performed)

    def _fail(self, ordered: Ordered, error: Exception) -> None:
        self._forget()
        self._post(ordered.job.listener.on_failure, error)

    def _update(self, updates: SequenceUpdates) -> Performed:
        self._note_starts(updates)
        self._engine.apply(updates)
        self._note_ends(updates)
        return Performed(order=updates, ended_ns=time.perf_counter_ns())

    def _pass_over(self, ordered: Ordered, batch: MicroBatch) -> Performed:
        self._abandoned.remove(batch.id)
        arrived = self._arrived.pop(batch.id, None)
        if batch is not self._prepared:
            self._update(batch.updates)
        self._prepared = None
        ordered.job.performed_id = batch.id
        return Performed(
            order=batch.updates,
            route=ordered.route,
            num_frames_taken=0 if arrived is None else arrived.activations.num_frames,
            ended_ns=time.perf_counter_ns(),
        )

    def _step(self, ordered: Ordered, batch: MicroBatch) -> Performed:
        job, route = ordered.job, ordered.route
        arrived = self._arrived.pop(batch.id) if route.upstream_link else None
        hidden_TH = None if arrived is None else arrived.activations.hidden_TH
        ready_ns = ordered.arrival.at_ns
        if arrived is not None:
            ready_ns = max(ready_ns, arrived.arrival.at_ns)
        self._prepared = None
        self._note_starts(batch.updates)
        starved, self._starved = self._starved, NOT_STARVED
        started_ns, started_cpu_ns = time.perf_counter_ns(), time.thread_time_ns()
        job.began_ns = started_ns
        result = self._engine.step(batch, hidden_TH)
        self._note_ends(batch.updates)
        ended_ns, cpu_ns = time.perf_counter_ns(), time.thread_time_ns() - started_cpu_ns
        requests = self._encode(job, route.outlet, batch, result)
        sampled = _answer(batch, result) if route.answers else None
        encoded_ns = time.perf_counter_ns()
        num_sent = _send_now(job, route.outlet, requests, sampled)
        sent_ns = time.perf_counter_ns()
        job.began_ns, job.performed_id = 0, batch.id
        return Performed(
            order=batch,
            route=route,
            requests=requests,
            sampled=sampled,
            num_sent=num_sent,
            num_frames_taken=0 if arrived is None else arrived.activations.num_frames,
            compute_ns=ended_ns - started_ns,
            wait_ns=max(0, started_ns - ready_ns),
            stolen_ns=max(0, ended_ns - started_ns - cpu_ns),
            starved=starved,
            serialise_ns=encoded_ns - ended_ns,
            send_ns=sent_ns - encoded_ns,
            ended_ns=encoded_ns,
        )

    def _encode(
        self, job: Job, outlet: Outlet | None, batch: MicroBatch, result: StepResult
    ) -> list[stage_pb2.ActivateRequest]:
        if outlet is None or outlet.is_broken or result.hidden_TH is None:
            return []
        requests = encode_frames(
            result.hidden_TH,
            link_id=outlet.link_id,
            micro_batch_id=batch.id,
            first_sequence_number=outlet.num_emitted,
            codec=job.codec,
        )
        outlet.num_emitted += len(requests)
        for request in requests:
            request.frame.sent_unix_ns = time.time_ns()
        return requests

    def _note_starts(self, updates: SequenceUpdates) -> None:
        """Remembers which sequences the engine may hold, so that all of them can be dropped."""
        self._live.update(start.slot for start in updates.starts)

    def _note_ends(self, updates: SequenceUpdates) -> None:
        """Forgets those that have ended: not before they have, since an update may be refused."""
        started = {start.slot for start in updates.starts}
        self._live.difference_update(slot for slot in updates.ended_slots if slot not in started)

    def _begin(self, job: Job) -> None:
        self._forget()
        self._job = job
        self._post(job.listener.on_opened)

    def _forget(self) -> None:
        """Drops orders, activations and sequences."""
        self._job = None
        self._orders.clear()
        self._arrived.clear()
        self._abandoned.clear()
        self._prepared = None
        self._starved = NOT_STARVED
        for slot in self._live:
            try:
                self._engine.apply(SequenceUpdates(ended_slots=(slot,)))
            except ProtocolViolation:  # what would have started it was refused, or what came after
                continue
        self._live.clear()


def _id_of(ordered: Ordered) -> int | None:
    return ordered.order.id if isinstance(ordered.order, MicroBatch) else None


def _answer(batch: MicroBatch, result: StepResult) -> SampledTokens:
    """What the coordinator hears: that it is done, where nothing was sampled."""
    return result.sampled or SampledTokens(micro_batch_id=batch.id, token_ids=())


def _send_now(
    job: Job,
    outlet: Outlet | None,
    requests: list[stage_pb2.ActivateRequest],
    sampled: SampledTokens | None,
) -> int | None:
    """Sends what goes over shortcuts; see `Performed.num_sent`."""
    if sampled is not None:
        return 0 if job.listener.answer_now(sampled) else None
    return outlet.send_now(requests) if outlet is not None and requests else None
