"""`python -m tests.benchmarks.simulated`: how busy the real scheduler keeps simulated pipelines.

Equal stages whose times vary by uniform +-20 %, each time anew; work for twice as many
micro-batches as stages; steady state.
"""

from __future__ import annotations

from rich.table import Table

from services.cli.console import out as console
from tests.support.simulated_load import twice_the_stages

NUM_STAGES = (2, 4, 8, 16, 32, 64)


def main() -> None:
    """Prints one row for each number of stages."""
    table = Table("stages", "busiest stage", "mean of all", "micro-batches in flight", box=None)
    for num_stages in NUM_STAGES:
        report = twice_the_stages(num_stages)
        busy_S = report.busy_S
        table.add_row(
            str(num_stages),
            f"{max(busy_S):.1%}",
            f"{sum(busy_S) / num_stages:.1%}",
            f"{report.mean_in_flight:.1f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
