"""C++ compiled once by this machine's own compiler, for its very processor, and kept between runs.

Libraries go to `$XDG_CACHE_HOME/gptjax/native` (`~/.cache/gptjax/native`), one for each source, compiler and kind of
processor. Each ends with a hash of itself, so that what is found damaged is compiled anew, and comes to its name in
one step, so that any number of processes may compile at once. The README says how to do without.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from gptjax import process

_SWITCH = "GPTJAX_CPU_KERNELS"
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-Wno-psabi")
_TIMEOUT_SECONDS = 180


class Unavailable(Exception):
    """There can be no library; the message says why."""


def library(source: Path, include: Path, environ: Mapping[str, str] = os.environ) -> tuple[ctypes.CDLL, str]:
    """The compiled library, and the key that it is kept by.

    Args:
      include: the directory of headers that the source needs.

    Raises:
      Unavailable: switched off, no compiler, no private place for it, or it does not compile.
    """
    if environ.get(_SWITCH) == "0":
        raise Unavailable(f"{_SWITCH}=0")
    command = [_compiler(environ), *_FLAGS, _for_this_processor()]
    key = _key(source, include, command)
    try:
        path = _private(_directory(environ)) / f"{source.stem}-{key}.so"
        if not _is_whole(path):
            _compile([*command, f"-isystem{include}", str(source)], path)
        return ctypes.CDLL(str(path)), key
    except (OSError, RuntimeError) as error:  # a home that is read-only, or none; a library that does not load
        raise Unavailable(str(error)) from error


def _compiler(environ: Mapping[str, str]) -> str:
    names = [environ["CXX"]] if environ.get("CXX") else _COMPILERS
    found = next(filter(None, (shutil.which(name, path=environ.get("PATH")) for name in names)), None)
    if found is None:
        raise Unavailable(f"no C++ compiler ({', '.join(names)}); install one, or set CXX to its name")
    return found


def _for_this_processor() -> str:
    return "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"


def _key(source: Path, include: Path, command: list[str]) -> str:
    """A hash of all that the library depends on."""
    try:
        version = subprocess.run([command[0], "--version"], capture_output=True, timeout=_TIMEOUT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"{command[0]} --version: {error}") from error
    headers = [path.read_bytes() for path in [*sorted(source.parent.glob("*.h")), *sorted(include.rglob("*.h"))]]
    text = "\n".join([*command, *process.processor()]).encode()
    return hashlib.sha256(b"\0".join([source.read_bytes(), *headers, version.stdout, text])).hexdigest()[:16]


def _directory(environ: Mapping[str, str]) -> Path:
    cache = environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "gptjax" / "native"


def _private(directory: Path) -> Path:
    """The directory, made if missing: who can write there can run code as this user."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = directory.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise Unavailable(f"{directory}: others can write there; expected a directory of this user alone, chmod 700")
    return directory


def _is_whole(path: Path) -> bool:
    """Whether the file is there and ends with the hash of all before it; loading a damaged one would crash."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    size = hashlib.sha256().digest_size
    return hashlib.sha256(content[:-size]).digest() == content[-size:]


def _compile(command: list[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        out = Path(scratch, path.name)
        try:
            done = subprocess.run([*command, "-o", str(out)], capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise Unavailable(f"{command[0]} took more than {_TIMEOUT_SECONDS} s") from error
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()[-1:]
            raise Unavailable(f"{command[0]} cannot compile {path.stem}: {''.join(errors[:1])}")
        with out.open("ab") as file:
            file.write(hashlib.sha256(out.read_bytes()).digest())
        out.replace(path)
