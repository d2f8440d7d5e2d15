"""Reads the metrics that a process serves to Prometheus."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True)
class Samples:
    """All samples of one scrape."""

    by_name: Mapping[str, list[tuple[dict[str, str], float]]]

    def value(self, name: str, labels: Mapping[str, str] | None = None) -> float:
        """Returns the one sample of `name` whose labels include `labels`."""
        wanted = (labels or {}).items()
        found = [value for seen, value in self.by_name.get(name, []) if wanted <= seen.items()]
        assert len(found) == 1, f"{len(found)} samples of {name} {dict(wanted)}"
        return found[0]


def scrape(port: int | None) -> Samples:
    """Asks the process on `port` for its metrics."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        text = response.read().decode()
    by_name: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            by_name.setdefault(sample.name, []).append((dict(sample.labels), sample.value))
    return Samples(by_name)
