"""What the processes of a mesh used: CPU time, memory, and what its stages did with their time."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from core import telemetry
from services.local.run_folder import ProcessRecord, find_process

SCRAPE_TIMEOUT_S = 5.0
STARVATION_CAUSES = ("schedule", "upstream", "wire", "serialise")
STAGE_COUNTERS = {
    "busy": telemetry.STAGE_BUSY,
    "stolen": telemetry.STAGE_STOLEN,
    "starved": telemetry.STAGE_STARVED,
    "wire": telemetry.STAGE_WIRE,
    "serialise": telemetry.STAGE_SERIALISE,
}


@dataclass(frozen=True, kw_only=True)
class ProcessReading:
    """One process at one moment. Stage seconds are empty for gateway and coordinator."""

    name: str
    cpu_s: float
    peak_memory_bytes: int
    stage_s: dict[str, float]


def read_processes(records: Sequence[ProcessRecord]) -> list[ProcessReading]:
    """Reads all processes that live."""
    found = ((record, find_process(record)) for record in records)
    return [_read(record, process) for record, process in found if process is not None]


def _read(record: ProcessRecord, process: psutil.Process) -> ProcessReading:
    times = process.cpu_times()
    is_stage = record.name.startswith("stage")
    return ProcessReading(
        name=record.name,
        cpu_s=times.user + times.system,
        peak_memory_bytes=peak_memory_bytes(process),
        stage_s=_stage_seconds(record.metrics_port) if is_stage else {},
    )


def peak_memory_bytes(process: psutil.Process) -> int:
    """Most memory that was resident at a time, as the kernel counts it; now, where it does not."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return int(process.memory_info().rss)
    match = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else int(process.memory_info().rss)


def _stage_seconds(metrics_port: int) -> dict[str, float]:
    url = f"http://127.0.0.1:{metrics_port}/metrics"
    with urllib.request.urlopen(url, timeout=SCRAPE_TIMEOUT_S) as answer:
        text = answer.read().decode()
    totals = {name: _total(text, metric.name) for name, metric in STAGE_COUNTERS.items()}
    for cause in STARVATION_CAUSES:
        label = f'penstock_cause="{cause}"'
        totals[f"starved_{cause}"] = _total(text, telemetry.STAGE_STARVED.name, label=label)
    return totals


def _total(text: str, metric_name: str, *, label: str = "") -> float:
    """Sum of a counter in seconds over all its labels, or those with `label`."""
    series = metric_name.replace(".", "_") + "_seconds_total"
    values = re.findall(rf"^{series}(?:{{[^}}]*{label}[^}}]*}})? (\S+)$", text, re.MULTILINE)
    return sum(float(value) for value in values)
