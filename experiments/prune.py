"""Takes out of a trained model what it needs least: single weights, or whole units, heads, layers and experts.

    python -m experiments.prune --ckpt=runs/demo --dst=runs/half --method=sparsegpt --sparsity=0.5 --calibration=a.txt
    python -m experiments.prune --ckpt=runs/demo --dst=runs/small --width=0.75 --depth=6 --calibration=a.txt

Single weights become zeros, which the checkpoint stores compactly; training on keeps them with
--init=<dst> --config.optim.zeros=kept. The others leave a smaller model of the same kind, which --init=<dst> trains on
in its own sizes, by experiments.pretrain or, better, by experiments.distill with the original as --teacher. Both may be
asked for at once. The table names every parameter, and why it was left. The source is only read, and --dst appears
whole or not at all.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from typing import TYPE_CHECKING

from absl import flags, logging

from experiments import calibration_flags, common, prune_flags

if TYPE_CHECKING:
    from gptjax.types import Params

_CKPT = flags.DEFINE_string(
    "ckpt", None, "Checkpoint, workdir, or another framework's model; only read.", required=True
)
_DST = flags.DEFINE_string("dst", None, "The checkpoint directory to make; not there yet.", required=True)
flags.adopt_module_key_flags(prune_flags)
flags.adopt_module_key_flags(calibration_flags)


def main() -> None:
    """Prunes, writes the checkpoint and prints what became of each parameter."""
    import gptjax
    from gptjax.compress import prune, saving, structured

    destination = pathlib.Path(_DST.value).expanduser().absolute()
    saving.check_free(destination, source=_CKPT.value)
    cut, sparsity, config = prune_flags.cut(), prune_flags.sparsity(), prune_flags.config()
    if not cut and sparsity is None:
        raise ValueError("nothing to do: give --sparsity, or one of --width, --heads, --depth and --experts")
    looks = bool(cut) or prune_flags.method() != "magnitude"
    calibration_flags.check(" and ".join(cut) or f"--method={prune_flags.method()}", needed=looks)
    model, began = gptjax.load(_CKPT.value), time.perf_counter()
    cfg, params, method = model.config, model.params, prune_flags.method()
    structured.check(cfg, cut)
    if sparsity is not None:
        prune.check(structured.changed(cfg, cut), sparsity)
    batches, facts = calibration_flags.batches(model) if looks else ([], None)
    source = {"path": _CKPT.value, "params_sha256": saving.fingerprint(cfg, params)}
    done: list[str] = []
    for name, size in cut.items():
        logging.info("%s", name)
        way = prune_flags.way(name)
        cfg, params = way(cfg, params, batches, size)
        done.append(f"{way.__name__}={size:g}")
    if sparsity is not None:
        cfg, params = prune.prune(
            cfg,
            params,
            batches,
            method=method,
            sparsity=sparsity,
            config=config,
            told=lambda layer: _tell(layer, cfg.num_layers, began),
        )
        done.append(f"{method}, sparsity={sparsity}")
    how = None if config is None else dataclasses.asdict(config)
    entry = {"stage": "prune", "done": done, "config": how, "calibration": facts, "source": source}
    saving.write(destination, cfg, params, entry=entry, source=model.meta, tokenizer=model.tokenizer)
    _print(params, before=model.params, destination=destination, seconds=time.perf_counter() - began)
    keep = "" if sparsity is None else " --config.optim.zeros=kept"
    print(f"to train it: experiments.distill or pretrain with --init={_DST.value}{keep}")


def _tell(layer: int, num_layers: int, began: float) -> None:
    logging.info("layer %d of %d, %.0f s", layer, num_layers, time.perf_counter() - began)


def _print(params: Params, *, before: Params, destination: pathlib.Path, seconds: float) -> None:
    import jax

    from gptjax.compress import prune

    rows = prune.table(params)
    width = max(len(row.path) for row in rows)
    print(f"{'parameter':{width}}  {'shape':>22}  {'zeros':>6}")
    for row in rows:
        shape = " x ".join(map(str, row.shape))
        print(f"{row.path:{width}}  {shape:>22}  {row.zeros:6.1%}" + (f"  {row.left}" if row.left else ""))
    count, size = (sum(getattr(leaf, of) for leaf in jax.tree.leaves(before)) for of in ("size", "nbytes"))
    after = sum(leaf.size for leaf in jax.tree.leaves(params))
    stored = sum(file.stat().st_size for file in (destination / "params").rglob("*") if file.is_file())
    print(f"{'parameters':{width}}  {count:,} -> {after:,}")
    print(f"{'bytes, dense -> on disk':{width}}  {size:,} -> {stored:,}  {stored / size:.1%}, in {seconds:.0f} s")


if __name__ == "__main__":
    common.start(main)
