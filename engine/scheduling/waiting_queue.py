"""Requests that wait for admission, in the order they will be tried."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from shoal.engine.config import SchedulingPolicy
from shoal.engine.request import Request, RequestId

OrderKey = tuple[float, float]

OVERTAKE = 8
PRIORITY_TOKENS = 2**18


class WaitingQueue:
    """A heap with O(1) removal. Ties go to the earlier arrival. Nothing has to be sorted again as time passes:

    - "shortest_first": by V + OVERTAKE * R, where V is the prompt tokens to be computed that had arrived before the
      request and R those that it has still to compute itself. Short prompts do not wait behind long ones, and nobody
      starves: what arrives later and goes first has V below V + OVERTAKE * R of the request, so it brings at most
      OVERTAKE times the work of the request itself. (Shortest remaining processing time, Schrage 1968, has the least
      mean wait and no bound; fair queueing's virtual time, Demers et al. 1989, gives it one.) A priority level is worth
      PRIORITY_TOKENS of V.
    - "priority": a request waiting since `a` with priority p has the urgency p - (now - a) / ageing_s, and `now` is the
      same for all, so the order by p * ageing_s + a never changes. A request whose priority is k worse is passed by no
      request that arrives more than k * ageing_s later.
    - "fcfs": by arrival.
    """

    def __init__(self, policy: SchedulingPolicy, ageing_s: float) -> None:
        self.is_shortest_first = policy == "shortest_first"
        self._ageing_s = ageing_s if policy == "priority" else 0.0
        self._heap: list[tuple[OrderKey, int, Request]] = []
        self._waiting: dict[RequestId, Request] = {}
        self._num_pushed = 0
        self._num_arrived = 0
        self.num_tokens = 0  # that the waiting requests have still to compute

    def key(self, request: Request) -> OrderKey:
        """Smaller goes first. Does not change while a request waits, and only falls while it is computed."""
        if self.is_shortest_first:
            turn = request.arrived_after + OVERTAKE * request.num_remaining + PRIORITY_TOKENS * request.priority
            return (turn, request.arrived_after)
        return (request.priority * self._ageing_s + request.arrival_s, request.arrival_s)

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Request]:
        """In no order."""
        return iter(self._waiting.values())

    def get(self, request_id: RequestId) -> Request | None:
        return self._waiting.get(request_id)

    def arrive(self, request: Request, num_tokens: int) -> None:
        """Give a request that will compute `num_tokens` of its prompt its place among all that ever came."""
        request.arrived_after = self._num_arrived
        self._num_arrived += num_tokens

    def push(self, request: Request) -> None:
        assert request.request_id not in self._waiting
        self._num_pushed += 1
        heapq.heappush(self._heap, (self.key(request), self._num_pushed, request))
        self._waiting[request.request_id] = request
        self.num_tokens += request.num_remaining

    def expect(self, request: Request, num_tokens: int) -> None:
        """A waiting request has `num_tokens` known tokens now. Its place stays."""
        self.num_tokens += num_tokens - request.num_expected
        request.num_expected = num_tokens

    def peek(self) -> Request | None:
        while self._heap:
            request = self._heap[0][2]
            if self._waiting.get(request.request_id) is request:
                return request
            heapq.heappop(self._heap)  # removed meanwhile
        return None

    def pop(self) -> Request:
        request = self.peek()
        assert request is not None
        heapq.heappop(self._heap)
        self._forget(request)
        return request

    def remove(self, request_id: RequestId) -> Request | None:
        request = self._waiting.get(request_id)
        if request is not None:
            self._forget(request)
        return request

    def _forget(self, request: Request) -> None:
        del self._waiting[request.request_id]
        self.num_tokens -= request.num_remaining
