"""What each method of compression costs a model in perplexity, and takes in time and memory; one line each.

    python -m tools.compression_table --ckpt=models/smollm2 --calibration=wiki.train.txt --test=wiki.valid.txt
    python -m tools.compression_table ... --only='int4|sparsegpt' --also=q4_0=models/smollm2-q4_0 --out=table.json
    python -m tools.compression_table --random=configs/llama_1b.py --only='gptq|sparsegpt' --calibration_rows=16

The test's rows are its first tokens, one row after the other; all of them where --test_rows=0. Ratios are of
perplexities, to the model's own on the same rows, with the standard error over rows; `start` is the ratio on the first
16 rows alone, as differences within a text of that length are easily taken for more than they are. Of a --random model,
whose text is random too, only the time and the memory mean something. Seconds are those of the method, with
compilation where programs were not compiled before; the memory is the most that the device held until then, or
the process where a device does not say.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags

from experiments import compilation_cache, run_config_flag

compilation_cache.configure()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import gptjax  # noqa: E402
from gptjax import config as config_lib  # noqa: E402
from gptjax.compress import prune, quantize, sparsegpt, text  # noqa: E402
from gptjax.eval import perplexity  # noqa: E402
from gptjax.nn import quant_spec, transformer  # noqa: E402
from gptjax.nn.config import ModelConfig  # noqa: E402
from gptjax.nn.spec import ModelSpec  # noqa: E402
from gptjax.optim import sparsity  # noqa: E402
from gptjax.types import Array, Batch, Params  # noqa: E402

_CKPT = flags.DEFINE_string("ckpt", None, "The model.")
_RANDOM = flags.DEFINE_string("random", None, "Or a configuration, of which a model with random weights is made.")
_CALIBRATION = flags.DEFINE_string("calibration", None, "Text, as of experiments.quantize.")
_TEST = flags.DEFINE_string("test", None, "Text file.")
_CALIBRATION_ROWS = flags.DEFINE_integer("calibration_rows", 16, "Rows of calibration text.")
_TEST_ROWS = flags.DEFINE_integer("test_rows", 16, "Rows of the test, 0: all.")
_LENGTH = flags.DEFINE_integer("length", 512, "Tokens of a row.")
_BATCH = flags.DEFINE_integer("batch", 16, "Rows at once.")
_ONLY = flags.DEFINE_string("only", "", "Regular expression that finds the methods' names; all unless given.")
_ALSO = flags.DEFINE_multi_string("also", [], "NAME=CHECKPOINT to score on the same rows, once for each.")
_OUT = flags.DEFINE_string("out", None, "JSON file of the table, which grows line by line.")
_START_ROWS = 16

Made = tuple[ModelConfig, Params]


def _few_bits(form: str, method: str) -> Callable[[ModelConfig, Params, Sequence[Array]], Made]:
    def make(cfg: ModelConfig, params: Params, batches: Sequence[Array]) -> Made:
        quant = dataclasses.replace(quant_spec.parse(form), stage="stored")
        found = quantize.METHODS[method]
        used = batches if found.is_calibrated else ()
        result = quantize.quantize(cfg, params, quant, method=found, batches=used, told=_told)
        for note in result.notes:
            print(f"  {note}", flush=True)
        return result.model, result.params

    return make


def _zeros(amount: str, method: Any, **options: Any) -> Callable[[ModelConfig, Params, Sequence[Array]], Made]:
    def make(cfg: ModelConfig, params: Params, batches: Sequence[Array]) -> Made:
        return prune.prune(cfg, params, batches, method=method, sparsity=sparsity.parse(amount), told=_told, **options)

    return make


_FORMATS = {
    "int8": "int8",
    "int8 x int8": "int8,activations=int8",
    "int4 32": "int4:g32:sym",
    "int4 64 zeros": "int4:g64:asym",
    "int3 64 zeros": "int3:g64:asym",
}
METHODS: Mapping[str, Callable[[ModelConfig, Params, Sequence[Array]], Made]] = {
    "int8 rtn": _few_bits(_FORMATS["int8"], "rtn"),
    "int8 gptq": _few_bits(_FORMATS["int8"], "gptq"),
    "int8 x int8 rtn": _few_bits(_FORMATS["int8 x int8"], "rtn"),
    "int8 x int8 smoothquant": _few_bits(_FORMATS["int8 x int8"], "smoothquant"),
    **{
        f"{name} {method}": _few_bits(_FORMATS[name], method)
        for name in ("int4 32", "int4 64 zeros", "int3 64 zeros")
        for method in ("rtn", "awq", "gptq")
    },
    "kv int8": _few_bits("kv_cache=int8", "rtn"),
    "kv int4": _few_bits("kv_cache=int4", "rtn"),
    **{
        f"{name} {method}": _zeros(amount, method.split()[0], **options)
        for name, amount in (("50 %", "0.5"), ("2:4", "2:4"))
        for method, options in (
            ("magnitude", {}),
            ("wanda", {}),
            ("sparsegpt as published", {"config": sparsegpt.PUBLISHED}),
            ("sparsegpt", {}),
        )
    },
}


class Rows(NamedTuple):
    """int32 tokens: of the test `[rows, length + 1]`, and batches of the calibration."""

    test: np.ndarray
    calibration: list[Array]


def main(_: list[str]) -> None:
    cfg, params, rows = _real() if _CKPT.value else _random()
    chosen = {name: make for name, make in METHODS.items() if re.search(_ONLY.value, name)}
    print(f"{len(rows.test)} rows of {_LENGTH.value} tokens, {jax.devices()[0].device_kind}", flush=True)
    own_R = _nats(cfg, params, rows.test)
    lines = [_line("as it is", own_R, own_R, (cfg, params), params, seconds=0.0)]
    for name, make in chosen.items():
        began = time.perf_counter()
        try:
            made = jax.block_until_ready(make(cfg, params, rows.calibration))
        except ValueError as error:
            print(f"{name:32} {error}", flush=True)
            continue
        seconds = time.perf_counter() - began
        lines.append(_line(name, _nats(*made, rows.test), own_R, made, params, seconds=seconds))
        _write(lines)
    for name, path in (also.split("=", 1) for also in _ALSO.value):
        model = gptjax.load(path)
        made = model.config, model.params
        lines.append(_line(name, _nats(*made, rows.test), own_R, made, params, seconds=0.0))
        _write(lines)


def _write(lines: list[dict[str, Any]]) -> None:
    if _OUT.value:
        pathlib.Path(_OUT.value).write_text(json.dumps(lines, indent=1))


def _line(
    name: str, nats_R: np.ndarray, own_R: np.ndarray, made: Made, original: Params, *, seconds: float
) -> dict[str, Any]:
    mean, error = _ratio(nats_R - own_R)
    start, start_error = _ratio((nats_R - own_R)[:_START_ROWS])
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(made[1])) / sum(
        leaf.nbytes for leaf in jax.tree.leaves(original)
    )
    line = {
        "name": name,
        "perplexity": float(np.exp(nats_R.mean())),
        "ratio": mean,
        "error": error,
        "start": start,
        "start_error": start_error,
        "memory": size,
        "seconds": seconds,
        "peak_bytes": _peak(),
    }
    print(
        f"{name:32} {line['perplexity']:9.3f}  {mean:8.4f} +- {error:.4f}  start {start:8.4f} +- {start_error:.4f}  "
        f"{size:6.1%}  {seconds:6.1f} s  {line['peak_bytes'] / 1e9:6.2f} GB",
        flush=True,
    )
    return line


def _ratio(nats_R: np.ndarray) -> tuple[float, float]:
    mean = float(np.exp(nats_R.mean()))
    return mean, mean * float(nats_R.std(ddof=1)) / len(nats_R) ** 0.5 if len(nats_R) > 1 else float("nan")


def _nats(cfg: ModelConfig, params: Params, tokens: np.ndarray) -> np.ndarray:
    """The mean nats of each row."""
    found = []
    for start in range(0, len(tokens), _BATCH.value):
        # The last batch is filled up, so that there is one program.
        rows = tokens[np.minimum(np.arange(start, start + _BATCH.value), len(tokens) - 1)]
        shape = rows.shape[0], rows.shape[1] - 1
        batch = Batch(
            tokens=jnp.asarray(rows[:, :-1]),
            targets=jnp.asarray(rows[:, 1:]),
            loss_mask=jnp.ones(shape),
            segment_ids=jnp.ones(shape, jnp.int32),
            positions=jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape),
        )
        found.append(np.asarray(perplexity.token_nll(cfg, params, batch)[0], np.float64).mean(1))
    return np.concatenate(found)[: len(tokens)]


def _real() -> tuple[ModelConfig, Params, Rows]:
    if not (_TEST.value and _CALIBRATION.value):
        raise app.UsageError("--ckpt needs --test and --calibration")
    model = gptjax.load(_CKPT.value)
    if model.tokenizer is None:
        raise app.UsageError(f"{_CKPT.value} has no tokenizer to read text with")
    length = _LENGTH.value
    tokens = np.asarray(model.tokenizer.encode(pathlib.Path(_TEST.value).read_text()), np.int32)
    num_rows = min(_TEST_ROWS.value or len(tokens), (len(tokens) - 1) // length)
    test = np.stack([tokens[row * length : (row + 1) * length + 1] for row in range(num_rows)])
    seen = text.calibration(_CALIBRATION.value, model.tokenizer, rows=_CALIBRATION_ROWS.value, length=length)
    return model.config, model.params, Rows(test, seen.batches(rows_at_once=_BATCH.value))


def _random() -> tuple[ModelConfig, Params, Rows]:
    if not _RANDOM.value:
        raise app.UsageError("give --ckpt, or --random")
    cfg = config_lib.from_dict(ModelSpec, run_config_flag.read(_RANDOM.value).model).build()
    params = transformer.init(cfg, jax.random.key(0))
    shape = _CALIBRATION_ROWS.value, _LENGTH.value + 1
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, shape, dtype=np.int32)
    seen = text.Calibration("random", tokens[:, :-1]).batches(rows_at_once=_BATCH.value)
    return cfg, params, Rows(tokens[: _TEST_ROWS.value or None], seen)


def _num_bytes(params: Params) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def _told(layer: int) -> None:
    if sys.stdout.isatty():  # where the next line takes its place
        print(f"  layer {layer}", end="\r", flush=True)


def _peak() -> int:
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


if __name__ == "__main__":
    app.run(main)
