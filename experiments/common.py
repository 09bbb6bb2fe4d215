"""What every entry point shares: flags, one-line errors, exit status."""

from __future__ import annotations

import logging as python_logging
import sys
from collections.abc import Callable

from absl import app, flags, logging

FAILED = 2
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, start it again

_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of a mistake in the configuration or the data.")


def start(main: Callable[[list[str]], int | None]) -> None:
    """Runs `main` under absl; a `ValueError`, which is for users, becomes one line and exit status 2."""

    def run(argv: list[str]) -> int | None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.INFO)
            # JAX tells at this level which accelerators it did not find.
            python_logging.getLogger("jax").setLevel(python_logging.WARNING)
        try:
            return main(argv)
        except ValueError as error:
            if _DEBUG.value:
                raise
            print(f"error: {error}", file=sys.stderr)
            return FAILED

    app.run(run)
