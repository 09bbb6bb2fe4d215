"""What every entry point shares: flags, one-line errors, exit status."""

from __future__ import annotations

import contextlib
import json
import logging as python_logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from absl import app, flags, logging

from experiments import compilation_cache

if TYPE_CHECKING:
    from jax.sharding import Mesh

FAILED = 2
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, start it again
INTERRUPTED = 130  # what a shell says of a command ended by Ctrl-C

_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of a mistake in the configuration or the data.")


def start(main: Callable[[], int | None]) -> None:
    """Runs `main` under absl; an error that is for users becomes one line and exit status 2.

    Those are `ValueError`; `OSError`, from files that are missing, unreadable or on a full disk; and
    `ImportError`, from an optional package. Ctrl-C ends with status 130.
    """

    def run(argv: list[str]) -> int | None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.INFO)
            # JAX tells at this level which accelerators it did not find.
            python_logging.getLogger("jax").setLevel(python_logging.WARNING)
        try:
            _check(argv)
            return main()
        except (ValueError, OSError, ImportError) as error:
            if _DEBUG.value:
                raise
            return _fail(_text(error))
        except KeyboardInterrupt:
            print("stopped by Ctrl-C", file=sys.stderr)
            return INTERRUPTED

    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS["debug"])
    compilation_cache.configure()
    app.run(run, flags_parser=_parse)


def train(run: Callable[[], Mapping[str, object]]) -> int:
    """Connects the processes of the job, trains, and prints the summary that `run` returns; the exit status."""
    # Imported late: JAX must not be touched before the processes of a job are connected.
    from gptjax.kernels import cpu
    from gptjax.parallel import hosts, mesh

    cpu.configure_training()
    hosts.initialize()
    if mesh.platform() == "cpu":
        cpu.keep_freed_memory()
    if not hosts.is_lead():
        logging.set_verbosity(logging.WARNING)
    summary = run()
    if hosts.is_lead():
        print(json.dumps(summary, indent=2))
    return STOPPED if summary["outcome"] == "stopped" else 0


def print_table(rows: Mapping[str, object]) -> None:
    """One line a row, numbers under each other."""
    for name, value in rows.items():
        if isinstance(value, str | bool):
            print(f"{name:22}  {value}")
        else:
            print(f"{name:22}  {value:>14,.4f}" if isinstance(value, float) else f"{name:22}  {value:>14,}")


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


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except SystemExit:  # absl's --help ends with status 1
        sys.exit(0)
    except Exception as error:
        if "--debug" in argv:
            raise
        # A config file is Python, so anything can come out of it.
        sys.exit(_fail(_flags_text(error) if isinstance(error, flags.Error) else f"--config: {_config_text(error)}"))


def _check(argv: list[str]) -> None:
    """Raises ValueError for arguments that are no flags, and for an empty one, which would mean this directory."""
    if len(argv) > 1:
        raise ValueError(f"unexpected arguments: {' '.join(argv[1:])}; flags begin with --, see --help")
    for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0]):
        if flag.value == "":
            raise ValueError(f"--{flag.name} is empty; give it a value or leave it out")


def _flags_text(error: flags.Error) -> str:
    missing = re.findall(r"Flag --(\w+) must have a value other than None", str(error))
    if missing:
        return f"missing: {', '.join(f'--{name}' for name in missing)}; --help tells what they are"
    if isinstance(error, flags.DuplicateFlagError):
        return "--config is given twice; give it once"
    # Of a traceback from a config file the first line names the flag, the last one what is wrong.
    first, *rest = str(error).strip().splitlines()
    where = "the config's file has its keys" if first.startswith("flag --config.") else "--help lists the flags"
    return f"{first.partition(': ')[0]}: {rest[-1].strip()}" if rest else f"{first}; {where}"


def _config_text(error: Exception) -> str:
    if isinstance(error, KeyError):  # a section that the config does not have, with a suggestion on the second line
        return f"unknown key {'; '.join(str(error.args[0]).splitlines())}"
    return f"{type(error).__name__}: {error}"


def _text(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{os.fspath(error.filename)}: {error.strerror}"
    # ml_collections tells at length where it looked for a config file.
    return str(error).splitlines()[-1].strip() if type(error) is OSError and str(error) else str(error)


def _fail(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return FAILED
