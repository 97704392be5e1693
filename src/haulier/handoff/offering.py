"""What a source tells the target before anything is sent, and the session that they then open."""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from haulier.agent.client import Client
from haulier.agent.site import Site
from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.errors import HaulierError
from haulier.guests.model import GuestSpec
from haulier.handoff import retained, shared
from haulier.handoff.journal import GuestRow
from haulier.handoff.messages import Accept, Job, Offer
from haulier.handoff.residence import spec_of
from haulier.handoff.shared import golden_manifest
from haulier.images import common
from haulier.images.layers import chain
from haulier.network import paths as networks
from haulier.session import Handed, PathAddress, Session, TlsConfig
from haulier.units import CHUNK

log = logging.getLogger(__name__)


def make_offer(site: Site, store: ChunkStore, job: Job, row: GuestRow, manifest: Manifest, epoch: int) -> Offer:
    """The offer of a guest with that journal row; `accelerator` and `host` are the caller's to add."""
    spec = spec_of(row)
    return Offer(
        handoff=job.handoff,
        source=site.name,
        spec=row.spec,
        epoch=epoch,
        secret=secrets.token_hex(32),
        manifest=manifest.digest.hex(),
        disk_bytes=len(manifest.unique()) * CHUNK,
        memory_bases=tuple(retained.candidates(site, spec.name, spec.uuid, spec.golden)),
        images=_held_images(store, spec),
        golden=golden_manifest(store, spec.golden) is not None,
        options=job.options,
    )


def _held_images(store: ChunkStore, spec: GuestSpec) -> tuple[str, ...]:
    """What the target may hold as well, those that the guest was made from first."""
    here = shared.held(store)
    mine: list[str] = []
    with contextlib.suppress(HaulierError):
        names = chain(store, spec.image)[::-1]
        mine = [shared.short(store.load_manifest(f"image/{name}")) for name in names]
    return common.choose(here, here, mine)


def connect(
    site: Site,
    peer: str,
    offer: Offer,
    accept: Accept,
    network: contextlib.ExitStack,
    handed: Handed | None = None,
    waypoints: Sequence[PathAddress] = (),
) -> tuple[Session, list[networks.Way]]:
    """A session to the worker that waits at site `peer`, and the ways that it has; its paths connect by and by.

    `network` takes what has to be undone of the host's network. `handed`: what the offer went over, if it goes on.
    `waypoints`: further paths, see `open_waypoints`.
    """
    mptcp = offer.options.transport == "mptcp"
    ways = networks.find(accept.bulk, accept.port, site.paths, explore=site.explores, uplinks=mptcp)
    mptcp = mptcp and len(ways) > 1
    if mptcp:
        # What it is missing, the count of subflows will show; the session then has a connection for each path.
        missing = network.enter_context(networks.spread(ways, site.run))
        if missing:
            log.warning("MPTCP is not set up at site %s: %s", site.name, missing)
    session = Session.connect(
        TlsConfig(site.certificate, site.key, site.ca_certificate, peer),
        bytes.fromhex(offer.secret),
        peers=[*(way.address(accept.port) for way in ways), *waypoints],
        mptcp=mptcp,
        handed=handed,
    )
    return session, ways


def open_waypoints(
    clients: Mapping[str, Client], offer: Offer, peer: str, port: int, network: contextlib.ExitStack
) -> tuple[list[PathAddress], dict[str, str]]:
    """Paths to `port` at site `peer` through other sites, by their names; and of those that cannot be, why not.

    `network` takes their closing.
    """

    def open_one(name: str) -> PathAddress:
        host, chosen = clients[name].open_waypoint(offer.handoff, peer, port)
        return PathAddress(host, chosen, through=name)

    found, missing = list[PathAddress](), dict[str, str]()
    with ThreadPoolExecutor(len(clients), thread_name_prefix="waypoints") as pool:
        for name, opened in [(name, pool.submit(open_one, name)) for name in clients]:
            try:
                found.append(opened.result())
            except HaulierError as error:
                log.warning("nothing goes through site %s: %s", name, error)
                missing[name] = str(error)
            else:
                network.callback(_close_waypoint, clients[name], offer.handoff)
    return found, missing


def _close_waypoint(client: Client, handoff: str) -> None:
    # One that is not told closes itself.
    with contextlib.suppress(HaulierError):
        client.close_waypoint(handoff)
