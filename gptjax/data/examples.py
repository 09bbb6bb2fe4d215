"""Data sets of notebooks: sequences of examples, each of them token ids, a mapping with `input_ids`, or text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gptjax.data import packing
from gptjax.data.tokenizer import Tokenizer
from gptjax.types import Batch


def token_ids(example: Any) -> np.ndarray:
    """The ids of an example, which is a sequence of them or a mapping with `input_ids`; int32 `[length]`.

    Raises:
      ValueError: for anything else.
    """
    ids = example.get("input_ids") if isinstance(example, Mapping) else example
    found = np.asarray(ids)
    if found.ndim != 1 or (found.size and not np.issubdtype(found.dtype, np.integer)):
        raise ValueError(f"example {example!r:.80}: expected token ids, or a mapping with them as `input_ids`")
    return found.astype(np.int32)


def rows(
    dataset: Sequence[Any], tokenizer: Tokenizer | None, *, seq_len: int, name: str = "dataset"
) -> Iterator[np.ndarray]:
    """The ids of each example; a text is cut into rows of at most `seq_len`, the first behind the start token.

    Args:
      name: of the data set in errors.

    Raises:
      ValueError: for text without a tokenizer, an example that is longer than `seq_len`, and one string in place of
        several.
    """
    if isinstance(dataset, str):
        raise ValueError(f"{name}: expected examples, got one string {dataset!r:.40}; a text is ['...']")
    for number, example in enumerate(dataset):
        if not isinstance(example, str):
            ids = token_ids(example)
            if len(ids) > seq_len:
                raise ValueError(f"example {number} has {len(ids)} tokens, more than the model's seq_len={seq_len}")
            yield ids
            continue
        if tokenizer is None:
            raise ValueError(f"example {number} is text, which this model has no tokenizer for; give token ids")
        ids = np.asarray(tokenizer.encode_prompt(example), np.int32)
        yield from (ids[start : start + seq_len] for start in range(0, len(ids), seq_len))


def batch(rows: Sequence[np.ndarray], *, length: int, shift: int) -> Batch:
    """Rows of int32 and float32 numpy arrays, padded on the right.

    Args:
      shift: from a token to its target in the same row: 1 is the next one; the last have none.
    """
    found = packing.empty_batch(len(rows), length)
    arrays: Any = found
    for row, ids in enumerate(rows):
        targets = ids[shift:]
        arrays.tokens[row, : len(ids)] = ids
        arrays.targets[row, : len(targets)] = targets
        arrays.loss_mask[row, : len(targets)] = 1.0
        arrays.segment_ids[row, : len(ids)] = 1
        arrays.positions[row, : len(ids)] = np.arange(len(ids))
    return found
