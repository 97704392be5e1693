"""How a source passes the token: from the grant on it never runs the guest again, unless the target refuses."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Protocol

from haulier.errors import HandoffFailed, HaulierError, PeerError
from haulier.handoff.control import Control
from haulier.handoff.custody import Happened, happen
from haulier.handoff.journal import Journal
from haulier.handoff.messages import AnyMessage, Job, Own, Running
from haulier.handoff.ownership import Action, Event, State

RESTART_S = 5.0
"""How long an agent may take to start again."""
AGENT_S = 30.0
"""How long the target's agent is asked, when its worker is not heard; after that the agents ask each other."""


class OwnPeer(Protocol):
    """The target's agent, as far as ownership goes."""

    def own(self, guest: str, event: str, epoch: int, handoff: str = "") -> list[tuple[str, int]]: ...


class Token:
    """A source's part of the ownership table, in one handoff."""

    def __init__(self, journal: Journal, job: Job, here: str, peer: OwnPeer, left_alone: threading.Event) -> None:
        self._journal, self._job, self._here, self._peer = journal, job, here, peer
        self._left_alone = left_alone
        self.epoch = 0
        """The epoch that the guest gets with the target's taking it; 0 before `begin`."""
        self.granted = False
        self.refused = False
        self.serving = False
        """The target runs the guest, and still needs the memory here."""

    @property
    def passed(self) -> bool:
        """The guest is not this site's any more, as far as this worker knows."""
        return self.granted and not self.refused

    def begin(self) -> int:
        """The handoff begins: durable. The epoch that is to come; HandoffFailed where the guest is in another one."""
        job = self._job
        happened = happen(self._journal, job.guest, Event.BEGIN, decided=True, changes={"handoff": job.handoff})
        self.epoch = happened.after.pending
        self._journal.update_handoff(job.handoff, epoch=self.epoch)
        return self.epoch

    def grant(self, control: Control) -> None:
        """From here on this site never runs the guest again, unless the target refuses."""
        happened = happen(self._journal, self._job.guest, Event.GRANT, decided=True)
        self.granted = True
        _send(control, happened)

    def take_up(self, epoch: int) -> None:
        """The token was granted by an earlier worker of this handoff, and the target runs the guest."""
        self.epoch, self.granted, self.serving = epoch, True, True

    def settle(
        self, control: Control, running: Callable[[float], None], other: Callable[[AnyMessage], None] = lambda _: None
    ) -> None:
        """Waits until the target has taken it, whatever of the two is still heard; `running`: when its guest ran.

        HandoffFailed when it refused, or when nobody there is heard for so long that the agents have to go on asking:
        at once if the target still needs the memory here, for then new workers have to be started. `other` takes what
        else the target's worker says.
        """
        job = self._job
        while True:
            try:
                news = control.next(1.0)
                if isinstance(news, Exception):
                    raise news
                if news is None and self._left_alone.is_set():
                    raise PeerError("its worker is gone")
            except HaulierError as error:
                if self.serving:
                    raise HandoffFailed(
                        f"the rest of the memory of {job.guest!r}, which runs at site {job.peer!r}, does not get "
                        f"through ({error}); the agents start workers that go on with it"
                    ) from error
                if not self._ask_agent(control):
                    raise HandoffFailed(
                        f"the token for {job.guest!r} is on its way to site {job.peer!r}, which is not heard "
                        f"({error}); the agents go on asking, 'haulier status' shows the result"
                    ) from error
                return
            if news is None:
                _send(control, happen(self._journal, job.guest, Event.RETRY))
            elif isinstance(news, Running):
                running(news.at - control.clock_offset)
            elif isinstance(news, Own):
                if self._settled(control, Event(news.event), news.epoch):
                    return
            elif not isinstance(news, str):
                other(news)

    def call_off(self, control: Control | None) -> None:
        """The handoff failed before the grant: durable, and told to the worker there, if there is one."""
        happened = happen(self._journal, self._job.guest, Event.FAIL)
        if control is not None:
            _send(control, happened)

    def tell_agent(self, patience_s: float) -> str:
        """Calls the handoff off by way of the target's agent too; "" when it knows, or why it cannot be told.

        An agent that did not answer the offer may have taken it, and may just be starting again.
        """
        deadline = time.monotonic() + patience_s
        while True:
            try:
                self._peer.own(self._job.guest, Event.ABORT.value, self.epoch, self._job.handoff)
                return ""
            except HaulierError as error:
                if time.monotonic() > deadline:
                    return str(error)
            time.sleep(0.25)

    def _settled(self, control: Control, event: Event, epoch: int) -> bool:
        job = self._job
        changes = {"owner": job.peer, "wanted": ""} if event in (Event.TOOK, Event.FILLING) else None
        happened = happen(self._journal, job.guest, event, epoch, changes=changes)
        self.serving = happened.after.state is State.SERVING
        _send(control, happened)
        if Action.RETIRE in happened.actions:
            return True
        if Action.RESUME in happened.actions:
            self.refused = True
            raise HandoffFailed(
                f"site {job.peer!r} refused the token; guest {job.guest!r} belongs to {self._here!r} again"
            )
        return False

    def _ask_agent(self, control: Control) -> bool:
        """The session is gone with the token on its way: asks the target's agent for a while."""
        deadline = time.monotonic() + AGENT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(PeerError):
                job = self._job
                for event, epoch in self._peer.own(job.guest, Event.TOKEN.value, self.epoch, job.handoff):
                    if self._settled(control, Event(event), epoch):
                        return True
            time.sleep(0.5)
        return False


def _send(control: Control, happened: Happened) -> None:
    for event, epoch in happened.messages():
        with contextlib.suppress(PeerError):
            control.own(event, epoch)
