"""The `assets` item: plain files, so that other programs can open the tokenizer where it lies."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from gptjax.checkpoint.directory import COMMIT_MARK


class FilesHandler(ocp.AsyncCheckpointHandler):
    """Writes a mapping from file name to bytes from the lead host, reads it on every host."""

    async def async_save(self, directory: epath.Path, args: FilesSave) -> list[Any]:
        async def write() -> None:
            if ocp.utils.is_primary_host(0):
                for name, content in args.files.items():
                    (directory / name).write_bytes(content)

        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="files_save")]

    def save(self, directory: epath.Path, args: FilesSave) -> None:
        for name, content in args.files.items():
            (directory / name).write_bytes(content)

    def restore(self, directory: epath.Path, args: FilesRestore | None = None) -> dict[str, bytes]:
        del args
        return read(directory)


@ocp.args.register_with_handler(FilesHandler, for_save=True)
@dataclasses.dataclass
class FilesSave(ocp.args.CheckpointArgs):
    """Names are plain, without directories."""

    files: Mapping[str, bytes]

    def __post_init__(self) -> None:
        for name in self.files:
            if "/" in name or name in ("", ".", ".."):
                raise ValueError(f"assets: {name!r} is not a plain file name")


@ocp.args.register_with_handler(FilesHandler, for_restore=True)
@dataclasses.dataclass
class FilesRestore(ocp.args.CheckpointArgs):
    """Reading takes no arguments; Orbax asks for the class."""


def read(directory: epath.Path) -> dict[str, bytes]:
    """Every file of the directory but Orbax's mark that the item is complete."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.name != COMMIT_MARK}
