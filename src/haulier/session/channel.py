"""One channel: messages cut into numbered frames at one end, put together in order at the other.

The number of a frame is all that identifies it: it may arrive on any path, any number of times, in any order.
Credit bounds what the receiver must hold. A frame costs its payload and `FRAME_COST`, so that floods of
tiny messages are bounded too.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from haulier.errors import Corrupt
from haulier.session.frames import END

FRAME_COST: Final = 64
"""What a frame costs in credit besides its payload."""
_LEAST_CUT: Final = 4096


class OutFrame:
    """A frame that was cut and is not acknowledged. It keeps its number and bounds for ever."""

    __slots__ = ("acked", "channel", "flags", "number", "payload", "size", "urgent", "waiting")

    def __init__(self, channel: int, number: int, flags: int, payload: memoryview, urgent: bool) -> None:
        self.channel = channel
        self.number = number
        self.flags = flags
        self.payload = payload
        self.size = len(payload)
        self.urgent = urgent
        self.acked = False
        self.waiting = False  # in the queue of frames to be sent again


class Outbox:
    """Sending half of a channel."""

    def __init__(self, channel: int, credit: int) -> None:
        self.channel = channel
        self.unsent = 0
        """Payload bytes not cut yet."""
        self.unacked = 0
        """Payload bytes not acknowledged, whether cut or not."""
        self.urgent = 0
        """Urgent messages not wholly cut; while there is one, all of the channel before it is urgent as well."""
        self._queue: deque[tuple[memoryview, bool]] = deque()
        self._offset = 0
        self._next = 0
        self._spent = 0
        self._credit = credit
        self._frames: dict[int, OutFrame] = {}

    def push(self, payload: bytes, urgent: bool) -> None:
        """Queue a message."""
        self._queue.append((memoryview(payload), urgent))
        self.unsent += len(payload)
        self.unacked += len(payload)
        self.urgent += urgent

    @property
    def idle(self) -> bool:
        """Nothing left to cut."""
        return not self._queue

    @property
    def settled(self) -> bool:
        """Nothing left to cut, nothing outstanding."""
        return not self._queue and not self._frames

    def sendable(self) -> bool:
        """There is something to cut and credit for it."""
        if not self._queue:
            return False
        left = len(self._queue[0][0]) - self._offset
        return self._credit - self._spent >= min(left, _LEAST_CUT) + FRAME_COST

    def cut(self, most: int) -> OutFrame:
        """The next frame, of at most `most` payload bytes; only when `sendable()`."""
        message, urgent = self._queue[0]
        size = min(most, len(message) - self._offset, self._credit - self._spent - FRAME_COST)
        end = self._offset + size
        last = end == len(message)
        frame = OutFrame(self.channel, self._next, END if last else 0, message[self._offset : end], self.urgent > 0)
        if last:
            self._queue.popleft()
            self._offset = 0
            self.urgent -= urgent
        else:
            self._offset = end
        self._frames[self._next] = frame
        self._next += 1
        self._spent += size + FRAME_COST
        self.unsent -= size
        return frame

    def acknowledge(self, frame: OutFrame) -> bool:
        """The peer has `frame`; False if that was known."""
        if frame.acked:
            return False
        frame.acked = True
        del self._frames[frame.number]
        self.unacked -= frame.size
        frame.payload = memoryview(b"")
        return True

    def state(self, received: int, credit: int) -> None:
        """The peer has every frame below `received` and grants `credit` in all. Raises Corrupt."""
        if received > self._next:
            raise Corrupt(
                f"the peer acknowledges frame {received} of channel {self.channel}, of {self._next} sent: "
                "the session is of no use any more; start the handoff again"
            )
        self._credit = max(self._credit, credit)
        while self._frames:
            number = next(iter(self._frames))
            if number >= received:
                break
            self.acknowledge(self._frames[number])


class Inbox:
    """Receiving half of a channel."""

    def __init__(self, channel: int, window: int, max_message: int) -> None:
        self.channel = channel
        self.next = 0
        """Every frame below this number has been received."""
        self.granted = window
        """Credit that the peer was told."""
        self._window = window
        self._max_message = max_message
        self._early: dict[int, tuple[int, bytes]] = {}
        self._parts: list[bytes] = []
        self._partial = 0
        self._partial_cost = 0
        self._cost = 0
        self._consumed = 0
        self._ready: deque[tuple[bytes, int]] = deque()

    def accept(self, number: int, flags: int, payload: bytes) -> bool:
        """Take a frame; True if it completed a message. A frame that is here already is dropped. Raises Corrupt."""
        if number < self.next or number in self._early:
            return False
        self._cost += len(payload) + FRAME_COST
        if self._cost > self.granted:
            raise Corrupt(
                f"the peer sent more on channel {self.channel} than it had credit for: "
                "the session is of no use any more; start the handoff again"
            )
        if number != self.next:
            self._early[number] = flags, payload
            return False
        completed = self._append(flags, payload)
        while self._early and (early := self._early.pop(self.next, None)) is not None:
            completed |= self._append(*early)
        return completed

    def _append(self, flags: int, payload: bytes) -> bool:
        self.next += 1
        self._parts.append(payload)
        self._partial += len(payload)
        self._partial_cost += len(payload) + FRAME_COST
        # Honest frames carry 4 KiB or end a message; empty ones without end must not pile up for nothing.
        if self._partial > self._max_message or self._partial_cost > self._max_message * 33 // 32 + 4 * FRAME_COST:
            raise Corrupt(
                f"the peer sent a message of more than {self._max_message} bytes on channel {self.channel}: "
                "the session is of no use any more; start the handoff again"
            )
        if not flags & END:
            return False
        message = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._ready.append((message, self._partial_cost))
        self._parts = []
        self._partial = self._partial_cost = 0
        return True

    @property
    def ready(self) -> int:
        """Whole messages waiting."""
        return len(self._ready)

    def pop(self) -> tuple[bytes, int] | None:
        """The next message and its cost, to be given to `consumed` once it has been dealt with."""
        return self._ready.popleft() if self._ready else None

    def consumed(self, cost: int) -> None:
        """A message was dealt with: its room is free again."""
        self._consumed += cost

    def grant(self, *, always: bool = False) -> bool:
        """Bring `granted` up to date; True if it rose enough to tell the peer (or `always`)."""
        # The message being put together does not count: it may be larger than the window, and is bounded on its own.
        credit = self._consumed + self._partial_cost + self._window
        if not always and credit - self.granted < self._window // 4:
            return False
        self.granted = max(self.granted, credit)
        return True
