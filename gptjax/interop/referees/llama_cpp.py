"""llama.cpp, of the `xllamacpp` wheel, as the referee of GGUF files.

It runs in a process of its own: where it does not like a file it aborts, and its threads and those of JAX do not mix.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import pathlib
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import sentencepiece
from absl import logging

from gptjax.data.tokenizer import Tokenizer
from gptjax.interop import gguf
from gptjax.interop.certificate import Tolerance
from gptjax.interop.gguf import tokenizer as gguf_tokenizer
from gptjax.interop.gguf import write as gguf_write
from gptjax.interop.gguf.file import is_float, read_header
from gptjax.interop.source import Source
from gptjax.nn.config import ModelConfig

_PROGRAM = pathlib.Path(__file__).with_name("llama_cpp_process.py")
DEFAULT_MAX_CONTEXT = 4096
_SPACE = "\u2581"


class LlamaCppRunner:
    """A `Runner` of a GGUF file; keys and values are kept in float32, products are as llama.cpp makes them.

    Those with quantised weights have activations rounded to 8 bits, so that logits differ from ours by that.

    Args:
      max_context: tokens of a prompt and its continuation, at most; memory is taken for them.
      tokenizer: as it is read from the file here. Within a text the text of a special token is that token, as for the
        kind `huggingface` here, or text like any other, as for the kind `sentencepiece`.

    Raises:
      ImportError: without xllamacpp.
      ValueError: if llama.cpp cannot load the file, with the end of what it said.
    """

    def __init__(
        self,
        file: pathlib.Path,
        *,
        max_context: int = DEFAULT_MAX_CONTEXT,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        _require_package()
        self._file, self._tokenizer = file, tokenizer
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, str(_PROGRAM), str(file), str(max_context)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        self._end = weakref.finalize(self, _end, self._process)
        description, _ = self._answer()
        self.name = f"llama.cpp of xllamacpp {description['version']}"
        self._has_tokenizer: bool = description["has_tokenizer"]

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        return self._call("logits", list(map(int, tokens)))

    def greedy(self, tokens: Sequence[int], num_tokens: int) -> list[int]:
        return self._call("greedy", list(map(int, tokens)), num_tokens).tolist()

    def encode(self, text: str) -> list[int] | None:
        if not self._has_tokenizer:
            return None
        is_text = self._tokenizer is not None and self._tokenizer.kind == "sentencepiece"
        return self._call("encode", text, not is_text).tolist()

    def known_difference(self, tokenizer: Tokenizer, text: str) -> str | None:
        """See the function of this name."""
        return known_difference(tokenizer, text)

    def as_run(self, model: ModelConfig) -> tuple[ModelConfig, str]:
        """See `gguf.write.as_run`."""
        return gguf_write.as_run(model)

    def hidden(self, tokens: Sequence[int]) -> None:
        return None

    def close(self) -> None:
        """Ends the process, as forgetting this object does."""
        self._end()

    def _call(self, name: str, *arguments: Any) -> np.ndarray:
        stdin = self._process.stdin
        assert stdin is not None, "it is a pipe"
        try:
            stdin.write(json.dumps({"call": name, "arguments": arguments}).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            pass  # said by `_answer`
        description, content = self._answer()
        return np.frombuffer(content, description["dtype"]).reshape(description["shape"])

    def _answer(self) -> tuple[dict[str, Any], bytes]:
        stdout = self._process.stdout
        assert stdout is not None, "it is a pipe"
        line = stdout.readline()
        if not line:
            code = self._process.wait()
            raise ValueError(f"{self._file}: llama.cpp ended with code {code}: {self._last_words()}")
        description = json.loads(line)
        content = stdout.read(description["bytes"])
        if "error" in description:
            raise ValueError(f"{self._file}: {description['error']}: {self._last_words()}")
        return description, content

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()
        failures = [line for line in lines if any(word in line.lower() for word in ("error", "fail", "assert"))]
        return " | ".join((failures or lines)[-4:])


def of_file(path: pathlib.Path) -> LlamaCppRunner:
    """The runner of a GGUF file, or of the one in a folder, that encodes as the tokenizer read from it here does."""
    file = gguf.find(path)
    return LlamaCppRunner(file, tokenizer=gguf_tokenizer.read(read_header(file)))


def of_source(source: Source) -> LlamaCppRunner:
    """The runner of a GGUF source, given its values in float32 where they are quantised, and of llama2.c's.

    With quantised weights llama.cpp rounds activations to 8 bits too: its logits are then some way off those of the
    very values in the file, and say little of a conversion. The file in float32 is a temporary one; where it does not
    fit, llama.cpp is given the source itself.

    Raises:
      ImportError: without xllamacpp.
      ValueError: if llama.cpp cannot load it.
    """
    if source.format == "gguf" and all(is_float(each.kind) for each in read_header(source.path).tensors.values()):
        return of_file(source.path)
    _require_package()
    num_bytes = sum(4 * math.prod(tensor.shape) for tensor in source.tensors.values())
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if source.format == "gguf" and num_bytes > 0.8 * free:
        logging.warning(
            "%s: llama.cpp runs it quantised: %.1f GB in float32 do not fit into %s; set TMPDIR to where there is room",
            source.path, num_bytes / 1e9, tempfile.gettempdir(),
        )  # fmt: skip
        return of_file(source.path)
    with tempfile.TemporaryDirectory(prefix="gptjax-") as folder:
        file = pathlib.Path(folder) / f"{source.path.stem}.gguf"
        # llama2.c's own tokenizer is not llama.cpp's: where the two differ says nothing of the model.
        gguf_write.write_source(
            source if source.format == "gguf" else dataclasses.replace(source, tokenizer=None), file
        )
        runner = of_file(file)  # which keeps the file open
    runner.name += ", of the file's values in float32"
    return runner


def known_difference(tokenizer: Tokenizer, text: str) -> str | None:
    """Why llama.cpp gives a text other ids than the tokenizer that a GGUF file was written with; None if it does not.

    Its code has no place for what the tokenizer does there: it is no fault of a conversion.
    """
    if tokenizer.kind == "sentencepiece":
        if _SPACE in text:
            return "a genuine U+2581, which llama.cpp takes for a space"
        processor = sentencepiece.SentencePieceProcessor()
        processor.load_from_serialized_proto(tokenizer.serialized)
        plain = (_SPACE if tokenizer.has_dummy_prefix and text else "") + text.replace(" ", _SPACE)
        return (
            None if processor.normalize(text) == plain else "SentencePiece normalises it, which llama.cpp does not do"
        )
    if tokenizer.kind == "huggingface":
        return gguf_tokenizer.known_difference(tokenizer, text)
    return None


def tolerance(model: ModelConfig, base: Tolerance) -> Tolerance:
    """What llama.cpp may be off by where the conversion alone may be off by `base`.

    It looks GELU up in a table of float16, whatever the weights are.
    """
    if not any(block.mlp.activation.startswith(("gelu", "geglu")) for block in model.blocks):
        return base
    table = Tolerance(max_logit=0.1, mean_kl=1e-4, greedy=0.9)
    return Tolerance(
        max_logit=max(base.max_logit, table.max_logit),
        mean_kl=max(base.mean_kl, table.mean_kl),
        greedy=min(base.greedy, table.greedy),
    )


def _require_package() -> None:
    if importlib.util.find_spec("xllamacpp") is None:
        raise ImportError("llama.cpp as a referee needs xllamacpp: pip install 'gptjax[referees]'")


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
