"""Progress bars of jobs, and their JSON lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from haulier.agent.client import Client
from haulier.cli.common import bars, plain, print_json


def wait(client: Client, job: Mapping[str, Any], json: bool) -> dict[str, Any]:
    """Waits for a job, showing how it goes; gives its result, raises its error."""
    if json:
        said: list[tuple[float, str]] = []

        def tell(now: dict[str, Any]) -> None:
            line = (round(float(now["progress"]), 2), str(now["message"]))
            if now["state"] == "running" and line not in said[-1:]:
                said.append(line)
                print_json({"event": "progress", "job": now["id"], "progress": line[0], "message": line[1]})

        return client.wait(job, tell)
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        console=bars,
        transient=True,
    ) as bar:
        task = bar.add_task(plain(f"{job['kind']} {job['about']}"), total=1.0)

        def show(now: dict[str, Any]) -> None:
            what = plain(f"{now['kind']} {now['about']}: {now['message']}")
            bar.update(task, completed=float(now["progress"]), description=what)

        return client.wait(job, show)
