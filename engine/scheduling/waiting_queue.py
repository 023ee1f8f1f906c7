"""Requests that wait for admission, in the order they will be tried."""

from __future__ import annotations

import heapq

from shoal.engine.config import SchedulingPolicy
from shoal.engine.request import Request, RequestId

OrderKey = tuple[float, float]


class WaitingQueue:
    """A heap with O(1) removal. Ties go to the earlier arrival.

    Ageing needs no re-sorting: a request waiting since `a` with priority p has the urgency p - (now - a) / ageing_s,
    and `now` is the same for all, so the order by p * ageing_s + a never changes. A request whose priority is k worse
    is passed by no request that arrives more than k * ageing_s later: nobody starves.
    """

    def __init__(self, policy: SchedulingPolicy, ageing_s: float) -> None:
        self._ageing_s = ageing_s if policy == "priority" else 0.0
        self._heap: list[tuple[OrderKey, int, Request]] = []
        self._waiting: dict[RequestId, Request] = {}
        self._num_pushed = 0

    def key(self, request: Request) -> OrderKey:
        """Smaller goes first."""
        return (request.priority * self._ageing_s + request.arrival_s, request.arrival_s)

    def __len__(self) -> int:
        return len(self._waiting)

    def get(self, request_id: RequestId) -> Request | None:
        return self._waiting.get(request_id)

    def push(self, request: Request) -> None:
        assert request.request_id not in self._waiting
        self._num_pushed += 1
        heapq.heappush(self._heap, (self.key(request), self._num_pushed, request))
        self._waiting[request.request_id] = request

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
        del self._waiting[request.request_id]
        return request

    def remove(self, request_id: RequestId) -> Request | None:
        return self._waiting.pop(request_id, None)
