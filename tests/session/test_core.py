"""The core over simulated links: exactly once and in order whatever breaks, links filled, queues short."""

from __future__ import annotations

import itertools
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haulier.errors import Corrupt, PeerError, UsageError
from haulier.session.channel import FRAME_COST
from haulier.session.core import SessionCore, State
from haulier.session.frames import ABORT, END, Frame, FrameReader, Kind
from haulier.session.settings import Settings
from haulier.units import MIB
from tests.support.wan import Link, Wan

MBPS = 125_000.0
SLOW = Link(rate=10 * MBPS, delay=0.025)


def pattern(n: int, size: int) -> bytes:
    return (n.to_bytes(4, "big") * (size // 4 + 1))[:size]


def by_channel(messages: list[tuple[int, bytes]]) -> dict[int, list[bytes]]:
    found: dict[int, list[bytes]] = defaultdict(list)
    for channel, message in messages:
        found[channel].append(message)
    return dict(found)


# (channel, size, urgent): sent in waves over the first seconds, while the faults happen
messages = st.lists(
    st.tuples(st.integers(0, 4), st.one_of(st.integers(0, 60_000), st.just(100_000)), st.booleans()),
    min_size=5,
    max_size=80,
)
faults = st.lists(
    st.tuples(
        st.sampled_from(["cut", "outage", "slow consumer", "crawl"]),
        st.integers(0, 2),
        st.floats(0, 3),
        st.floats(0.01, 8),
    ),
    min_size=1,
    max_size=12,
)
links = st.lists(
    st.tuples(
        st.sampled_from([0.5, 4.0, 50.0, 800.0]), st.sampled_from([0.001, 0.02, 0.12]), st.sampled_from([0, 0.02])
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=80, deadline=None)
@given(links=links, there=messages, back=messages, faults=faults, seed=st.integers(0, 1000), tells_tcp=st.booleans())
def test_every_message_arrives_once_and_in_order_whatever_breaks(links, there, back, faults, seed, tells_tcp) -> None:
    tight = Settings(max_unsent=100_000, receive_window=60_000, max_message=100_000)
    wan = Wan([Link(rate * MBPS, delay, loss=loss) for rate, delay, loss in links], tight, seed, tells_tcp=tells_tcp)
    for end, batch in ((wan.a, there), (wan.b, back)):
        for n, (channel, size, urgent) in enumerate(batch):
            message = channel, pattern(n, size), urgent
            wan.after(3.0 * (n // 8) / 10, lambda end=end, message=message: end.send(*message))
    for kind, which, start, length in faults:
        key = which % len(links)
        if kind == "cut":
            wan.after(start, lambda key=key, length=length: wan.cut(key, seen_by_b=length / 4))
        elif kind == "outage":
            wan.after(start, lambda key=key: wan.set_up(key, False))
            wan.after(start + length, lambda key=key: wan.set_up(key, True))
        elif kind == "crawl":
            wan.after(start, lambda key=key: setattr(wan.links[key], "rate", 30_000))
        else:
            wan.after(start, lambda which=which: wan.b.blocked.add(which))
            wan.after(start + length, lambda which=which: wan.b.blocked.discard(which))

    def done() -> bool:
        return (
            len(wan.b.got) == len(there)
            and len(wan.a.got) == len(back)
            and not wan.a.core.unacked() + wan.b.core.unacked()
        )

    assert wan.run(done, limit_s=300), (len(wan.b.got), len(there), len(wan.a.got), len(back), wan.a.core.state)
    wan.run(limit_s=0.5)  # nothing may come twice
    for end, batch in ((wan.b, there), (wan.a, back)):
        sent = by_channel([(channel, pattern(n, size)) for n, (channel, size, _) in enumerate(batch)])
        assert by_channel(end.got) == sent
    # Each message counts once at either end, however often it was sent.
    channels = range(len(wan.a.core.payload))
    counted = [sum(size for c, size, _ in [*there, *back] if c == channel) for channel in channels]
    assert wan.a.core.payload == wan.b.core.payload == counted
    wan.a.core.finish()
    assert wan.run(lambda: wan.a.core.state is wan.b.core.state is State.ENDED, limit_s=60)
    assert wan.a.core.error is wan.b.core.error is None


def fill(wan: Wan, seconds: float, size: int = 256 * 1024) -> float:
    """Keep channel 1 busy for `seconds`; the payload rate delivered after the first second, in bytes/s."""

    def more() -> None:
        while len(wan.a.queue) < 4:
            wan.a.send(1, bytes(size))
        wan.after(0.01, more)

    more()
    wan.run(lambda: wan.b.core.up, limit_s=5)
    wan.run(limit_s=1)
    before = received(wan)
    wan.run(limit_s=seconds)
    return (received(wan) - before) / seconds


def received(wan: Wan) -> int:
    return sum(box._cost - box.next * FRAME_COST for box in wan.b.core._inbox)


@pytest.mark.parametrize(
    ("rate", "delay"), [(10 * MBPS, 0.025), (5 * MBPS, 0.1), (50 * MBPS, 0.025), (100 * MBPS, 0.05), (1 * MBPS, 0.01)]
)
@pytest.mark.parametrize("tells_tcp", [True, False])
def test_a_link_is_filled_with_a_short_queue(rate: float, delay: float, tells_tcp: bool) -> None:
    wan = Wan([Link(rate, delay)], tells_tcp=tells_tcp)
    assert fill(wan, 25) >= 0.95 * rate
    (path,) = wan.a.core.paths()
    assert path.rate.peak == pytest.approx(rate, rel=0.05)
    assert path.in_flight <= rate * (2 * delay * 1.6 + 0.004) + 3 * path.frame_limit + 16 * 1024


@pytest.mark.parametrize("tells_tcp", [True, False])
@pytest.mark.parametrize("urgent", [True, False])
def test_a_small_message_overtakes_bulk_within_one_round_trip(urgent: bool, tells_tcp: bool) -> None:
    wan = Wan([Link(10 * MBPS, 0.025)], tells_tcp=tells_tcp)
    fill(wan, 3)
    for _ in range(20):
        sent_at = wan.now
        wan.a.send(2, b"now", urgent)
        got = len(by_channel(wan.b.got).get(2, []))
        assert wan.run(lambda got=got: len(by_channel(wan.b.got).get(2, [])) > got, limit_s=1)
        assert wan.now - sent_at <= 0.025 + 0.050 + 0.020
        wan.run(limit_s=0.037)


def test_urgent_takes_its_own_channel_along_and_keeps_order() -> None:
    wan = Wan([Link(10 * MBPS, 0.025)])
    wan.run(lambda: wan.a.core.up and wan.b.core.up)
    wan.a.send(1, bytes(3 * MIB))
    wan.a.send(2, pattern(1, 50_000))
    wan.a.send(2, pattern(2, 50_000), urgent=True)
    assert wan.run(lambda: len(wan.b.got) == 2, limit_s=2)
    assert wan.b.got == [(2, pattern(1, 50_000)), (2, pattern(2, 50_000))]


def test_channels_share_a_link_fairly() -> None:
    wan = Wan([Link(10 * MBPS, 0.025)])
    for channel in (1, 2, 3):
        for _ in range(40):
            wan.a.send(channel, bytes(100_000))
    assert wan.run(lambda: len(wan.b.got) >= 60, limit_s=60)
    counts = [len(found) for found in by_channel(wan.b.got).values()]
    assert len(counts) == 3
    assert max(counts) - min(counts) <= 2


@pytest.mark.parametrize(
    "links",
    [
        [Link(10 * MBPS, 0.01), Link(10 * MBPS, 0.01)],
        [Link(20 * MBPS, 0.01), Link(5 * MBPS, 0.01)],
        [Link(20 * MBPS, 0.01), Link(10 * MBPS, 0.04)],
    ],
)
def test_paths_add_up(links: list[Link]) -> None:
    wan = Wan([Link(link.rate, link.delay) for link in links])
    assert fill(wan, 10) >= 0.95 * sum(link.rate for link in links)
    assert sum(path.rate.steady for path in wan.a.core.paths()) == pytest.approx(sum(x.rate for x in links), rel=0.08)


def test_a_small_message_takes_the_quicker_path() -> None:
    wan = Wan([Link(10 * MBPS, 0.1), Link(10 * MBPS, 0.01)])
    wan.run(limit_s=1)
    wan.cut(1)  # so that it is the younger one and is asked last
    wan.run(limit_s=1)
    for _ in range(5):
        sent_at, n = wan.now, len(wan.b.got)
        wan.a.send(1, b"x" * 1000)
        assert wan.run(lambda n=n: len(wan.b.got) > n, limit_s=1)
        assert wan.now - sent_at < 0.03


def test_a_path_that_collapses_does_not_take_the_others_with_it() -> None:
    wan = Wan([Link(40 * MBPS, 0.02), Link(20 * MBPS, 0.02)])
    fill(wan, 3)
    wan.links[0].rate = 3 * MBPS
    wan.run(limit_s=2)
    before = received(wan)
    wan.run(limit_s=5)
    assert (received(wan) - before) / 5 >= 0.93 * 23 * MBPS
    wan.links[0].rate = 40 * MBPS
    wan.run(limit_s=2)
    before = received(wan)
    wan.run(limit_s=5)
    assert (received(wan) - before) / 5 >= 0.93 * 60 * MBPS


def carried(wan: Wan, key: int) -> int:
    """Bytes of data that both ends put on a path."""
    return sum(end.core.path(key).sent_bytes for end in (wan.a, wan.b))


def test_a_dear_path_carries_nothing_until_it_may() -> None:
    wan = Wan([Link(10 * MBPS, 0.02), Link(20 * MBPS, 0.01, cost=2)])
    assert fill(wan, 5) >= 0.95 * 10 * MBPS
    wan.b.send(2, bytes(100_000))
    assert wan.run(lambda: len(wan.a.got) == 1, limit_s=2)
    assert carried(wan, 1) == 0, "neither end uses it: the listener was told"
    for cost in (1, 2):
        wan.a.core.may_spend(cost, wan.now)
        wan.run(limit_s=2)
        assert (carried(wan, 1) > 0) is (cost == 2)
    before = received(wan)
    wan.run(limit_s=5)
    assert (received(wan) - before) / 5 >= 0.93 * 30 * MBPS
    wan.a.core.may_spend(0, wan.now)
    wan.run(limit_s=1)
    before = carried(wan, 1)
    wan.run(limit_s=3)
    assert carried(wan, 1) == before, "in reserve again"


def test_a_dear_path_stands_in_while_no_cheaper_one_works() -> None:
    wan = Wan([Link(10 * MBPS, 0.02), Link(5 * MBPS, 0.02, cost=1)])
    fill(wan, 3)
    wan.set_up(0, False)
    wan.run(limit_s=2)
    before = received(wan)
    wan.run(limit_s=4)
    assert (received(wan) - before) / 4 >= 0.9 * 5 * MBPS
    wan.set_up(0, True)
    wan.run(limit_s=3)
    before = carried(wan, 1)
    wan.run(limit_s=3)
    assert carried(wan, 1) == before, "the cheap one is back"


def test_a_longer_way_is_noticed() -> None:
    """A route that becomes three times as long must not strangle the window."""
    wan = Wan([Link(20 * MBPS, 0.01)])
    fill(wan, 3)
    wan.links[0].delay = 0.06
    wan.run(limit_s=4)
    before = received(wan)
    wan.run(limit_s=5)
    assert (received(wan) - before) / 5 >= 0.9 * 20 * MBPS


@pytest.mark.parametrize("tells_tcp", [True, False])
def test_jitter_does_not_strangle_a_path(tells_tcp: bool) -> None:
    wan = Wan([Link(20 * MBPS, 0.01, jitter=0.01)], tells_tcp=tells_tcp)
    assert fill(wan, 20) >= 0.93 * 20 * MBPS


@pytest.mark.parametrize(("sleepy", "tells_tcp"), [(0.02, False), (0.06, False), (0.06, True)])
def test_a_busy_peer_does_not_strangle_a_path(sleepy: float, tells_tcp: bool) -> None:
    """Two processors and two guests under emulation: the peer's thread gets its turn late, again and again."""
    wan = Wan([Link(10 * MBPS, 0.025)], tells_tcp=tells_tcp)
    wan.b.sleepy = sleepy
    assert fill(wan, 20) >= 0.93 * 10 * MBPS
    assert sum(path.rate.steady for path in wan.a.core.paths()) == pytest.approx(10 * MBPS, rel=0.15)


@pytest.mark.parametrize("tells_tcp", [True, False])
def test_losses_do_not_strangle_a_path(tells_tcp: bool) -> None:
    wan = Wan([Link(20 * MBPS, 0.025, loss=0.005)], tells_tcp=tells_tcp)
    assert fill(wan, 20) >= 0.9 * 20 * MBPS


def test_a_long_fat_link_is_filled_soon() -> None:
    wan = Wan([Link(100 * MBPS, 0.1)])
    assert fill(wan, 3) >= 0.8 * 100 * MBPS


def test_what_hangs_on_a_silent_path_goes_another_way() -> None:
    wan = Wan([Link(10 * MBPS, 0.02), Link(10 * MBPS, 0.02)])
    fill(wan, 3)
    wan.set_up(1, False)
    wan.run(limit_s=1.2)
    n = len(wan.b.got)
    assert wan.run(lambda: len(wan.b.got) > n + 4, limit_s=1.3), "messages complete although the path is not dead yet"
    assert len(list(wan.a.core.paths())) == 2
    before, at = received(wan), wan.now
    wan.run(limit_s=5)
    assert (received(wan) - before) / (wan.now - at) >= 0.93 * 10 * MBPS
    wan.set_up(1, True)
    wan.run(limit_s=3)
    before, at = received(wan), wan.now
    wan.run(limit_s=3)
    assert (received(wan) - before) / (wan.now - at) >= 0.93 * 20 * MBPS


def test_a_total_outage_of_20_s_costs_one_window() -> None:
    wan = Wan([Link(10 * MBPS, 0.025), Link(10 * MBPS, 0.025)])
    wan.a.send(1, pattern(1, 8 * MIB))
    wan.run(limit_s=2)
    for key in (0, 1):
        wan.set_up(key, False)
    wan.run(limit_s=20)
    assert wan.a.core.error is None
    for key in (0, 1):
        wan.set_up(key, True)
    assert wan.run(lambda: len(wan.b.got) == 1, limit_s=2 + 8 * MIB / (20 * MBPS))
    assert wan.b.got == [(1, pattern(1, 8 * MIB))]


def test_an_outage_beyond_the_limit_is_an_error_at_both_ends() -> None:
    wan = Wan([Link(10 * MBPS, 0.025)], Settings(outage_limit_s=30))
    wan.a.send(1, bytes(MIB))
    wan.run(limit_s=0.5)
    wan.set_up(0, False)
    wan.run(limit_s=30)
    assert wan.a.core.error is None
    wan.run(limit_s=10)
    for end in (wan.a, wan.b):
        assert isinstance(end.core.error, PeerError)
        assert "no path to site" in str(end.core.error)
        with pytest.raises(PeerError):
            end.core.send(1, b"x")


def test_the_limit_counts_from_the_start_when_nobody_ever_comes() -> None:
    core = SessionCore(Settings(), "site b", 0.0)
    core.tick(119.0)
    assert core.error is None
    core.tick(120.5)
    assert isinstance(core.error, PeerError)


def test_a_callback_that_blocks_holds_up_its_own_channel_only() -> None:
    wan = Wan([Link(100 * MBPS, 0.005)])
    wan.b.blocked.add(1)
    for n in range(40):
        wan.a.send(1, pattern(n, MIB))
    wan.run(limit_s=5)
    held = wan.b.core._inbox[1]._cost
    assert Settings().receive_window - MIB < held <= Settings().receive_window + 16 * MIB
    wan.a.send(2, b"through")
    assert wan.run(lambda: wan.b.got == [(2, b"through")], limit_s=1)
    assert wan.run(lambda: wan.a.core.unacked(2) == 0, limit_s=1)
    wan.b.blocked.clear()
    assert wan.run(lambda: len(wan.b.got) == 41, limit_s=10)


def test_a_message_may_be_larger_than_the_window() -> None:
    wan = Wan([Link(1000 * MBPS, 0.001)])
    wan.a.send(1, pattern(1, 16 * MIB))
    wan.a.send(1, pattern(2, 16 * MIB))
    assert wan.run(lambda: len(wan.b.got) == 2, limit_s=10)


def test_floods_of_empty_messages_are_bounded() -> None:
    wan = Wan([Link(1000 * MBPS, 0.001)])
    wan.b.blocked.add(1)
    wan.run(lambda: wan.a.core.up)
    for _ in range(200_000):
        wan.a.core.send(1, b"")
    wan.run(limit_s=3)
    assert wan.b.core.ready(1) <= Settings().receive_window // FRAME_COST


def test_goodbye_waits_for_all_and_is_clean_on_both_sides() -> None:
    wan = Wan([Link(10 * MBPS, 0.025), Link(2 * MBPS, 0.1)])
    wan.a.core.send(1, pattern(1, 2 * MIB))
    wan.a.core.finish()
    with pytest.raises(PeerError, match="has ended"):
        wan.a.core.send(1, b"more")
    assert wan.run(lambda: wan.b.core.state is State.ENDED, limit_s=10)
    assert wan.b.got == [(1, pattern(1, 2 * MIB))]
    assert wan.run(lambda: wan.a.core.state is State.ENDED, limit_s=1)
    assert wan.a.core.error is wan.b.core.error is None


def test_both_may_say_goodbye_at_once() -> None:
    wan = Wan([Link(10 * MBPS, 0.025)])
    wan.run(lambda: wan.a.core.up and wan.b.core.up)
    wan.a.core.finish()
    wan.b.core.finish()
    assert wan.run(lambda: wan.a.core.state is wan.b.core.state is State.ENDED, limit_s=1)


def test_a_goodbye_while_this_side_still_sends_is_an_error_here() -> None:
    wan = Wan([Link(1 * MBPS, 0.025)])
    wan.run(lambda: wan.a.core.up and wan.b.core.up)
    wan.a.core.send(1, bytes(MIB))
    wan.run(limit_s=0.2)
    wan.b.core.finish()
    assert wan.run(lambda: wan.a.core.state is State.FAILED, limit_s=5)
    assert "not taken" in str(wan.a.core.error)


def test_an_abort_tells_the_peer_why() -> None:
    wan = Wan([Link(10 * MBPS, 0.025)])
    wan.run(lambda: wan.a.core.up and wan.b.core.up)
    wan.a.core.abort("the operator\nchanged her mind")
    assert wan.run(lambda: wan.b.core.state is State.FAILED, limit_s=1)
    assert "the operator?changed her mind" in str(wan.b.core.error)
    assert wan.a.core.error is None


@pytest.mark.parametrize(("size", "within"), [(1, Settings().quiet_ack_s + 0.052), (Settings().ack_bytes, 0.052)])
def test_acks_are_prompt(size: int, within: float) -> None:
    wan = Wan([Link(100 * MBPS, 0.025)])
    wan.run(limit_s=0.5)
    wan.a.send(1, b"x" * size)
    at = wan.now
    assert wan.run(lambda: wan.b.got and wan.a.core.unacked() == 0, limit_s=1)
    assert wan.now - at < within


def test_what_is_little_is_acknowledged_together_or_with_an_answer() -> None:
    wan = Wan([Link(100 * MBPS, 0.025)])
    wan.run(limit_s=0.5)
    core = wan.b.core
    key = next(iter(core.paths())).key

    def acks(now: float) -> list[int]:
        frames = FrameReader().feed(b"".join(core.output(key, now)))
        return [frame.number for frame in frames if frame.kind == Kind.ACK]

    def take(number: int, now: float) -> None:
        core.receive(key, Frame(Kind.DATA, 1, END, number, b"little"), now)

    now, had = wan.now, core.path(key).received
    take(0, now)
    take(1, now + 0.004)
    assert acks(now + 0.004) == []
    assert acks(now + 2 * Settings().ack_s) == []
    assert core.deadline(now + 0.004) <= now + Settings().quiet_ack_s
    assert acks(now + Settings().quiet_ack_s) == [had + 2]
    take(2, now + 1)
    assert acks(now + 1) == []
    core.send(2, b"an answer", False)
    assert acks(now + 1.001) == [had + 3]
    assert acks(now + 2) == []


def test_what_is_little_after_much_is_acknowledged_soon() -> None:
    wan = Wan([Link(100 * MBPS, 0.025)])
    wan.run(limit_s=0.5)
    core = wan.b.core
    key = next(iter(core.paths())).key

    def acked(number: int, size: int, now: float, after: float) -> bool:
        core.receive(key, Frame(Kind.DATA, 1, END, number, bytes(size)), now)
        frames = FrameReader().feed(b"".join(core.output(key, now + after)))
        return any(frame.kind == Kind.ACK for frame in frames)

    now, s = wan.now, Settings()
    assert acked(0, s.ack_bytes, now, 0)
    assert acked(1, 10, now + 0.05, s.ack_s)
    assert not acked(2, 10, now + s.quiet_after_s + 0.01, s.ack_s)


def move(source: SessionCore, sink: SessionCore, key: int) -> None:
    """All output of one path, at once."""
    for frame in FrameReader().feed(b"".join(source.output(key, 1.0))):
        sink.receive(key, frame, 1.0)


def two_cores(settings: Settings | None = None) -> tuple[SessionCore, SessionCore]:
    cores = SessionCore(settings or Settings(), "b", 0.0), SessionCore(settings or Settings(), "a", 0.0)
    for core in cores:
        for key in (0, 1):
            core.path_up(key, f"path {key}", 0.0, 0.01)
            core.output(key, 0.0)
    return cores


def test_acks_lost_with_a_connection_are_made_up_for_by_the_next() -> None:
    a, b = two_cores()
    a.send(1, bytes(1000))
    move(a, b, 0)
    b.output(0, 1.0)  # the ack is lost ...
    a.path_down(1, 1.0, "x")
    b.path_down(1, 1.0, "x")
    for core in (a, b):
        core.path_up(0, "path 0", 1.0, 0.01)  # ... with the connection
    assert a.unacked() == 1000
    move(b, a, 0)
    assert a.unacked() == 0
    frames = FrameReader().feed(b"".join(a.output(0, 1.0)))
    assert Kind.DATA not in [frame.kind for frame in frames], "nor is it sent again"


def test_credit_lost_with_a_connection_is_given_again() -> None:
    a, b = two_cores(Settings(receive_window=20_000))
    for core in (a, b):
        core.path_down(1, 1.0, "x")
    for _ in range(4):
        a.send(1, bytes(10_000))
    move(a, b, 0)
    while (item := b.pop(1)) is not None:
        b.consumed(1, item[1])
    b.output(0, 1.0)  # lost
    move(a, b, 0)
    assert b.pop(1) is None
    for core in (a, b):
        core.path_up(0, "path 0", 1.0, 0.01)
    move(b, a, 0)
    move(a, b, 0)
    assert b.pop(1) is not None


def test_a_goodbye_that_overtakes_the_acks_is_still_a_good_one() -> None:
    a, b = two_cores()
    a.send(1, bytes(1000))
    move(a, b, 0)
    move(a, b, 1)
    b.finish()
    for key in (0, 1):
        if a.state is State.OPEN:
            late = b.output(key, 1.0)
            goodbye = [data for data in late if not data.startswith(bytes([Kind.ACK]))]
            for frame in FrameReader().feed(b"".join(goodbye)):
                a.receive(key, frame, 1.0)
    assert a.state is State.ENDED
    assert a.error is None


def test_a_process_that_slept_does_not_blame_its_paths() -> None:
    wan = Wan([Link(10 * MBPS, 0.025)])
    fill(wan, 1)
    dead = wan.a.core.tick(wan.now + 30)
    assert dead == []


# -- hostile peers


def fresh() -> SessionCore:
    core = SessionCore(Settings(receive_window=MIB), "site x", 0.0)
    core.path_up(0, "p", 0.0, 0.01)
    return core


def data(number: int, payload: bytes, flags: int = 0, channel: int = 1) -> Frame:
    return Frame(Kind.DATA, channel, flags, number, payload)


def test_more_than_the_credit_is_refused() -> None:
    core = fresh()
    with pytest.raises(Corrupt, match="credit"):
        for n in range(100):
            core.receive(0, data(n + 1, bytes(60_000)), 0.0)


def test_an_endless_message_is_refused() -> None:
    core = fresh()
    with pytest.raises(Corrupt, match="message of more than"):
        for n in range(10_000):
            core.receive(0, data(n, bytes(60_000)), 0.0)


def test_an_endless_message_of_nothing_is_refused() -> None:
    core = fresh()
    with pytest.raises(Corrupt):
        for n in range(1_000_000):
            core.receive(0, data(n, b""), 0.0)


@pytest.mark.parametrize(
    "frame",
    [
        Frame(Kind.ACK, 0, 0, 1, b""),
        Frame(Kind.STATE, 1, 0, 5, bytes(8)),
        Frame(Kind.STATE, 1, 0, 0, b"short"),
        Frame(Kind.HELLO, 0, 0, 0, b""),
        Frame(Kind.CHALLENGE, 0, 0, 0, b""),
    ],
)
def test_nonsense_is_refused(frame: Frame) -> None:
    with pytest.raises(Corrupt):
        fresh().receive(0, frame, 0.0)


def test_a_flood_of_pings_is_refused() -> None:
    core = fresh()
    with pytest.raises(Corrupt, match="floods"):
        for n in range(10_000):
            core.receive(0, Frame(Kind.PING, 0, 0, n, b""), 0.0)


def test_duplicates_and_gaps_are_put_right() -> None:
    core = fresh()
    order = [(2, END), (0, 0), (2, END), (1, END), (0, 0), (1, END)]
    for number, flags in order:
        core.receive(0, data(number, bytes([number]), flags), 0.0)
    assert [core.pop(1), core.pop(1), core.pop(1)] == [(b"\0\1", 2 + 2 * FRAME_COST), (b"\2", 1 + FRAME_COST), None]


def test_a_message_that_is_too_large_is_the_senders_error() -> None:
    core = fresh()
    with pytest.raises(UsageError):
        core.send(1, bytes(16 * MIB + 1))
    with pytest.raises(UsageError):
        core.send(16, b"")
    core.receive(0, Frame(Kind.BYE, 0, ABORT, 0, b"x"), 0.0)
    with pytest.raises(PeerError):
        core.send(1, b"")


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.builds(
            Frame,
            st.integers(0, 12),
            st.integers(0, 15),
            st.integers(0, 1),
            st.one_of(st.integers(0, 5), st.integers(0, 2**64 - 1)),
            st.binary(max_size=40),
        ),
        max_size=30,
    )
)
def test_any_frames_give_corrupt_or_are_taken(frames: list[Frame]) -> None:
    core = fresh()
    core.send(1, bytes(1000))
    core.output(0, 0.0)
    now = itertools.count()
    try:
        for frame in frames:
            core.receive(0, frame, float(next(now)) / 1000)
            core.output(0, float(next(now)) / 1000)
    except Corrupt:
        pass


def test_a_path_that_is_retired_carries_no_data_either_way() -> None:
    a, b = two_cores()
    a.retire(0, 1.0)
    move(a, b, 0)
    a.send(1, bytes(1000))
    b.send(1, bytes(1000))
    for core in (a, b):
        kinds = [frame.kind for frame in FrameReader().feed(b"".join(core.output(0, 1.0)))]
        assert Kind.DATA not in kinds
        assert Kind.DATA in [frame.kind for frame in FrameReader().feed(b"".join(core.output(1, 1.0)))]


def test_a_retired_path_still_serves_where_there_is_no_other() -> None:
    a, b = two_cores()
    a.retire(0, 1.0)
    for core in (a, b):
        core.path_down(1, 1.0, "x")
    a.send(1, bytes(1000))
    # Not in the beginning: another one may be about to come up.
    (frame,) = (frame for frame in FrameReader().feed(b"".join(a.output(0, 3.0))) if frame.kind == Kind.DATA)
    assert b.receive(0, frame, 3.0)
