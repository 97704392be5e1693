"""One end of a session as a process, for tests in network namespaces.

    python -m tests.support.session_peer listen CERTS SITE PEER
    python -m tests.support.session_peer connect CERTS SITE PEER COUNT HOST:PORT...

With `mptcp` as the last word both speak MPTCP where they can.

The listener prints its port, then, when the session is over, what it got. The connector sends COUNT numbered
messages of 100 kB, prints `under way` after a quarter (so that faults come in the middle), then its figures.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

from haulier.errors import HaulierError
from haulier.session import PathAddress, Session, TlsConfig

SECRET = b"lab test secret!"


def message(n: int) -> bytes:
    return hashlib.sha256(n.to_bytes(4, "big")).digest() * 3125


def main() -> None:
    mptcp = sys.argv[-1] == "mptcp"
    del sys.argv[len(sys.argv) - mptcp :]
    mode, certs, site, peer = sys.argv[1:5]
    directory = Path(certs)
    tls = TlsConfig(directory / f"{site}.pem", directory / f"{site}.key", directory / "ca.pem", peer)
    if mode.startswith("listen"):
        session = Session.listen(
            tls, SECRET, bind=("0.0.0.0", "::") if mode == "listen6" else ("0.0.0.0",), mptcp=mptcp
        )
        got: list[bool] = []
        session.on(1, lambda data: got.append(data == message(len(got))))
        print(session.port, flush=True)
        session.wait_over()
        session.close()
        result = {"got": len(got), "right": all(got)}
    else:
        count = int(sys.argv[5])
        pairs = (word.rsplit(":", 1) for word in sys.argv[6:])
        peers = [PathAddress(host.strip("[]"), int(port)) for host, port in pairs]
        session = Session.connect(tls, SECRET, peers, mptcp=mptcp)
        session.wait_connected(20)
        try:
            for n in range(count):
                session.send(1, message(n))
                if n == count // 4:
                    print("under way", flush=True)
            session.wait_below(0)
        except HaulierError:
            pass
        result = {
            "rate_bps": session.rate_bps(),
            "rtt_s": session.rtt_s(),
            "paths": [asdict(path) for path in session.paths()],
            "wire": session.wire_bytes(),
            "transport": session.transport(),
        }
        session.close()
    print(json.dumps(result | {"error": str(session.error or "")}), flush=True)


if __name__ == "__main__":
    main()
