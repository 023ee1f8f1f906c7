"""What a replica has to do, as far as this gateway knows: its last report, and what was routed to it since."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Final

from shoal.engine.load import EngineLoad
from shoal.engine.step_time import StepTime

# Until any replica has reported how fast it is, costs count tokens: this makes them seconds in name only.
NOMINAL: Final = StepTime(base=0.0, per_prefill_token=1e-3, per_decode_token=0.0, per_context_token=0.0)
# A reservation that no report has shown by then is of a call that never reached its replica.
LEASE_S: Final = 10.0
TRUST_MEASURES: Final = 16  # after so many, half of a replica's step time is its own word


@dataclass(slots=True)
class Reservation:
    """A request on its way to a replica, or waiting there for its first token."""

    request_id: str
    num_uncached: int  # prompt tokens that it will compute there
    expires_s: float
    is_reported: bool = False  # a report has shown it: from then on reports tell how far it is


class ReplicaLoad:
    """One replica's work. The plain attributes are what a cost is made of; they are renewed with every change.

    prefills: prompt tokens still to be computed of each request in the last report, made at `reported_s`; from then on
    they are taken to go on at the rate that is known. pending: of those that no report has shown yet.
    terms: what a cost needs of all this, in one value.
    """

    __slots__ = (
        "_num_measured",
        "_report",
        "_reservations",
        "backlog",
        "blocks_per_s",
        "is_known",
        "num_empty_blocks",
        "num_open",
        "num_tokens_routed",
        "pending",
        "prefills",
        "reported_s",
        "room_blocks",
        "seconds_per_token",
        "slot_wait_s",
        "step_s",
        "step_time",
        "terms",
    )

    def __init__(self, now: float) -> None:
        self._report: EngineLoad | None = None
        self._reservations: dict[str, Reservation] = {}
        self._num_measured = 0
        self.reported_s = now
        self.num_tokens_routed = 0
        self.step_time = NOMINAL
        self.is_known = False  # whether the step time is this or another replica's own, not NOMINAL
        self._renew()

    @property
    def measured(self) -> StepTime | None:
        """What the replica itself has reported."""
        return self._report.step_time if self._report is not None else None

    @property
    def report(self) -> EngineLoad | None:
        return self._report

    def apply(self, report: EngineLoad, now: float) -> None:
        """Take in a report that was made at about `now`."""
        known = {request_id for request_id, _ in report.prefills}
        kept = {}
        for request_id, reservation in self._reservations.items():
            if request_id in known:
                reservation.is_reported = True
            elif reservation.is_reported or reservation.expires_s <= now:
                continue  # computed, gone, or never come
            kept[request_id] = reservation
        self._reservations = kept
        self._report = report
        self.reported_s = now
        self._renew()

    def measure(self, own: StepTime, typical: StepTime) -> None:
        """The replica has measured its step time anew; `typical` is the median of all replicas.

        Its first word is of few steps, and a replica that is avoided for it would never say another: by and by the
        replica's own time takes over from the typical one.
        """
        self._num_measured += 1
        share = self._num_measured / (self._num_measured + TRUST_MEASURES)
        mixed = (a + share * (b - a) for a, b in zip(astuple(typical), astuple(own), strict=True))
        self.step_time, self.is_known = StepTime(*mixed), True
        self._renew()

    def assume(self, typical: StepTime) -> None:
        """The replica has measured nothing yet: it is taken for a typical one."""
        self.step_time, self.is_known = typical, True
        self._renew()

    def reserve(self, reservation: Reservation) -> None:
        self._reservations[reservation.request_id] = reservation
        self.num_tokens_routed += reservation.num_uncached
        self._renew()

    def settle(self, request_id: str) -> None:
        """The request has its first token, or is gone."""
        if self._reservations.pop(request_id, None) is not None:
            self._renew()

    def _renew(self) -> None:
        report, time, reserved = self._report, self.step_time, self._reservations
        pending = [r.num_uncached for r in reserved.values() if not r.is_reported]
        if report is None:
            self.prefills = []
            self.num_empty_blocks = 0
            self.room_blocks = 2**31
            self.blocks_per_s = 0.0
            self.step_s = time.base
            self.seconds_per_token = time.per_prefill_token
            self.slot_wait_s = 0.0
            self.num_open = len(pending)
        else:
            # A replica counts what was cached when a request came; what it will find there by then, the router knows.
            self.prefills = [
                remaining if (routed := reserved.get(request_id)) is None else min(remaining, routed.num_uncached)
                for request_id, remaining in report.prefills
            ]
            if report.more_prefill_tokens:
                self.prefills.append(report.more_prefill_tokens)
            self.num_empty_blocks = report.num_empty_blocks
            held = report.num_blocks - report.num_free_blocks
            self.blocks_per_s = report.finished_per_s * held / max(1, report.num_running)  # that are given back
            waiting = report.num_waiting_tokens + sum(pending)
            self.room_blocks = report.num_free_blocks - waiting // report.block_size
            self.step_s = report.decode_s(time)
            self.seconds_per_token = report.prompt_token_s(time)
            self.slot_wait_s = report.slot_wait_s(len(pending))
            self.num_open = report.num_running + report.num_waiting + len(pending)
        self.pending = pending
        self.backlog = sum(self.prefills) + sum(pending)
        self.terms = (
            self.seconds_per_token,
            self.step_s,
            time.per_prefill_token,
            self.slot_wait_s,
            self.room_blocks,
            self.num_empty_blocks,
            self.prefills,
            pending,
        )
