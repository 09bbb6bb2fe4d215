"""Continues a text, the most likely token at a time, with the programs beside this file.

    python run.py "Once upon a time" --num=64
    python run.py --ids 1 403 263

Needs numpy and what runs the programs: jax and flatbuffers (StableHLO), onnxruntime (ONNX) or tensorflow (SavedModel);
for texts also the package tokenizers.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

_BUCKET = 64  # sizes are rounded up to multiples of it, so that few of them are compiled


class Model:
    """The programs of a folder, with their weights; `name` says what runs them."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.manifest = json.loads((folder / "manifest.json").read_text())
        self._programs = _PROGRAMS[self.manifest["format"]](folder, self.manifest)
        self.name = f"{self._programs.name}, numpy {np.__version__}"

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Float32 `[T, V]`: of the token after each prefix."""
        self._check(tokens, 0)
        if self._programs.logits is not None:
            return self._programs.logits(np.array([list(tokens)], np.int32))[0]
        logits, _ = self._read(tokens, 0, range(len(tokens)), self.empty_cache(1, _rounded(len(tokens))))
        return logits[0]

    def generate(self, tokens: Sequence[int], num: int, *, stop: Collection[int] = ()) -> list[int]:
        """The `num` most likely next tokens, one after the other; fewer where one is among `stop`."""
        self._check(tokens, num)
        cache = self.empty_cache(1, _rounded(len(tokens) + num))
        found: list[int] = []
        new, start = list(tokens), 0
        while len(found) < num and not (found and found[-1] in stop):
            logits, cache = self._read(new, start, [len(new) - 1], cache)
            found.append(int(logits[0, 0].argmax()))
            new, start = found[-1:], start + len(new)
        return found

    def empty_cache(self, batch: int, length: int) -> dict[str, Any]:
        """A cache without tokens, for positions below `length`."""
        sizes = {"batch": batch, "cache_len": length}
        return {
            entry["name"]: np.full([sizes.get(dim, dim) for dim in entry["shape"]], entry["fill"], entry["dtype"])
            for entry in self.manifest["cache"]
        }

    def step(
        self, tokens: np.ndarray, positions: np.ndarray, wanted: np.ndarray, cache: Mapping[str, Any]
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Reads int32 `tokens [B, T]` at `positions [B, T]`, -1 where a row has none, behind those in the cache.

        Returns:
          `(logits [B, R, V], cache)`, logits of the tokens at the indices `wanted [B, R]`; NaN for positions that the
          cache has no room for, or past the model's context.
        """
        return self._programs.step(tokens, positions, wanted, cache)

    def _read(self, tokens: Sequence[int], start: int, wanted: Sequence[int], cache: Mapping[str, Any]) -> Any:
        padding = 0 if len(tokens) == 1 else _rounded(len(tokens)) - len(tokens)
        ids, positions = [*tokens, *[0] * padding], [*range(start, start + len(tokens)), *[-1] * padding]
        first, second, third = (np.array([list(row)], np.int32) for row in (ids, positions, wanted))
        return self.step(first, second, third, cache)

    def _check(self, tokens: Sequence[int], num: int) -> None:
        size, context = self.manifest["vocab_size"], self.manifest["context"]
        if not tokens or not 0 <= min(tokens) <= max(tokens) < size:
            raise ValueError(f"tokens: expected one or more ids from 0 to {size - 1}, got {list(tokens)}")
        if len(tokens) + num > context:
            raise ValueError(f"{len(tokens)} + {num} tokens: the model's context is {context}; give fewer")


class _StableHlo:
    """Programs of `jax.export`, whose weights are arguments."""

    logits = None

    def __init__(self, folder: pathlib.Path, manifest: Mapping[str, Any]) -> None:
        import jax
        from jax import export

        stored = read_safetensors(folder)
        self._weights = [jax.device_put(stored[weight["name"]]) for weight in manifest["weights"]]
        self._names = [entry["name"] for entry in manifest["cache"]]
        self._prefill, self._decode = (
            jax.jit(export.deserialize(bytearray((folder / f"{name}.jax_export").read_bytes())).call, donate_argnums=3)
            for name in ("prefill", "decode")
        )
        self.name = f"jax {jax.__version__} on {jax.default_backend()}"

    def step(self, tokens: Any, positions: Any, wanted: Any, cache: Mapping[str, Any]) -> tuple[np.ndarray, Any]:
        program = self._decode if tokens.shape[1] == 1 else self._prefill
        given = [cache[name] for name in self._names]
        logits, updated = program(tokens, positions, wanted, given, self._weights)
        return np.asarray(logits), dict(zip(self._names, updated, strict=True))


class _SavedModel:
    """Signatures, which hold their weights."""

    def __init__(self, folder: pathlib.Path, manifest: Mapping[str, Any]) -> None:
        del manifest
        import tensorflow as tf

        self._constant, self._loaded = tf.constant, tf.saved_model.load(str(folder.parent))
        self.name = f"tensorflow {tf.__version__}"

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return self._loaded.signatures["serving_default"](tokens=self._constant(tokens))["logits"].numpy()

    def step(self, tokens: Any, positions: Any, wanted: Any, cache: Mapping[str, Any]) -> tuple[np.ndarray, Any]:
        program = self._loaded.signatures["decode" if tokens.shape[1] == 1 else "prefill"]
        given = {"tokens": tokens, "positions": positions, "wanted": wanted, **cache}
        updated = program(**{name: self._constant(value) for name, value in given.items()})
        return updated.pop("logits").numpy(), updated


class _Onnx:
    """Graphs over one file of weights; the one without a cache is loaded when it is asked for."""

    def __init__(self, folder: pathlib.Path, manifest: Mapping[str, Any]) -> None:
        import onnxruntime

        self._names = [entry["name"] for entry in manifest["cache"]]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it warns of initialisers that it folds
        self._load = functools.cache(
            lambda name: onnxruntime.InferenceSession(folder / name, options, providers=["CPUExecutionProvider"])
        )
        self.name = f"onnxruntime {onnxruntime.__version__} on CPU"

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return self._load("model.onnx").run(["logits"], {"tokens": tokens})[0]

    def step(self, tokens: Any, positions: Any, wanted: Any, cache: Mapping[str, Any]) -> tuple[np.ndarray, Any]:
        given = {"tokens": tokens, "positions": positions, "wanted": wanted, **cache}
        logits, *updated = self._load("step.onnx").run(None, given)
        return logits, dict(zip(self._names, updated, strict=True))


_PROGRAMS: dict[str, Any] = {"stablehlo": _StableHlo, "saved_model": _SavedModel, "onnx": _Onnx}


def _rounded(size: int) -> int:
    return -(-size // _BUCKET) * _BUCKET


def read_safetensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of all .safetensors files, mapped: eight bytes of header length, a JSON header, the values."""
    dtypes = {"F32": np.dtype("<f4"), "BF16": np.dtype("bfloat16"), "F16": np.dtype("<f2")}
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            data = np.memmap(path, np.uint8, "r", offset=8 + length + start, shape=(end - start,))
            found[name] = data.view(dtypes[entry["dtype"]]).reshape(entry["shape"])
    return found


def load_tokenizer(folder: pathlib.Path) -> Any:
    """The `tokenizers.Tokenizer` of a folder."""
    from tokenizers import Tokenizer

    found = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    found.encode_special_tokens = config.get("split_special_tokens", False)  # their text is then text
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Continues a text, the most likely token at a time.")
    parser.add_argument("text", nargs="?", help="the prompt")
    parser.add_argument("--ids", type=int, nargs="+", help="of the prompt's tokens, instead of a text")
    parser.add_argument("--num", type=int, default=32, help="how many tokens to add")
    options = parser.parse_args()
    if (options.text is None) == (options.ids is None):
        parser.error("give a text, or --ids of tokens")
    folder = pathlib.Path(__file__).resolve().parent
    model = Model(folder)
    if options.ids:
        print(*model.generate(options.ids, options.num))
        return
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(options.text).ids
    print(tokenizer.decode(ids + model.generate(ids, options.num, stop=model.manifest["special_ids"]["eos"])))


if __name__ == "__main__":
    main()
