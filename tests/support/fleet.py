"""Several sites with real agents in a lab, joined into one fleet."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from haulier.errors import HaulierError
from haulier.lab.lab import Lab
from haulier.lab.scenario import CONTROL_PORT, GATEWAY, LabSite
from tests.support.labs import lab

WORK = Path("/var/tmp")


@dataclass
class Fleet:
    """The first site made the fleet."""

    lab: Lab
    sites: dict[str, LabSite]
    work: Path

    def __getitem__(self, name: str) -> LabSite:
        return self.sites[name]


def topology(names: Sequence[str], links: Sequence[tuple[str, str, str, str]], *, guests: bool = False) -> str:
    """Sites, and links (a, b, rate, delay one way). With `guests` every site has a bridge for them."""
    text = ['name = "fleet"']
    for name in names:
        text += ["[[site]]", f'name = "{name}"']
        if guests:
            text.append(f'guest_gateway = "{GATEWAY}"')
    for a, b, rate, delay in links:
        text += ["[[link]]", f'a = "{a}"', f'b = "{b}"', f'rate = "{rate}"', f'delay = "{delay}"']
    return "\n".join(text) + "\n"


@contextmanager
def fleet(
    names: Sequence[str],
    links: Sequence[tuple[str, str, str, str]],
    *,
    guests: bool = False,
    prepare: Callable[[str, Path], None] = lambda name, root: None,
    settings: Callable[[str], str] = lambda name: "",
) -> Iterator[Fleet]:
    """Brings everything up and takes everything down. `prepare(name, root)` fills a site's directory before it is a
    site; `settings(name)` are lines more for its site.toml."""
    with lab(topology(names, links, guests=guests)) as made:
        work = WORK / f"haulier-{made.name}"
        work.mkdir()
        sites = {name: LabSite(made, name, work / name) for name in names}
        try:
            for name, site in sites.items():
                prepare(name, site.root)
                control = f"{made.address(name)}:{CONTROL_PORT}"
                if site is sites[names[0]]:
                    site.haulier("site", "init", name, "--address", control)
                else:
                    token = sites[names[0]].facts("site", "token")["token"]
                    via = f"{made.address(names[0])}:{CONTROL_PORT}"
                    site.haulier("site", "join", "--via", via, "--token", token, name, "--address", control)
                config = site.root / "site.toml"
                ram = f"ram = {json.dumps(f'/dev/shm/haulier-{made.name}-{name}')}\n"
                config.write_text(config.read_text() + ram + settings(name))
                site.start_agent()
            for site in sites.values():
                site.client.sites()
            yield Fleet(made, sites, work)
        finally:
            for site in sites.values():
                with contextlib.suppress(Exception):
                    site.kill_agent(signal.SIGTERM)
            made.down()
            for site in sites.values():
                with contextlib.suppress(HaulierError):
                    shutil.rmtree(site.site.ram_dir, ignore_errors=True)
            shutil.rmtree(work, ignore_errors=True)
