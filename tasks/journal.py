"""The journal of a promotion: what was begun, found and agreed, beside the traffic; enough to go on after any death.

One line is written before each step and after each verdict, and a last one when traffic and registry agree again.
MLflow's run is the record that people read; this is what is true while a promotion is under way.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from deployments.target import Entry, Fence, ServingTarget
from validations.approval import Asked, Ballot
from validations.promotion import Phase, Promotion
from validations.verdict import Verdict

BEGIN, STEP, CUT_OVER, VERDICT, END = "begin", "step", "cut-over", "verdict", "end"
ASK, BALLOT, HOLD, TAKEN_UP = "ask", "ballot", "hold", "taken up"
PROMOTION, ROLLBACK, BY_HAND = "promotion", "rollback", "by hand"


@dataclass(frozen=True, slots=True)
class Journal:
    """The pen of one promotion, under its fence. Each line is on the disk when its method returns; each raises
    `StaleFence` where somebody else has taken over.
    """

    target: ServingTarget
    fence: Fence
    promotion: str

    def begin(
        self,
        promotion: Promotion,
        policy_text: str,
        previous: str | None,
        tags: Mapping[str, str],
        blamed: Collection[str] = (),
        base: str = "",
        requester: str = "",
    ) -> None:
        """A promotion begins: its policy and the folder `base` of it, who served before, what links to it, which
        versions are quarantined, and who asked for it.
        """
        head = promotion.model_copy(update={"verdicts": ()}).model_dump(mode="json")
        more = {"previous": previous, "tags": dict(tags), "blamed": sorted(blamed), "base": base}
        more["requester"] = requester
        self._write(BEGIN, what=PROMOTION, head=head, policy=policy_text, **more)

    def begin_rollback(self, of: str, to: str, reason: str) -> None:
        """A rollback by hand begins: `to` takes the place of `of`."""
        self._write(BEGIN, what=ROLLBACK, of=of, to=to, reason=reason)

    def begin_by_hand(self, of: str, to: str, reason: str) -> None:
        """Traffic begins to follow the alias champion, which a hand has moved: `to` takes the place of `of`."""
        self._write(BEGIN, what=BY_HAND, of=of, to=to, reason=reason)

    def step(self, name: str) -> None:
        """A step is about to be performed."""
        self._write(STEP, name=name)

    def cut_over(self, reference: Mapping[str, Any]) -> None:
        """All traffic is about to go to the challenger; `reference` is what the champion did until now."""
        self._write(CUT_OVER, reference=dict(reference))

    def verdict(self, verdict: Verdict) -> None:
        """A step has ended."""
        self._write(VERDICT, verdict=verdict.model_dump(mode="json"))

    def taken_up(self, flow_run: str) -> None:
        """Another flow run than the one that began goes on with it."""
        self._write(TAKEN_UP, flow_run=flow_run)

    def ask(self, asked: Asked) -> None:
        """People are asked."""
        self._write(ASK, asked=asked.model_dump(mode="json"))

    def ballot(self, step: str, ballot: Ballot) -> None:
        """A form was given, of use or not."""
        self._write(BALLOT, step=step, ballot=ballot.model_dump(mode="json"))

    def hold(self, until: datetime | None, why: str) -> None:
        """Nothing more happens before `until` (None: before someone says so)."""
        self._write(HOLD, until=until and until.isoformat(), why=why)

    def end(
        self,
        phase: str,
        champion: str | None,
        previous: str | None,
        digests: Mapping[str, str],
        keep_until: float | None = None,
    ) -> None:
        """Traffic and registry agree: `champion` serves, `previous` did before and stays warm until `keep_until`
        (seconds since the epoch; None: until the next promotion). `digests` are those of their artifacts.
        """
        ends = {"champion": champion, "previous": previous, "keep_until": keep_until}
        self._write(END, phase=phase, digests=dict(digests), **ends)

    def _write(self, kind: str, **data: Any) -> None:
        self.target.write(Entry(self.fence.model, self.promotion, kind, data), self.fence)


@dataclass(frozen=True, slots=True)
class Open:
    """A promotion or rollback that has begun and not ended, as its journal has it.

    `doing` is the step that was being performed; `reference` what the champion did until the cut-over; `held` why
    nothing may happen before `until` (None: before someone says so), where nothing did since; `asked` and `ballots` the
    forms of the approval that comes next; `flow_run` the Prefect flow run that performs it, or did last (empty: none).
    `of`, `to` and `reason` are those of a rollback by hand, or of an alias that a hand has moved (`what` tells): these
    have no `promotion`.
    """

    id: str
    model: str
    began: float
    promotion: Promotion | None = None
    policy_text: str = ""
    previous: str | None = None
    tags: Mapping[str, str] | None = None
    blamed: frozenset[str] = frozenset()
    doing: str | None = None
    reference: Mapping[str, Any] | None = None
    base: str = ""
    requester: str = ""
    flow_run: str = ""
    held: str = ""
    until: datetime | None = None
    asked: Asked | None = None
    ballots: tuple[Ballot, ...] = ()
    what: str = PROMOTION
    of: str = ""
    to: str = ""
    reason: str = ""

    @property
    def waiting(self) -> bool:
        """Whether it waits for a person or for a time: then nobody has to perform it, and it is not left behind."""
        asks = self.promotion is not None and self.promotion.phase is Phase.AWAITING_APPROVAL
        return asks or bool(self.held)


@dataclass(frozen=True, slots=True)
class Agreed:
    """How the last promotion or rollback ended: who serves since, who did before, and their artifacts' digests."""

    promotion: str
    phase: str
    champion: str | None
    previous: str | None
    digests: Mapping[str, str]
    keep_until: float | None
    at: float


def opened(target: ServingTarget, model: str) -> Open | None:
    """What is under way with `model`, or was when its process died; None where everything has ended."""
    lines = [entry for entry in target.journal(model) if entry.kind != END]
    begun = [entry for entry in lines if entry.kind == BEGIN]
    if not begun:
        return None
    first = begun[-1]
    own = [entry for entry in lines if entry.promotion == first.promotion]
    if first.data["what"] != PROMOTION:
        words = {name: first.data[name] for name in ("what", "of", "to", "reason")}
        return Open(first.promotion, model, first.at, **words)
    verdicts = [entry.data["verdict"] for entry in own if entry.kind == VERDICT]
    last = own[-1]
    promotion = Promotion.model_validate({**first.data["head"], "verdicts": verdicts})
    step = promotion.next_step()
    asks = [Asked.model_validate(entry.data["asked"]) for entry in own if entry.kind == ASK]
    asks = [asked for asked in asks if step is not None and asked.subject.step == step.name]
    given = [entry.data["ballot"] for entry in own if entry.kind == BALLOT and step and entry.data["step"] == step.name]
    return Open(
        first.promotion,
        model,
        first.at,
        promotion=promotion,
        policy_text=first.data["policy"],
        previous=first.data["previous"],
        tags=first.data["tags"],
        blamed=frozenset(first.data["blamed"]),
        doing=_doing(own) if last.kind in {STEP, CUT_OVER} else None,
        reference=next((entry.data["reference"] for entry in own if entry.kind == CUT_OVER), None),
        base=first.data.get("base", ""),
        requester=first.data.get("requester", ""),
        flow_run=next((run for run in map(_flow_run, reversed(own)) if run), ""),
        held=last.data["why"] if last.kind == HOLD else "",
        until=datetime.fromisoformat(last.data["until"]) if last.kind == HOLD and last.data["until"] else None,
        asked=asks[-1] if asks else None,
        ballots=tuple(Ballot.model_validate(one) for one in given),
    )


def _flow_run(entry: Entry) -> str:
    data = entry.data
    where: Mapping[str, Any] = {BEGIN: data.get("tags"), ASK: data.get("asked"), TAKEN_UP: data}.get(entry.kind) or {}
    return str(where.get("flow_run", ""))


def _doing(lines: list[Entry]) -> str:
    return next(str(entry.data["name"]) for entry in reversed(lines) if entry.kind == STEP)


def agreed(target: ServingTarget, model: str) -> Agreed | None:
    """How the last promotion or rollback of `model` ended; None where there was none."""
    for entry in reversed(target.journal(model)):
        if entry.kind == END:
            fields = ("phase", "champion", "previous", "digests", "keep_until")
            return Agreed(entry.promotion, **{name: entry.data[name] for name in fields}, at=entry.at)
    return None
