"""Calls to an agent's control API: over the local unix socket, or over HTTPS to another site.

    Client.local(site)          everything, as the operator of this site
    Client.peer(site, row)      what one site may ask of another; the peer's certificate must be that site's

Blocking; one connection a call, so an object may be shared by threads. An error that the agent reports is raised
here as the same class of `haulier.errors`. What a peer answers is bounded and must be a JSON object.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import socket
import ssl
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from haulier.agent import authority, packing
from haulier.agent.site import Site, split_address
from haulier.errors import HaulierError, NotTrusted, PeerError, UnknownThing, by_code
from haulier.handoff.journal import SiteRow
from haulier.session import Handed
from haulier.session.frames import VERSION

TIMEOUT_S: Final = 60.0
OWNERSHIP_S: Final = 15.0
"""These are repeated until they are answered, so a cut link need not hold up whoever asks."""
CONNECT_S: Final = 10.0
MAX_ANSWER: Final = 32 << 20
_POLL_S: Final = 0.2
_LACKING_BATCH: Final = 16384
_WORTH_PACKING: Final = 1024
"""Bytes of a request from which on it is compressed."""
_WORTH_OURS: Final = 256
"""The same where both ends are agents: what is said of who owns a guest is shorter, and understood by any version."""
PATH_HEADER: Final = "Haulier-Path"
PATH_VERSION: Final = str(VERSION)
"""A call whose connection may go on as a path of the bulk protocol (`haulier.agent.handing`)."""
_PROBE_SIZES: Final = (128 << 10, 512 << 10, 960 << 10, 960 << 10, 960 << 10)
"""The first opens the connection's window, the others are timed ..."""
_PROBE_RTTS: Final = 4
"""... until one takes so many round trips: one that takes less has waited for the window, not for the link."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("agent", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class _SiteConnection(http.client.HTTPConnection):
    """HTTPS whose certificate must name a site, whatever the host name."""

    def __init__(
        self, host: str, port: int, timeout: float, context: ssl.SSLContext, name: str | None, begins: float = 0.0
    ) -> None:
        """`begins`: Unix seconds; a certificate that begins earlier is not believed any more."""
        super().__init__(host, port, timeout=timeout)
        self._context = context
        self._name = name
        self._begins = begins
        self._parts: list[bytes] | None = None
        """Of a request that is being put together."""

    def connect(self) -> None:
        raw = socket.create_connection((self.host, self.port), min(CONNECT_S, self.timeout or CONNECT_S))
        try:
            # Each side answers what the other says, and nothing of it waits for an ack.
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.sock = self._context.wrap_socket(raw, server_hostname=self._name)
        except BaseException:
            raw.close()
            raise
        if self._begins and authority.begins_of(self.sock.getpeercert()) < self._begins:
            raise NotTrusted(
                f"{self.host}:{self.port} shows a certificate of {self._name!r} that was replaced or withdrawn: "
                "is it an old copy of that site?"
            )
        self.sock.settimeout(self.timeout)

    def request(self, *words: Any, **more: Any) -> None:
        """The head and the body of a request in one record, if they fit."""
        if self.sock is None:
            self.connect()
        self._parts = []
        super().request(*words, **more)
        parts, self._parts = self._parts, None
        self.send(b"".join(parts))

    def putrequest(self, *words: Any, **more: Any) -> None:
        super().putrequest(*words, **more | {"skip_accept_encoding": True})

    def send(self, data: Any) -> None:
        if self._parts is not None:
            self._parts.append(data)
        else:
            super().send(data)


class Client:
    """One agent, however it is reached. `where` names it in messages."""

    def __init__(
        self, where: str, connect: Callable[[float], http.client.HTTPConnection], *, packs: bool = False
    ) -> None:
        """`packs`: what is said to it and what it says is to be as small as can be."""
        self.where = where
        self._connect = connect
        self._packs = packs

    @staticmethod
    def local(site: Site) -> Client:
        """The agent of this site, through its unix socket."""
        return Client.unix(site.check_socket_path(site.socket), f"the agent of site {site.name!r}")

    @staticmethod
    def unix(path: Path, where: str) -> Client:
        """Whatever serves a control API at a unix socket, as its operator."""
        return Client(where, lambda timeout: _UnixConnection(str(path), timeout))

    @staticmethod
    def peer(site: Site, row: SiteRow) -> Client:
        """The agent of another site, as `site`."""
        context = authority.client_context(site)
        host, port = split_address(row.control)
        name = authority.server_name(row.name)
        return Client(
            f"site {row.name!r} at {row.control}",
            lambda timeout: _SiteConnection(host, port, timeout, context, name, row.begins),
            packs=True,
        )

    @staticmethod
    def at(site: Site, host: str, port: int, name: str, where: str) -> Client:
        """Whatever serves this fleet's control API at an address, as `site`.

        Its certificate must be that of site `name`, or, with "", one that names the IP address `host`.
        """
        context = authority.client_context(site)
        expected = authority.server_name(name) if name else host
        return Client(where, lambda timeout: _SiteConnection(host, port, timeout, context, expected))

    @staticmethod
    def joining(via: str, ca_pem: bytes | None, issuer: str | None) -> Client:
        """For a site that has no certificate yet. Without `ca_pem` nothing is verified."""
        context = authority.joining_context(ca_pem)
        host, port = split_address(via)
        name = authority.server_name(issuer) if issuer else None
        return Client(f"the site at {via}", lambda timeout: _SiteConnection(host, port, timeout, context, name))

    # -- calls

    def call(self, method: str, path: str, body: Any = None, timeout: float = TIMEOUT_S) -> dict[str, Any]:
        """One request; the answer is a JSON object. Raises what the agent reports, PeerError if it does not answer."""
        return self._call(method, path, body, timeout)[0]

    def _call(
        self, method: str, path: str, body: Any, timeout: float, *, keep: bool = False
    ) -> tuple[dict[str, Any], Handed | None]:
        """`keep`: with the answer comes the connection, if the other site agrees that it goes on."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} if data is not None else {}
        if data is not None and self._packs and len(data) >= _WORTH_OURS:
            data = packing.pack(data)
            # It says as well what the answer may be, and what both are made of.
            headers = {"Content-Encoding": packing.ENCODING}
        elif self._packs:
            headers["Accept-Encoding"] = packing.ENCODING
        elif data is not None and len(data) >= _WORTH_PACKING:
            data = zlib.compress(data, 9)
            headers["Content-Encoding"] = "deflate"
        connection = self._connect(timeout)
        handed: Handed | None = None
        try:
            if keep:
                headers[PATH_HEADER] = PATH_VERSION
                connection.connect()
            asked = time.time()
            connection.request(method, path, data, headers)
            response = connection.getresponse()
            if keep and PATH_HEADER in response.headers:
                answer, handed = _take_over(connection, response, asked)
            else:
                answer = response.read(MAX_ANSWER + 1)
        except HaulierError:
            raise  # some are an OSError as well
        except ssl.SSLCertVerificationError as error:
            raise NotTrusted(
                f"{self.where} shows a certificate that is not this fleet's, or another site's "
                f"({error.verify_message}): check the address, or join again"
            ) from None
        except ssl.SSLError as error:
            raise NotTrusted(
                f"{self.where} refused the secure connection ({error.reason or error}): "
                "is this site's certificate of the same fleet? Join again if not"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            why = str(error) or type(error).__name__
            raise PeerError(f"{self.where} does not answer ({why}): is 'haulier agent' running there?") from None
        finally:
            connection.close()
        if len(answer) > MAX_ANSWER:
            raise PeerError(f"{self.where} sent more than {MAX_ANSWER >> 20} MiB in answer to {method} {path}")
        if response.headers.get("Content-Encoding") == packing.ENCODING:
            answer = packing.unpack(answer, MAX_ANSWER)
        return _read(self.where, response.status, answer), handed

    def get(self, path: str, timeout: float = TIMEOUT_S) -> dict[str, Any]:
        return self.call("GET", path, timeout=timeout)

    def post(self, path: str, body: Any = None, timeout: float = TIMEOUT_S) -> dict[str, Any]:
        return self.call("POST", path, {} if body is None else body, timeout)

    def delete(self, path: str, timeout: float = TIMEOUT_S) -> dict[str, Any]:
        return self.call("DELETE", path, timeout=timeout)

    # -- sites

    def site(self) -> dict[str, Any]:
        return self.get("/v1/site", timeout=CONNECT_S)

    def sites(self) -> list[dict[str, Any]]:
        return list(self.fleet()["sites"])

    def fleet(self) -> dict[str, Any]:
        """{"sites": [...], "revoked": {name: since when its certificates have to begin}}"""
        return self.get("/v1/sites")

    # -- guests and images

    def guests(self) -> list[dict[str, Any]]:
        return list(self.get("/v1/guests")["guests"])

    def guest(self, name: str) -> dict[str, Any]:
        return self.get(f"/v1/guests/{path_segment(name)}")

    def images(self) -> list[dict[str, Any]]:
        return list(self.get("/v1/images")["images"])

    # -- jobs

    def wait(self, job: Mapping[str, Any], progress: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
        """Waits for a job that a call began, and gives its result; raises its error."""
        now = dict(job)
        while True:
            if progress is not None:
                progress(now)
            if now["state"] == "done":
                return dict(now["result"])
            if now["state"] == "failed":
                raise by_code(int(now["code"]))(str(now["error"]))
            time.sleep(_POLL_S)
            now = self.get(f"/v1/jobs/{path_segment(str(now['id']))}")

    # -- handoffs

    def handoff(self, handoff: str) -> dict[str, Any]:
        return self.get(f"/v1/handoffs/{path_segment(handoff)}")

    def handoffs(self) -> list[dict[str, Any]]:
        return list(self.get("/v1/handoffs")["handoffs"])

    def start_handoff(self, guest: str, to: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return self.post("/v1/handoffs", {"guest": guest, "to": to, "options": dict(options or {})})

    def cancel(self, handoff: str) -> dict[str, Any]:
        return self.post(f"/v1/handoffs/{path_segment(handoff)}/cancel")

    def offer(self, offer: Mapping[str, Any]) -> dict[str, Any]:
        """To the target of a handoff (an `Offer`); answers an `Accept`, or raises what stands against it there."""
        return self.post("/v1/peer/offers", dict(offer))

    def offer_on(self, offer: Mapping[str, Any]) -> tuple[dict[str, Any], Handed | None]:
        """As `offer`; with the connection, if the workers' session goes on over it (`haulier.agent.handing`)."""
        return self._call("POST", "/v1/peer/offers", dict(offer), TIMEOUT_S, keep=True)

    def resume(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """To the target of a post-copy whose workers died (a `Resumption`); answers an `Accept`."""
        return self.post("/v1/peer/resumptions", dict(request))

    def open_waypoint(self, handoff: str, to: str, port: int) -> tuple[str, int]:
        """Has the other site carry a handoff's bytes to `port` at site `to`; the address and port to dial there."""
        answer = self.post("/v1/peer/waypoints", {"handoff": handoff, "to": to, "port": port}, CONNECT_S)
        try:
            return str(answer["bulk"][0]), int(answer["port"])
        except (KeyError, IndexError, TypeError, ValueError):
            raise PeerError(f"{self.where} does not say where it is a waypoint: is it the same haulier?") from None

    def close_waypoint(self, handoff: str) -> int:
        """It is not needed any more; the bytes that were carried."""
        return int(self.delete(f"/v1/peer/waypoints/{path_segment(handoff)}", CONNECT_S).get("carried", 0))

    def measure(self) -> tuple[float, float]:
        """(bits per second towards the other site, round trip in seconds), by sending a little on one connection."""
        connection = self._connect(TIMEOUT_S)
        try:
            began = time.monotonic()
            connection.connect()
            # TCP's handshake and TLS 1.3's take one round trip each
            rtt = (time.monotonic() - began) / 2
            rate = 0.0
            for number, size in enumerate(_PROBE_SIZES):
                began = time.monotonic()
                connection.request("POST", "/v1/peer/probe", os.urandom(size))
                answer = connection.getresponse()
                _read(self.where, answer.status, answer.read(MAX_ANSWER))
                took = max(time.monotonic() - began - rtt, 1e-4)
                if number:
                    rate = max(rate, size * 8 / took)
                    if took >= _PROBE_RTTS * rtt:
                        break
        except (OSError, http.client.HTTPException) as error:
            raise PeerError(f"{self.where} cannot be measured ({error}): is 'haulier agent' running there?") from None
        finally:
            connection.close()
        return rate, rtt

    def look(self, offer: Mapping[str, Any]) -> dict[str, Any]:
        """Like `offer`, but nothing is begun: what stands against it (`reasons`), and what is there already."""
        return self.post("/v1/peer/look", dict(offer))

    def lacking(self, fingerprints: Sequence[bytes], *, kept: bool = False) -> list[int]:
        """Positions of those chunks that the other site lacks; with `kept`, or that its cache may evict."""
        found: list[int] = []
        for start in range(0, len(fingerprints), _LACKING_BATCH):
            batch = fingerprints[start : start + _LACKING_BATCH]
            packed = base64.b64encode(b"".join(batch)).decode()
            answer = self.post("/v1/peer/lacking", {"fingerprints": packed, "kept": kept})
            for position in answer.get("lacking", ()):
                if not isinstance(position, int) or not 0 <= position < len(batch):
                    raise PeerError(f"{self.where} answered wrongly which chunks it lacks: run the same haulier there")
                found.append(start + position)
        return found

    def ownership(self, guest: str, event: str, epoch: int, handoff: str = "") -> dict[str, Any]:
        """A message of the ownership table outside a session; answers {"messages": [[event, epoch], ...]}."""
        body = {"guest": guest, "event": event, "epoch": epoch, "handoff": handoff}
        return self.post("/v1/peer/ownership", body, timeout=OWNERSHIP_S)


def path_segment(text: str) -> str:
    """`text` as one segment of a path; the agent judges whether it is a name."""
    if text in ("", ".", ".."):
        raise UnknownThing(f"{text!r} names nothing")
    return quote(text, safe="")


def _take_over(
    connection: http.client.HTTPConnection, response: http.client.HTTPResponse, asked: float
) -> tuple[bytes, Handed]:
    """The answer's body, and what goes on after it. Raises http.client.HTTPException if it makes no sense."""
    heard, took = _clock(response.headers[PATH_HEADER])
    sock, length = connection.sock, response.length
    if not isinstance(sock, ssl.SSLSocket) or length is None or length > MAX_ANSWER:
        raise http.client.HTTPException("it wants to go on in a way that makes no sense")
    # Not by the response, which would close what it reads from, with all that it has read ahead.
    answer = response.fp.read(length)
    answered = time.time()
    sock.setblocking(False)
    early = b""
    with contextlib.suppress(ssl.SSLWantReadError):
        early = response.fp.peek()
    connection.sock = None
    return answer, Handed(sock, early, ((heard - asked) + (heard + took - answered)) / 2)


def _clock(said: str) -> tuple[float, float]:
    """When a call was heard, by the other site's clock, and how long it took there, in seconds."""
    try:
        version, first, second = said.split(" ")
        if version != PATH_VERSION:
            raise ValueError
        return float(first), float(second)
    except ValueError:
        raise http.client.HTTPException(f"{PATH_HEADER}: {said[:80]!r}") from None


def _read(where: str, status: int, answer: bytes) -> dict[str, Any]:
    try:
        value = json.loads(answer)
        if not isinstance(value, dict):
            raise ValueError("not an object")
    except ValueError:
        raise PeerError(f"{where} answered something that is no haulier message (status {status})") from None
    if status < 400:
        return value
    code, text = value.get("code"), value.get("error")
    if not isinstance(code, int) or not isinstance(text, str):
        raise PeerError(f"{where} answered with status {status} and no reason")
    error: type[HaulierError] = by_code(code)
    raise error(text[:4000])
