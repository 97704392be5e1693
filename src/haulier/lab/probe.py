"""What a client of the guest sees: asks the workload all the time and writes down every answer.

Two kinds of asking at once: a fresh TCP connection every `interval_s`, many in flight, as new clients would come; and
one connection that is kept, as a client in the middle of something. Each answer is verified: the right hash of the
right number, the same guest as before, and a counter that never falls behind what an answer before the question said
(so that a guest which runs twice, or runs an older state, is found out).

The file is JSON lines, CLOCK_REALTIME stamps in seconds: ``{"kind": "fresh" | "kept", "asked": t, "answered": t}``
with "wrong": why, where the answer was wrong, or "failed": why, in place of "answered".

    python -m haulier.lab.probe HOST[:PORT] --out FILE      until SIGTERM or Ctrl-C; prints a summary as JSON
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import itertools
import json
import random
import signal
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Final, Literal

from haulier.errors import HaulierError, UsageError
from haulier.lab.workload import PORT

INTERVAL_S: Final = 0.05
FRESH_TIMEOUT_S: Final = 3.0
KEPT_TIMEOUT_S: Final = 60.0
"""How long the kept connection waits for an answer: it is there to show that it survives."""
MAX_IN_FLIGHT: Final = 100

Kind = Literal["fresh", "kept"]


@dataclass(frozen=True)
class Asked:
    """One question: when it was asked, and what became of it. Exactly one of `answered` and `failed` is given."""

    kind: Kind
    asked: float
    answered: float | None = None
    wrong: str = ""
    failed: str = ""

    def line(self) -> str:
        return json.dumps({name: value for name, value in asdict(self).items() if value not in (None, "")}) + "\n"

    @classmethod
    def parse(cls, line: str) -> Asked:
        """The inverse of `line`. Raises UsageError for anything else."""
        try:
            found = cls(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise UsageError(f"not a line of a probe's file ({error}): {line[:80]!r}") from None
        return found


class Verifier:
    """Judges answers in the order in which they come."""

    def __init__(self) -> None:
        self.guest: str | None = None
        self.counter = 0
        """The highest counter of any answer so far."""

    def judge(self, n: int, counter_then: int, line: bytes) -> str:
        """Why the answer to `n` is wrong, "" when it is right; `counter_then` = `counter` when it was asked."""
        try:
            answer = json.loads(line)
            hash_, guest, counter = answer["sha256"], answer["guest"], answer["counter"]
        except (ValueError, TypeError, KeyError):
            return f"not an answer: {line[:80]!r}"
        if hash_ != hashlib.sha256(str(n).encode()).hexdigest():
            return f"wrong hash of {n}"
        if not isinstance(counter, int) or counter <= counter_then:
            return f"counter went back: {counter} after {counter_then}"
        self.counter = max(self.counter, counter)
        if self.guest is None:
            self.guest = guest
        return "" if guest == self.guest else f"{guest} answered in place of {self.guest}"


@dataclass(frozen=True)
class Summary:
    """A probe's file in figures. Times in seconds of CLOCK_REALTIME."""

    answers: int
    wrong: int
    failed: int
    longest_gap_ms: float
    """Between two answers that followed each other, or since the last one; 0 with fewer than one answer."""
    gap_began: float | None
    kept_lost: int
    """How often the kept connection broke."""
    first_wrong: list[str] = field(default_factory=list)


def summarize(asked: Iterable[Asked]) -> Summary:
    """Figures of a whole file, in any order."""
    known = list(asked)
    times = sorted(one.answered for one in known if one.answered is not None)
    gaps = [(after - before, before) for before, after in itertools.pairwise(times)]
    longest, began = max(gaps, default=(0.0, None))
    wrong = [one.wrong for one in known if one.wrong]
    return Summary(
        answers=len(times),
        wrong=len(wrong),
        failed=sum(1 for one in known if one.failed),
        longest_gap_ms=round(longest * 1e3, 1),
        gap_began=began,
        kept_lost=sum(1 for one in known if one.failed and one.kind == "kept"),
        first_wrong=wrong[:5],
    )


def first_after(asked: Iterable[Asked], moment: float) -> float | None:
    """When the first right answer came to a question asked at or after `moment`; None = not yet.

    A question from before does not count: the guest may have answered it before the moment.
    """
    times = (one.answered for one in asked if one.asked >= moment and one.answered is not None and not one.wrong)
    return min(times, default=None)


def read(file: Path) -> Iterator[Asked]:
    """The lines of a probe's file, also while it is being written (a last line that is not whole is left out)."""
    with file.open() as lines:
        for line in lines:
            if line.endswith("\n"):
                yield Asked.parse(line)


class Probe:
    """Asks until `stop`; `out` gets each line as soon as its question is decided."""

    def __init__(self, host: str, port: int, out: IO[str], interval_s: float = INTERVAL_S) -> None:
        self._address = (host, port)
        self._out = out
        self._interval_s = interval_s
        self._verifier = Verifier()
        self._random = random.Random()
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """End `run` soon; call it in the loop's own thread."""
        self._stopping.set()

    async def run(self) -> None:
        kept = asyncio.create_task(self._keep_asking())
        flying: set[asyncio.Task[None]] = set()
        loop = asyncio.get_running_loop()
        due = loop.time()
        try:
            while not self._stopping.is_set():
                if len(flying) < MAX_IN_FLIGHT:
                    task = asyncio.create_task(self._ask_fresh())
                    flying.add(task)
                    task.add_done_callback(flying.discard)
                # A machine that was busy for a while does not make up for it with a burst.
                due = max(due + self._interval_s, loop.time())
                await self._pause(due - loop.time())
        finally:
            tasks = [kept, *flying]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pause(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._stopping.wait(), seconds)
        except TimeoutError:
            pass

    async def _ask_fresh(self) -> None:
        asked = time.time()
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(FRESH_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(*self._address)
                await self._ask("fresh", asked, reader, writer)
        except (OSError, TimeoutError) as error:
            self._note(Asked("fresh", asked, failed=_reason(error)))
        finally:
            if writer is not None:
                writer.close()

    async def _keep_asking(self) -> None:
        while not self._stopping.is_set():
            asked = time.time()
            writer: asyncio.StreamWriter | None = None
            try:
                async with asyncio.timeout(FRESH_TIMEOUT_S):
                    reader, writer = await asyncio.open_connection(*self._address)
                while not self._stopping.is_set():
                    asked = time.time()
                    async with asyncio.timeout(KEPT_TIMEOUT_S):
                        await self._ask("kept", asked, reader, writer)
                    await self._pause(self._interval_s)
            except (OSError, TimeoutError) as error:
                if writer is not None:
                    self._note(Asked("kept", asked, failed=_reason(error)))
                await self._pause(self._interval_s)
            finally:
                if writer is not None:
                    writer.close()

    async def _ask(self, kind: Kind, asked: float, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        n, counter_then = self._random.getrandbits(48), self._verifier.counter
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        writer.write(json.dumps({"cmd": "ask", "n": n}).encode() + b"\n")
        line = await reader.readline()
        answered = time.time()
        if not line.endswith(b"\n"):
            raise ConnectionResetError("closed without an answer")
        self._note(Asked(kind, asked, answered=answered, wrong=self._verifier.judge(n, counter_then, line)))

    def _note(self, one: Asked) -> None:
        self._out.write(one.line())
        self._out.flush()


def _reason(error: BaseException) -> str:
    return "no answer in time" if isinstance(error, TimeoutError) else str(error) or type(error).__name__


async def _until_told(probe: Probe) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, probe.stop)
    await probe.run()


async def _main(host: str, port: int, out: Path, interval_s: float) -> None:
    with out.open("a") as file:
        await _until_told(Probe(host, port, file, interval_s))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m haulier.lab.probe", description="Ask a guest of the lab all the time."
    )
    parser.add_argument("address", help=f"HOST or HOST:PORT (port {PORT} by default)")
    parser.add_argument("--out", type=Path, required=True, help="file for the JSON lines; appended to")
    parser.add_argument("--interval", type=float, default=INTERVAL_S, help="seconds between fresh connections")
    parser.add_argument("--after", type=float, help="only print the first answer after this moment, from the file")
    args = parser.parse_args(arguments)
    host, _, port = args.address.partition(":")
    try:
        if args.after is not None:
            print(json.dumps({"first_answer": first_after(read(args.out), args.after)}))
            return 0
        asyncio.run(_main(host, int(port or PORT), args.out, args.interval))
        print(json.dumps(asdict(summarize(read(args.out)))))
    except HaulierError as error:
        print(f"probe: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def summary_dict(file: Path) -> dict[str, Any]:
    """`summarize` of a probe's file, as a dictionary."""
    return asdict(summarize(read(file)))


if __name__ == "__main__":
    sys.exit(main())
