"""Continues token ids, the most likely token at a time, with the programs beside this file.

    python run.py 1 403 263 --num=32

Needs jax, numpy and flatbuffers.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

_BUCKET = 64  # sizes are rounded up to multiples of it, so that few of them are compiled
_DTYPES = {"F32": np.dtype("<f4"), "BF16": np.dtype(jnp.bfloat16), "F16": np.dtype("<f2")}


class Model:
    """The programs of a folder, with their weights on the first device."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.manifest = json.loads((folder / "manifest.json").read_text())
        stored = read_safetensors(folder)
        self.weights = [jnp.asarray(stored[weight["name"]]) for weight in self.manifest["weights"]]
        self._prefill, self._decode = (
            jax.jit(export.deserialize(bytearray((folder / f"{name}.jax_export").read_bytes())).call, donate_argnums=3)
            for name in ("prefill", "decode")
        )

    def empty_cache(self, batch: int, length: int) -> list[jax.Array]:
        """A cache without tokens, for positions below `length`."""
        sizes = {"batch": batch, "cache_len": length}
        return [
            jnp.full([sizes.get(dim, dim) for dim in entry["shape"]], entry["fill"], entry["dtype"])
            for entry in self.manifest["cache"]
        ]

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Float32 `[T, V]`: of the token after each prefix."""
        self._check(tokens, 0)
        padded = _rounded(len(tokens))
        logits, _ = self._read(tokens, np.arange(padded), self.empty_cache(1, padded))
        return np.asarray(logits[0, : len(tokens)])

    def generate(self, tokens: Sequence[int], num: int) -> list[int]:
        """The `num` most likely next tokens, one after the other."""
        self._check(tokens, num)
        cache = self.empty_cache(1, _rounded(len(tokens) + num))
        logits, cache = self._read(tokens, np.array([len(tokens) - 1]), cache)
        found = [int(logits[0, 0].argmax())]
        for position in range(len(tokens), len(tokens) + num - 1):
            one, at, wanted = (np.array([[value]], np.int32) for value in (found[-1], position, 0))
            logits, cache = self._decode(one, at, wanted, cache, self.weights)
            found.append(int(logits[0, 0].argmax()))
        return found

    def _check(self, tokens: Sequence[int], num: int) -> None:
        size, context = self.manifest["vocab_size"], self.manifest["context"]
        if not tokens or not 0 <= min(tokens) <= max(tokens) < size:
            raise ValueError(f"tokens: expected one or more ids from 0 to {size - 1}, got {list(tokens)}")
        if self.manifest["positions"] == "learned" and len(tokens) + num > context:
            raise ValueError(f"{len(tokens)} + {num} tokens: the model has learned {context} positions; give fewer")

    def _read(self, tokens: Sequence[int], wanted: np.ndarray, cache: list[jax.Array]) -> tuple[Any, Any]:
        padding = _rounded(len(tokens)) - len(tokens)
        ids = np.pad(np.asarray([tokens], np.int32), ((0, 0), (0, padding)))
        positions = np.pad(np.arange(len(tokens), dtype=np.int32)[None], ((0, 0), (0, padding)), constant_values=-1)
        return self._prefill(ids, positions, wanted[None].astype(np.int32), cache, self.weights)


def _rounded(size: int) -> int:
    return -(-size // _BUCKET) * _BUCKET


def read_safetensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of all .safetensors files, mapped: eight bytes of header length, a JSON header, the values."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            data = np.memmap(path, np.uint8, "r", offset=8 + length + start, shape=(end - start,))
            found[name] = data.view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Continues token ids, the most likely token at a time.")
    parser.add_argument("tokens", type=int, nargs="+", help="ids of the prompt")
    parser.add_argument("--num", type=int, default=32, help="how many tokens to add")
    options = parser.parse_args()
    model = Model(pathlib.Path(__file__).resolve().parent)
    print(*model.generate(options.tokens, options.num))


if __name__ == "__main__":
    main()
