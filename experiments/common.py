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
    """Runs `main` under absl; an error that is for users becomes one line and exit status 2.

    Those are `ValueError` and, from files that are missing, unreadable or on a full disk, `OSError`.
    """

    def run(argv: list[str]) -> int | None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.INFO)
            # JAX tells at this level which accelerators it did not find.
            python_logging.getLogger("jax").setLevel(python_logging.WARNING)
        try:
            return main(argv)
        except (ValueError, OSError) as error:
            if _DEBUG.value:
                raise
            return _fail(error)

    app.run(run, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, OSError) as error:  # what config_flags raises for an unknown key, a missing file
        if "--debug" in argv:
            raise
        sys.exit(_fail(error))


def _fail(error: Exception) -> int:
    # ml_collections wraps one error in another, whose text is the first one's representation.
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    text = error.args[0] if isinstance(error, KeyError) else error
    print(f"error: {text}", file=sys.stderr)
    return FAILED
