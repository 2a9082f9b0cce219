"""The files of a run: samples as they come; then ``report.json``, ``report.html`` and a CSV.

Each file is either whole or as it was before.
"""

import csv
import json
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from redux_server import __version__
from redux_server.bench import page
from redux_server.bench.measure import Measurement
from redux_server.bench.plan import Plan
from redux_server.bench.quality import SHEET_ROWS, read_output, small_jpeg
from redux_server.bench.task_client import COMPLETED, Sample
from redux_server.settings import UsageError

JSON, CSV, HTML = "report.json", "requests.csv", "report.html"
_OUTPUTS = "outputs"
_RESERVE_BYTES = 4 * 2**20
_LISTS = ("outputs", "flagged")
_COLUMNS = [each.name for each in fields(Sample)] + ["latency_s", "waiting_s"]
_SUFFIXES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp"}


class Folder:
    """The folder of a run. Samples are appended to the CSV as they end, so that a crash keeps them.

    Room for the report is set aside at the start: images may fill the disk. Raises ``UsageError``
    where it cannot be written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            (path / _OUTPUTS).mkdir(parents=True, exist_ok=True)
            self._reserve = path / f".reserve.{os.getpid()}"
            self._reserve.write_bytes(bytes(_RESERVE_BYTES))
            self._journal = (path / CSV).open("w", newline="", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--out {path}: {error.strerror}") from None
        self._writer = csv.writer(self._journal)
        self._writer.writerow(_COLUMNS)

    def close(self) -> None:
        """Close the journal, and give back the room that was set aside."""
        with suppress(OSError):  # what it could not write on a full disk
            self._journal.close()
        self._reserve.unlink(missing_ok=True)

    def record(self, sample: Sample) -> None:
        """Append one sample; on a full disk, ``write`` has it all the same."""
        with suppress(OSError):
            self._writer.writerow(_row(sample))
            self._journal.flush()

    def save(self, target: str, index: int, place: int, data: bytes) -> str:
        """Store an output; its place under the folder. Raises ``OSError``."""
        suffix = next((s for head, s in _SUFFIXES.items() if data.startswith(head)), ".bin")
        name = Path(_OUTPUTS, target, f"{index:05d}-{place}{suffix}")
        (self.path / name).parent.mkdir(exist_ok=True)
        try:
            (self.path / name).write_bytes(data)
        except OSError:
            (self.path / name).unlink(missing_ok=True)
            raise
        return str(name)

    def write(self, report: Mapping[str, Any], plan: Plan, measurement: Measurement) -> None:
        """Write all three files. Raises ``OSError``."""
        self.close()
        rows = [_COLUMNS, *map(_row, measurement.samples)]
        partial = self.path / f".{CSV}.{os.getpid()}.part"
        with partial.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
        partial.replace(self.path / CSV)
        write_whole(self.path / JSON, json.dumps(report, indent=1) + "\n")
        drawn = draw(report, plan, measurement, self.path)
        write_whole(self.path / HTML, page.page(report, drawn))


def write_whole(path: Path, text: str) -> None:
    """Write a file that is either whole or as it was. Raises ``OSError``."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_text(text, "utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def environment(idempotency: Mapping[str, bool]) -> dict[str, Any]:
    """Of this side: what measured, and on what. Names no host and no user."""
    told: dict[str, Any] = {
        "flux-redux": __version__,
        "python": platform.python_version(),
        "aiohttp": package_version("aiohttp"),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
    }
    for name, has_keys in idempotency.items():
        told[f"submits to {name}"] = (
            "repeated under an Idempotency-Key" if has_keys else "never repeated"
        )
    return told


def draw(
    report: Mapping[str, Any], plan: Plan, measurement: Measurement, folder: Path
) -> page.Drawn:
    """Plots and contact sheet."""
    from redux_server.bench import plots  # not before: matplotlib is heavy beside open tasks

    targets = report["targets"]
    seconds = {name: told["samples"]["latency_s"] for name, told in targets.items()}
    began_at = measurement.began_at
    points = {
        name: [
            (((each.scheduled_at or each.sent_at) - began_at) / 60, each.latency_s)
            for each in measurement.of(name)
            if each.outcome == COMPLETED and each.latency_s is not None
        ]
        for name in targets
    }
    knees = {
        name: told["knee"]["images_per_minute"] if told["knee"] else None
        for name, told in targets.items()
    }
    even = [each["images_per_day"] for each in report["break_even"].values()]
    return page.Drawn(
        cdf=plots.latency_cdf(seconds),
        timeline=plots.timeline(points),
        rate=plots.latency_over_rate(
            {name: told["probes"] for name, told in targets.items()}, knees, plan.slo_s
        ),
        cost=plots.cost_over_images(
            plan.targets,
            {name: told["capacity_per_minute"] for name, told in targets.items()},
            next((each for each in even if each), None),
        ),
        sheet=_sheet(plan, measurement, folder),
    )


def _sheet(plan: Plan, measurement: Measurement, folder: Path) -> list[page.Row]:
    """Requests that most targets completed, another picture in each row as long as there are."""
    names = [target.name for target in plan.targets]
    done: dict[int, dict[str, str]] = {}
    for sample in measurement.samples:
        if sample.outcome == COMPLETED and sample.outputs:
            done.setdefault(sample.index, {})[sample.target] = sample.outputs[0]
    ordered = sorted(done, key=lambda index: (-len(done[index]), index))
    rows = []
    for index in sorted(ordered[:SHEET_ROWS]):
        request = plan.workload.request(index)
        source = plan.workload.pictures[request.picture].open()
        rows.append(
            page.Row(
                f"seed {request.seed}",
                None if source is None else small_jpeg(source),
                [_small(folder, done[index].get(name)) for name in names],
            )
        )
    return rows


def _small(folder: Path, name: str | None) -> bytes | None:
    if name is None:
        return None
    try:
        return small_jpeg(read_output(folder / name))
    except ValueError:
        return None


def _row(sample: Sample) -> Sequence[Any]:
    values = {name: getattr(sample, name) for name in _COLUMNS}
    for name in _LISTS:
        values[name] = " ".join(str(each) for each in values[name])
    return [f"{each:.6f}" if isinstance(each, float) else each for each in values.values()]
