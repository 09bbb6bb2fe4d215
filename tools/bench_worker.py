"""What every process that `tools/bench.py` starts has in common: it answers requests on stdin with lines of JSON.

Needs the standard library alone, so that it works in the environment of any library; import it
before that library, since time to the first step is counted from here.

    parent starts us         we answer {"first_step_seconds": …} and what `serve` was told about us
    "measure"                {"wall_seconds": …, "processor_seconds": …}, each for one step
    "finish", or stdin ends  {"peak_memory_bytes": …}, then we end
"""

from __future__ import annotations

import importlib.metadata
import json
import resource
import sys
import time
from collections.abc import Callable

# One whole step: returns when its results are there, not when they have been asked for.
Run = Callable[[], None]

_STARTED = time.perf_counter()
_MIN_MEASUREMENT_SECONDS = 0.2


def serve(run: Run, *, num_params: int, packages: tuple[str, ...]) -> None:
    """Runs the first step and then measures until told to finish.

    Args:
      run: one step.
      num_params: of the model, from which a reader sees whether the contestants have the same one.
      packages: distributions whose versions are reported.
    """
    run()
    first_step_seconds = time.perf_counter() - _STARTED
    versions = {name: importlib.metadata.version(name) for name in packages}
    _answer(first_step_seconds=first_step_seconds, num_params=num_params, versions=versions)
    run()
    start = time.perf_counter()
    run()
    repeats = max(1, round(_MIN_MEASUREMENT_SECONDS / (time.perf_counter() - start)))
    for request in sys.stdin:
        if request.strip() == "finish":
            break
        wall, processor = time.perf_counter(), time.process_time()
        for _ in range(repeats):
            run()
        _answer(
            wall_seconds=(time.perf_counter() - wall) / repeats,
            processor_seconds=(time.process_time() - processor) / repeats,
        )
    _answer(peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _answer(**values: object) -> None:
    print(json.dumps(values), flush=True)
