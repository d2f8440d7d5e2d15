"""A peer's side of the pipe: it loads once, then does one task a line until the pipe closes.

Runs in the peer's own environment, so it imports nothing of ours. Tasks come on standard input,
results leave on what was standard output; what the peer prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

# Answers all prompts at once with so many new tokens each; returns how many came.
Generate = Callable[[list[list[int]], int], int]


def answer_tasks(load: Callable[[dict[str, Any]], Generate]) -> None:
    """The first line holds the options of `load`, all others `prompts` and `num_new_tokens`."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(**content: float) -> None:
        print(json.dumps(content), file=results, flush=True)

    started_s = time.perf_counter()
    generate = load(json.loads(sys.stdin.readline()))
    reply(seconds=time.perf_counter() - started_s)
    for line in sys.stdin:
        task = json.loads(line)
        started_s = time.perf_counter()
        num_tokens = generate(task["prompts"], task["num_new_tokens"])
        reply(seconds=time.perf_counter() - started_s, num_tokens=num_tokens)
