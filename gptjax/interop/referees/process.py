"""A Python process that cannot see gptjax, which answers requests in lines of JSON."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Sequence
from typing import IO, Any

import numpy as np

# A module that is None in `sys.modules` cannot be imported, wherever it may be installed. What libraries print goes
# to stderr, so that stdout has answers alone.
_SERVER = """
import json, sys
sys.modules["gptjax"] = None
sys.path.extend(json.loads(sys.argv[2]))
out, sys.stdout = sys.stdout, sys.stderr
def answer(value):
    ours = [name for name, module in sys.modules.items() if name.split(".")[0] == "gptjax" and module is not None]
    print(json.dumps({"answer": value, "ours": ours}), file=out, flush=True)
"""
_LOOP = """
import numpy
for line in sys.stdin:
    request = json.loads(line)
    if request["call"] == "logits":
        numpy.save(request["file"], model.logits(request["tokens"]))
        answer(None)
    elif request["call"] == "encode":
        answer(model.encode(request["text"]))
    else:
        answer(model.generate(request["tokens"], request["num"]))
"""


class BareProcess:
    """Runs a program of another framework; a context manager, whose process ends with it.

    Args:
      folder: of what was exported, `sys.argv[1]` there.
      setup: Python that makes `model`, with `logits(tokens)`, `generate(tokens, num)` and `encode(text)`, and calls
        `answer` once with a text that says what runs.
      packages: that it needs; their folders are all that the process sees besides the standard library.

    Raises:
      RuntimeError: with what the process printed, if it ended.
    """

    def __init__(self, folder: pathlib.Path, *, setup: str, packages: Sequence[str]) -> None:
        self._files = tempfile.TemporaryDirectory()
        self._errors = (pathlib.Path(self._files.name) / "stderr").open("w+")
        arguments = [str(folder.resolve()), json.dumps(_folders(packages))]
        # -I: neither the environment's paths nor the working directory; -S: no .pth files, so no editable installs;
        # -B: nothing is written beside what was exported.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", _SERVER + setup + _LOOP, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=self._files.name,
            text=True,
        )
        # However the user lets go of it, the process ends.
        self._end = weakref.finalize(self, _end, self._process, self._errors, self._files)
        self.name: str = self._answer()

    def __enter__(self) -> BareProcess:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        self._end()

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        file = pathlib.Path(self._files.name) / "logits.npy"
        self._ask(call="logits", tokens=list(tokens), file=str(file))
        return np.load(file, allow_pickle=False)

    def greedy(self, tokens: Sequence[int], num_tokens: int) -> list[int]:
        return self._ask(call="generate", tokens=list(tokens), num=num_tokens)

    def encode(self, text: str) -> list[int] | None:
        return self._ask(call="encode", text=text)

    def hidden(self, tokens: Sequence[int]) -> None:
        """Programs give logits alone."""

    def _ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:  # `_answer` says why
            pass
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise RuntimeError(f"the process that runs what was exported ended:\n{self._errors.read()[-2000:]}")
        answer = json.loads(line)
        if answer["ours"]:
            raise RuntimeError(f"the process that must do without gptjax has loaded {answer['ours']}")
        return answer["answer"]


def _end(process: subprocess.Popen[str], errors: IO[str], files: tempfile.TemporaryDirectory[str]) -> None:
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    process.wait()
    process.stdout.close()
    errors.close()
    files.cleanup()


def _folders(packages: Sequence[str]) -> list[str]:
    folders: dict[str, None] = {}
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ImportError(f"running what was exported needs the package {package}, which is not installed")
        folders[str(pathlib.Path(spec.origin).parent.parent)] = None
    return list(folders)
