"""Sessions over real sockets on loopback: paths that break, peers that are strangers, ends good and bad."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from haulier.errors import Conflict, Corrupt, HaulierError, NotTrusted, PeerError, UsageError
from haulier.session import PathAddress, Session, Settings, TlsConfig
from haulier.session.frames import HEADER, Frame, FrameReader, Kind, encode
from haulier.session.handshake import ConnectorHandshake
from haulier.session.leisure import LEAST, Leisure
from haulier.units import MIB
from tests.support.certs import TestCa
from tests.support.relay import TcpRelay
from tests.support.waiting import wait_for

SECRET = b"s" * 32
QUICK = Settings(stall_s=0.3, ping_s=0.2, dead_s=0.8, redial_most_s=0.3, dial_s=0.5)
"""Impatient, so that tests need not wait for the defaults."""


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> TestCa:
    return TestCa(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def lisbon(ca: TestCa) -> TlsConfig:
    return ca.site("lisbon", peer="oslo")


@pytest.fixture(scope="module")
def oslo(ca: TestCa) -> TlsConfig:
    return ca.site("oslo", peer="lisbon")


class Pair:
    """Two sessions and the relays that are their paths."""

    def __init__(self, lisbon: TlsConfig, oslo: TlsConfig, paths: int, settings: Settings = QUICK) -> None:
        self.listener = Session.listen(lisbon, SECRET, ["127.0.0.1"], settings=settings)
        self.relays = [TcpRelay(self.listener.port) for _ in range(paths)]
        addresses = [PathAddress("127.0.0.1", relay.port) for relay in self.relays]
        self.connector = Session.connect(oslo, SECRET, addresses, settings)
        self.got: list[bytes] = []
        self.listener.on(1, self.got.append)

    def all_up(self) -> None:
        for session in (self.listener, self.connector):
            wait_for(lambda session=session: sum(p.up for p in session.paths()) == len(self.relays), 10, "paths up")

    def close(self) -> None:
        self.connector.close(0)
        self.listener.close(0)
        for relay in self.relays:
            relay.close()


@pytest.fixture
def make(lisbon: TlsConfig, oslo: TlsConfig) -> Iterator[object]:
    made: list[Pair] = []

    def one(paths: int = 1, settings: Settings = QUICK) -> Pair:
        made.append(Pair(lisbon, oslo, paths, settings))
        return made[-1]

    yield one
    for pair in made:
        pair.close()


def numbered(n: int, size: int = 200_000) -> bytes:
    return (n.to_bytes(4, "big") * (size // 4 + 1))[:size]


def test_messages_of_all_sizes_both_ways(make) -> None:
    pair = make(2)
    back: list[bytes] = []
    pair.connector.on(2, back.append)
    pair.listener.on(3, lambda message: pair.listener.send(2, message[::-1]))
    sizes = [0, 1, 65519, 65520, 65521, 300_000, 5 * MIB]
    for n, size in enumerate(sizes):
        pair.connector.send(1, numbered(n, size))
    pair.connector.send(3, [b"ab", b"c"], urgent=True)
    assert pair.connector.wait_below(0, timeout=20)
    assert pair.connector.unacked() == pair.connector.unacked(1) == 0
    wait_for(lambda: len(pair.got) == len(sizes) and back, 10)
    assert pair.got == [numbered(n, size) for n, size in enumerate(sizes)]
    assert back == [b"cba"]
    assert pair.connector.rate_bps() > 0
    assert pair.connector.rtt_s() > 0
    tx, rx = pair.connector.wire_bytes()
    assert tx > sum(sizes) > rx > 0
    stats = pair.connector.paths()
    assert len(stats) == 2
    assert sum(path.acked for path in stats) >= sum(sizes)


def test_what_is_left_in_the_kernel_for_a_while_is_read_all_the_same(make, monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[int] = []

    def rest(self: Leisure, now: float, count: int, rtt: float) -> float:
        rests.append(count)
        return 0.005

    monkeypatch.setattr(Leisure, "note", rest)
    pair = make(2)
    back: list[bytes] = []
    pair.connector.on(2, back.append)
    pair.listener.on(3, lambda message: pair.listener.send(2, message[::-1]))
    for n in range(40):
        pair.connector.send(1, numbered(n))
        pair.connector.send(3, numbered(n, 5000))
    assert pair.connector.wait_below(0, timeout=20)
    wait_for(lambda: len(pair.got) == len(back) == 40, 10)
    assert pair.got == [numbered(n) for n in range(40)]
    assert back == [numbered(n, 5000)[::-1] for n in range(40)]
    assert sum(count >= LEAST for count in rests) > 5
    pair.connector.close(10)
    assert pair.listener.wait_over(10) and pair.listener.error is None


def test_waking_an_ended_session_writes_into_no_other_file(make, tmp_path: Path) -> None:
    pair = make()
    pair.all_up()
    transport = pair.connector._transport
    number = transport._wake_fd
    pair.connector.close()
    transport.thread.join(10)
    files = [(tmp_path / str(n)).open("w+b", buffering=0) for n in range(300)]
    try:
        # As it would be with a database that another thread has opened meanwhile.
        assert number in {file.fileno() for file in files}
        transport.stop()
        transport.wake()
        assert {path.stat().st_size for path in tmp_path.iterdir()} == {0}
    finally:
        for file in files:
            file.close()


def test_a_good_end(make) -> None:
    pair = make()
    for n in range(20):
        pair.connector.send(1, numbered(n))
    pair.connector.close()
    assert pair.listener.wait_over(5)
    wait_for(lambda: len(pair.got) == 20, 5, "what came before the goodbye is delivered")
    assert pair.listener.error is pair.connector.error is None
    assert pair.listener.over
    with pytest.raises(PeerError, match="ended"):
        pair.listener.send(1, b"x")
    pair.connector.close()


NAME = "lisbon.example.net"


class Resolver:
    """Knows that `NAME` is here, or does not, and answers while it is let."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked = 0
        self.known = True
        self.answers = threading.Event()
        self.answers.set()
        self._real = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self._find)

    def _find(self, host: str, *words, flags: int = 0, **more):
        if host == NAME and not flags & socket.AI_NUMERICHOST:
            self.asked += 1
            self.answers.wait(60)
            if not self.known:
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            host = "127.0.0.1"
        return self._real(host, *words, flags=flags, **more)


@pytest.mark.parametrize("fault", ["cut", "hang"])
def test_a_path_dies_in_the_middle_and_comes_back(make, fault: str) -> None:
    pair = make(2)
    pair.all_up()
    for n in range(60):
        if n == 20:
            if fault == "hang":
                pair.relays[0].hang = True
            else:
                pair.relays[0].refuse(True)
                pair.relays[0].cut()
        pair.connector.send(1, numbered(n))
    wait_for(lambda: len(pair.got) == 60, 20)
    assert pair.got == [numbered(n) for n in range(60)]
    wait_for(lambda: not pair.connector.paths()[0].up, 10, "the loss is noticed")
    pair.relays[0].hang = False
    pair.relays[0].refuse(False)
    pair.all_up()


def test_a_path_whose_name_nobody_tells_any_more_takes_no_other_with_it(
    lisbon: TlsConfig, oslo: TlsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolver = Resolver(monkeypatch)
    with contextlib.ExitStack() as stack:
        stack.callback(resolver.answers.set)
        listener = stack.enter_context(Session.listen(lisbon, SECRET, ["127.0.0.1"], settings=QUICK))
        got: list[bytes] = []
        listener.on(1, got.append)
        relays = [TcpRelay(listener.port) for _ in range(2)]
        for relay in relays:
            stack.callback(relay.close)
        paths = [PathAddress(NAME, relays[0].port), PathAddress("127.0.0.1", relays[1].port)]
        connector = stack.enter_context(Session.connect(oslo, SECRET, paths, QUICK))
        wait_for(lambda: all(path.up for path in connector.paths()), 10)
        resolver.answers.clear()
        asked = resolver.asked
        relays[0].refuse(True)
        relays[0].cut()
        wait_for(lambda: resolver.asked > asked, 10, "it is dialled again")
        for n in range(20):
            connector.send(1, numbered(n))
        wait_for(lambda: len(got) == 20, 20, "the other path carries")
        relays[0].refuse(False)
        wait_for(lambda: connector.paths()[0].up, 10, "it is where it was")
        assert connector.paths()[1].up and resolver.asked == asked + 1


def test_a_name_that_nobody_knows_yet_is_asked_for_again(
    lisbon: TlsConfig, oslo: TlsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolver = Resolver(monkeypatch)
    resolver.known = False
    with Session.listen(lisbon, SECRET, ["127.0.0.1"], settings=QUICK) as listener:
        with Session.connect(oslo, SECRET, [PathAddress(NAME, listener.port)], QUICK) as connector:
            wait_for(lambda: f"{NAME} is no address and no known name" in connector._core.why_no_path, 10)
            resolver.known = True
            assert connector.wait_connected(10)


def test_a_total_outage_and_return(make) -> None:
    pair = make(2)
    pair.all_up()
    sent = threading.Thread(target=lambda: [pair.connector.send(1, numbered(n)) for n in range(100)])
    sent.start()
    wait_for(lambda: len(pair.got) > 10, 10)
    for relay in pair.relays:
        relay.hang = True
    wait_for(lambda: not pair.connector.connected and not pair.listener.connected, 10)
    assert pair.connector.error is None
    for relay in pair.relays:
        relay.hang = False
    sent.join(30)
    wait_for(lambda: len(pair.got) == 100, 20)
    assert pair.got == [numbered(n) for n in range(100)]


def test_connections_reset_again_and_again(make) -> None:
    pair = make(2)
    back: list[bytes] = []
    pair.connector.on(2, back.append)
    stop = threading.Event()

    def vandal() -> None:
        n = 0
        while not stop.wait(0.05):
            pair.relays[n % 2].cut()
            n += 1

    thread = threading.Thread(target=vandal)
    thread.start()
    try:
        for n in range(600):
            pair.connector.send(1, numbered(n))
            pair.listener.send(2, numbered(n, 50_000))
        wait_for(lambda: len(pair.got) == len(back) == 600, 60)
    finally:
        stop.set()
        thread.join()
    assert pair.got == [numbered(n) for n in range(600)]
    assert back == [numbered(n, 50_000) for n in range(600)]
    assert sum(path.resent for path in pair.connector.paths()) > 0


def test_an_outage_beyond_the_limit_wakes_blocked_senders(make) -> None:
    pair = make(1, Settings(outage_limit_s=1.0, dead_s=0.5, ping_s=0.2, dial_s=0.3, max_unsent=MIB))
    lost: list[HaulierError] = []
    pair.connector.on_lost = lost.append
    assert pair.connector.wait_connected(5)
    pair.relays[0].hang = True
    failed: list[HaulierError] = []

    def send() -> None:
        try:
            while True:
                pair.connector.send(1, bytes(MIB))
        except HaulierError as e:
            failed.append(e)

    thread = threading.Thread(target=send)
    thread.start()
    thread.join(20)
    assert isinstance(failed[0], PeerError)
    assert "no path to site lisbon" in str(failed[0])
    assert pair.connector.error is failed[0]
    wait_for(lambda: lost == [failed[0]], 5)
    with pytest.raises(PeerError):
        pair.connector.wait_below(0, timeout=5)
    assert pair.listener.wait_over(10)
    assert isinstance(pair.listener.error, PeerError)


def test_waiting_has_time_outs(lisbon: TlsConfig, make) -> None:
    with Session.listen(lisbon, SECRET, ["127.0.0.1"]) as alone:
        assert not alone.wait_connected(0.05)
        assert not alone.wait_over(0.05)
        alone.send(1, b"x")
        assert not alone.wait_below(1, timeout=0.05)
        assert alone.wait_below(2, timeout=0.05)
        alone.abort("enough")
    pair = make()
    assert pair.connector.wait_connected(10)


def test_a_callback_that_blocks_exerts_back_pressure_on_its_channel_only(make) -> None:
    pair = make(1, Settings(receive_window=MIB, max_unsent=MIB))
    gate = threading.Event()
    held: list[int] = []

    def block(message: bytes) -> None:
        gate.wait(30)
        held.append(len(message))

    pair.listener.on(4, block)
    sender = threading.Thread(target=lambda: [pair.connector.send(4, bytes(MIB // 2)) for _ in range(20)])
    sender.start()
    pair.connector.send(1, b"through")
    wait_for(lambda: pair.got == [b"through"], 10)
    wait_for(lambda: pair.connector.unacked(4) >= MIB, 10)
    assert sender.is_alive()
    assert not held
    gate.set()
    sender.join(20)
    wait_for(lambda: len(held) == 20, 20)


def test_a_callback_that_fails_ends_the_session_at_both_sides(make, caplog) -> None:
    pair = make()

    def fail(message: bytes) -> None:
        raise UsageError("no such chunk")

    pair.listener.on(5, fail)
    pair.connector.send(5, b"x")
    assert pair.connector.wait_over(10)
    assert "no such chunk" in str(pair.connector.error)
    assert isinstance(pair.listener.error, UsageError)


def test_messages_wait_for_a_callback(make) -> None:
    pair = make()
    for n in range(5):
        pair.connector.send(6, numbered(n, 10))
    assert pair.connector.wait_below(0, timeout=10)
    got: list[bytes] = []
    pair.listener.on(6, got.append)
    wait_for(lambda: len(got) == 5, 5)
    with pytest.raises(UsageError):
        pair.listener.on(6, got.append)
    with pytest.raises(UsageError):
        pair.listener.on(16, got.append)


def test_abort_says_why(make) -> None:
    pair = make()
    pair.connector.wait_connected(10)
    pair.connector.abort("cancelled by the operator")
    assert pair.listener.wait_over(5)
    assert "cancelled by the operator" in str(pair.listener.error)
    assert pair.connector.error is None


def test_a_callback_may_close_the_session(make) -> None:
    pair = make()
    pair.listener.on(7, lambda message: pair.listener.close())
    pair.connector.send(7, b"x")
    assert pair.connector.wait_over(10)
    assert pair.connector.error is None


PEER = """
import sys
from pathlib import Path
from haulier.session import Session, TlsConfig
files = [Path(p) for p in sys.argv[1:4]]
session = Session.listen(TlsConfig(*files), b"s" * 32, ["127.0.0.1"])
session.on(1, lambda message: None)
print(session.port, flush=True)
session.wait_over()
"""


@pytest.fixture
def process(lisbon: TlsConfig) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", PEER, str(lisbon.certificate), str(lisbon.key), str(lisbon.ca)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as made:
        yield made
        made.send_signal(signal.SIGCONT)
        made.kill()


def test_a_peer_that_dies_is_told_from_one_that_ends(process, oslo: TlsConfig) -> None:
    port = int(process.stdout.readline())
    session = Session.connect(oslo, SECRET, [PathAddress("127.0.0.1", port)], Settings(refused_limit_s=0.5))
    session.send(1, bytes(MIB))
    assert session.wait_below(0, timeout=10)
    process.kill()
    assert session.wait_over(10)
    assert isinstance(session.error, PeerError)
    assert "nobody listens" in str(session.error)
    session.close()


def test_a_peer_that_is_stopped_for_a_while_is_waited_for(process, oslo: TlsConfig) -> None:
    port = int(process.stdout.readline())
    session = Session.connect(oslo, SECRET, [PathAddress("127.0.0.1", port)], QUICK)
    assert session.wait_connected(10)
    process.send_signal(signal.SIGSTOP)
    session.send(1, bytes(MIB))
    wait_for(lambda: not session.connected, 10)
    process.send_signal(signal.SIGCONT)
    assert session.wait_below(0, timeout=20)
    session.close()
    assert session.error is None


# -- strangers


def refused(tls: TlsConfig, port: int, secret: bytes = SECRET) -> HaulierError:
    with Session.connect(tls, secret, [PathAddress("127.0.0.1", port)], QUICK) as session:
        assert session.wait_over(10)
        assert session.error is not None
        return session.error


@pytest.fixture
def listener(lisbon: TlsConfig) -> Iterator[Session]:
    session = Session.listen(lisbon, SECRET, ["127.0.0.1"], settings=QUICK)
    yield session
    assert session.error is None, "strangers do no harm to the session"
    session.abort("test over")


def test_a_wrong_secret_is_refused(listener: Session, oslo: TlsConfig) -> None:
    error = refused(oslo, listener.port, b"t" * 32)
    assert isinstance(error, NotTrusted)
    assert "site lisbon refused the secret" in str(error)


def test_another_fleet_is_refused(listener: Session, tmp_path: Path) -> None:
    stranger = TestCa(tmp_path, "other fleet").site("oslo", peer="lisbon")
    error = refused(stranger, listener.port)
    assert isinstance(error, NotTrusted)
    assert "not trusted" in str(error)


def test_a_certificate_of_another_fleet_is_refused_by_the_listener(
    listener: Session, ca: TestCa, tmp_path: Path
) -> None:
    stranger = TestCa(tmp_path, "other fleet").site("oslo", peer="lisbon")
    error = refused(TlsConfig(stranger.certificate, stranger.key, ca.ca, "lisbon"), listener.port)
    assert isinstance(error, NotTrusted)
    assert "refused this site's certificate" in str(error)


def test_the_wrong_site_is_refused_by_the_connector(listener: Session, ca: TestCa) -> None:
    error = refused(ca.site("oslo", peer="madrid"), listener.port)
    assert isinstance(error, NotTrusted)
    assert "expected site madrid, but the certificate says lisbon" in str(error)


def test_the_wrong_site_is_refused_by_the_listener(listener: Session, ca: TestCa, caplog) -> None:
    with Session.connect(
        ca.site("paris", peer="lisbon"), SECRET, [PathAddress("127.0.0.1", listener.port)], QUICK
    ) as session:
        wait_for(lambda: "expected site oslo, but the certificate says paris" in caplog.text, 10)
        assert not session.connected
        session.abort("seen enough")
    assert not listener.connected


def test_an_expired_certificate_is_refused(listener: Session, ca: TestCa, lisbon: TlsConfig) -> None:
    expired = ca.site("late", peer="lisbon", days=-1, san="oslo.haulier")
    error = refused(expired, listener.port)
    assert isinstance(error, NotTrusted)
    assert "expired" in str(error)


def test_a_second_session_is_refused_while_one_is_under_way(listener: Session, oslo: TlsConfig) -> None:
    with Session.connect(oslo, SECRET, [PathAddress("127.0.0.1", listener.port)]) as first:
        assert first.wait_connected(10)
        error = refused(oslo, listener.port)
        assert isinstance(error, Conflict)
        assert "another session" in str(error)
        assert first.connected


def context(oslo: TlsConfig, *, certificate: bool = True) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname = False
    made.load_verify_locations(oslo.ca)
    if certificate:
        made.load_cert_chain(oslo.certificate, oslo.key)
    return made


def test_no_certificate_no_entry(listener: Session, oslo: TlsConfig) -> None:
    with socket.create_connection(("127.0.0.1", listener.port), timeout=5) as raw:
        with context(oslo, certificate=False).wrap_socket(raw) as sock, pytest.raises(ssl.SSLError, match="REQUIRED"):
            sock.recv(100)


def test_tls_1_2_is_refused(listener: Session, oslo: TlsConfig) -> None:
    old = context(oslo)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection(("127.0.0.1", listener.port), timeout=5) as raw, pytest.raises(ssl.SSLError):
        old.wrap_socket(raw)


def hold_up(port: int, words: bytes) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), timeout=10)
    sock.sendall(words)
    return sock


def test_noise_and_silence_do_not_hold_up_others(listener: Session, oslo: TlsConfig) -> None:
    strangers = [hold_up(listener.port, words) for words in (b"", b"GET / HTTP/1.1\r\n\r\n", os.urandom(500))]
    strangers += [hold_up(listener.port, b"\x16\x03\x01") for _ in range(10)]
    with Session.connect(oslo, SECRET, [PathAddress("127.0.0.1", listener.port)]) as session:
        assert session.wait_connected(10)
    for sock in strangers:
        sock.close()


def read_frame(sock: ssl.SSLSocket) -> Frame:
    """One frame, not a byte more."""
    head = sock.recv(HEADER.size)
    assert len(head) == HEADER.size, "closed"
    length = HEADER.unpack(head)[3]
    (frame,) = FrameReader().feed(head + (sock.recv(length) if length else b""))
    return frame


def test_a_member_of_the_fleet_that_talks_nonsense_is_sent_away(listener: Session, oslo: TlsConfig) -> None:
    with socket.create_connection(("127.0.0.1", listener.port), timeout=5) as raw:
        with context(oslo).wrap_socket(raw) as sock:
            assert read_frame(sock).kind == Kind.CHALLENGE
            sock.sendall(encode(Kind.DATA, 1, 1, 0, b"let me in"))
            assert read_frame(sock).kind == Kind.REFUSED
            assert sock.recv(1) == b""


@pytest.mark.parametrize(
    "nonsense",
    [
        encode(Kind.ACK, number=5),
        encode(Kind.HELLO),
        b"\xff" * 16,
        b"".join(encode(Kind.DATA, 1, 0, n, bytes(65000)) for n in range(300)),
    ],
)
def test_a_peer_that_breaks_the_rules_ends_the_session(lisbon: TlsConfig, oslo: TlsConfig, nonsense: bytes) -> None:
    with Session.listen(lisbon, SECRET, ["127.0.0.1"], settings=QUICK) as listener:
        with socket.create_connection(("127.0.0.1", listener.port), timeout=5) as raw:
            with context(oslo).wrap_socket(raw) as sock:
                handshake = ConnectorHandshake(SECRET, b"i" * 16, 0, b"n" * 32, "site lisbon")
                sock.sendall(handshake.receive(read_frame(sock)))
                handshake.receive(read_frame(sock))
                with contextlib.suppress(OSError):
                    sock.sendall(nonsense)
                assert listener.wait_over(10)
        assert isinstance(listener.error, Corrupt)


def test_something_else_on_the_port_is_named(oslo: TlsConfig) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()

        def greet() -> None:
            peer, _ = server.accept()
            with peer:
                peer.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
                peer.recv(1000)

        threading.Thread(target=greet, daemon=True).start()
        with Session.connect(oslo, SECRET, [PathAddress("127.0.0.1", server.getsockname()[1])]) as session:
            wait_for(lambda: "does not speak TLS 1.3" in session._core.why_no_path, 10)
            session.abort("enough")


def test_bad_files_and_addresses_are_the_callers_errors(oslo: TlsConfig, tmp_path: Path) -> None:
    missing = TlsConfig(tmp_path / "no.pem", tmp_path / "no.key", tmp_path / "no-ca.pem", "lisbon")
    with pytest.raises(UsageError, match=r"no\.pem"):
        Session.listen(missing, SECRET)
    with pytest.raises(UsageError, match="0 paths"):
        Session.connect(oslo, SECRET, [])
    with pytest.raises(UsageError, match="secret"):
        Session.listen(oslo, b"")
    with pytest.raises(UsageError, match="cannot listen"):
        Session.listen(oslo, SECRET, ["192.0.2.1"])


def test_one_port_on_several_addresses(lisbon: TlsConfig, oslo: TlsConfig) -> None:
    with Session.listen(lisbon, SECRET, ["127.0.0.1", "127.0.0.2", "::1"]) as listener:
        paths = [PathAddress(host, listener.port) for host in ("127.0.0.1", "127.0.0.2", "::1")]
        paths.append(PathAddress("127.0.0.1", listener.port, source="127.0.0.9"))
        with Session.connect(oslo, SECRET, paths) as session:
            wait_for(lambda: all(path.up for path in session.paths()), 10)
            assert session.paths()[3].name == f"127.0.0.9>127.0.0.1:{listener.port}"
            assert session.paths()[2].name == f"[::1]:{listener.port}"


def test_nothing_is_left_behind(lisbon: TlsConfig, oslo: TlsConfig) -> None:
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before, threads = open_files(), threading.active_count()
    for _ in range(5):
        with Session.listen(lisbon, SECRET, ["127.0.0.1"]) as listener:
            listener.on(1, lambda message: None)
            with Session.connect(oslo, SECRET, [PathAddress("127.0.0.1", listener.port)] * 3) as session:
                session.send(1, bytes(1000))
    wait_for(lambda: open_files() <= before and threading.active_count() <= threads, 10)
