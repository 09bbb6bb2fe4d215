"""What every entry point shares: flags, one-line errors, exit status."""

from __future__ import annotations

import contextlib
import logging as python_logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from absl import app, flags, logging

from experiments import compilation_cache
from gptjax.json_files import write_json
from gptjax.kernels import cpu

if TYPE_CHECKING:
    from jax.sharding import Mesh

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

    cpu.configure()
    compilation_cache.configure()
    app.run(run, flags_parser=_parse)


@contextlib.contextmanager
def all_devices(axis: str) -> Iterator[Mesh]:
    """Connects the processes of the job, and runs what is inside on a mesh with every device on `axis`.

    Only the lead host prints.
    """
    from gptjax.parallel import hosts, mesh

    hosts.initialize()
    with contextlib.ExitStack() as stack:
        if not hosts.is_lead():
            logging.set_verbosity(logging.WARNING)
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield stack.enter_context(mesh.use(mesh.all_devices(axis)))


def write_summary(path: str | None, summary: dict[str, Any]) -> None:
    """Writes the file from the lead host, if there is to be one."""
    from gptjax.parallel import hosts

    if path and hosts.is_lead():
        write_json(path, summary)


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
