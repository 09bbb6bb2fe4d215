"""Stores a model's kernels in few bits, and says so of its keys and values.

    python -m experiments.quantize --ckpt=runs/demo --dst=runs/int4 --method=gptq --weights=int4 --calibration=book.txt
    python -m experiments.quantize --ckpt=runs/demo --dst=runs/int8 --method=rtn --weights=int8 --activations=int8
    python -m experiments.quantize --ckpt=runs/int8 --dst=runs/int8_kv --weights=none --kv_cache=int8

What it writes is a checkpoint like any other, for generate, evaluate and the rest. The table names every parameter, and
why it was left where it was. The source is only read, and --dst appears whole or not at all.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from typing import TYPE_CHECKING, Any

from absl import flags, logging

from experiments import calibration_flags, common, quantize_flags

if TYPE_CHECKING:
    from gptjax.compress.quantize import Result

_CKPT = flags.DEFINE_string("ckpt", None, "Checkpoint, workdir, or another framework's model; read.", required=True)
_DST = flags.DEFINE_string("dst", None, "The checkpoint directory to make; not there yet.", required=True)
flags.adopt_module_key_flags(quantize_flags)
flags.adopt_module_key_flags(calibration_flags)


def main() -> None:
    """Quantises, writes the checkpoint and prints what became of each parameter."""
    import gptjax
    from gptjax.compress import quantize, saving

    destination = pathlib.Path(_DST.value).expanduser().absolute()
    saving.check_free(destination, source=_CKPT.value)
    method, began = quantize_flags.method(), time.perf_counter()
    model = gptjax.load(_CKPT.value)
    quant = quantize_flags.rules(model.config)
    if not quant.rules and quant.kv_cache == model.config.kv_cache:
        raise ValueError("nothing to do: --weights=none, and keys and values are as --kv_cache says already")
    quantize.check(model.config, quant, method=method)
    batches, facts = calibration_flags.batches(model) if method.is_calibrated else ([], None)

    def told(layer: int) -> None:
        logging.info("layer %d of %d, %.0f s", layer, model.config.num_layers, time.perf_counter() - began)

    result = quantize.quantize(model.config, model.params, quant, method=method, batches=batches, told=told)
    entry: dict[str, Any] = {
        "stage": "quantize",
        "method": dataclasses.asdict(method) if quant.rules else None,
        "rules": [dataclasses.asdict(rule) for rule in quant.rules],
        "kv_cache": None if quant.kv_cache is None else dataclasses.asdict(quant.kv_cache),
        "calibration": facts,
        "source": {"path": _CKPT.value, "params_sha256": saving.fingerprint(model.config, model.params)},
    }
    saving.write(destination, result.model, result.params, entry=entry, source=model.meta, tokenizer=model.tokenizer)
    _print(result, seconds=time.perf_counter() - began)


def _print(result: Result, *, seconds: float) -> None:
    width = max(len(leaf.path) for leaf in result.leaves)
    print(f"{'parameter':{width}}  {'bytes':>14} -> {'now':>14}  how")
    for leaf in result.leaves:
        error = "" if leaf.error is None else f"  output error {leaf.error:.2%}"
        how = leaf.treatment + (f" ({leaf.why})" if leaf.why else error)
        print(f"{leaf.path:{width}}  {leaf.bytes_before:>14,} -> {leaf.bytes_after:>14,}  {how}")
    for note in result.notes:
        print(f"note: {note}")
    before, after = (
        sum(sizes) for sizes in zip(*((x.bytes_before, x.bytes_after) for x in result.leaves), strict=True)
    )
    print(f"{'bytes':{width}}  {before:>14,} -> {after:>14,}  {after / before:.1%}, in {seconds:.0f} s")


if __name__ == "__main__":
    common.start(main)
