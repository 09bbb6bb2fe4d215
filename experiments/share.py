r"""Makes layers of a trained model share weights or keys and values, ties its embeddings, or factorises its kernels.

    python -m experiments.share --ckpt=runs/demo --dst=runs/half --pattern=adjacent --unique=2 --calibration=a.txt
    python -m experiments.share --ckpt=runs/demo --dst=runs/thin --rank=0.5 --calibration=a.txt

    --pattern   layers share: all, cyclic (0 1 0 1), adjacent (0 0 1 1) or sandwich (0 1 1 2)
    --kv_every  layers attend to the keys and values of one before them; the cache is so much smaller
    --tie       one table for tokens and logits
    --rank      kernels become two factors that keep what they do to the calibration text

Several may be asked for at once. What shares is only a start: train it with --init=<dst>, by experiments.pretrain or,
better, by experiments.distill with the original as --teacher. The table says what was left and why. The source is only
read, and --dst appears whole or not at all.
"""

from __future__ import annotations

import pathlib
import time
from typing import TYPE_CHECKING

from absl import flags

from experiments import calibration_flags, common, share_flags

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gptjax.compress.share import Line
    from gptjax.types import Params

_CKPT = flags.DEFINE_string("ckpt", None, "Checkpoint, workdir, or another framework's model; read.", required=True)
_DST = flags.DEFINE_string("dst", None, "The checkpoint directory to make; not there yet.", required=True)
flags.adopt_module_key_flags(share_flags)
flags.adopt_module_key_flags(calibration_flags)


def main() -> None:
    """Shares, writes the checkpoint and prints what became of each part."""
    import gptjax
    from gptjax.compress import saving

    destination = pathlib.Path(_DST.value).expanduser().absolute()
    saving.check_free(destination, source=_CKPT.value)
    share_flags.sharing()
    looks = share_flags.check()
    asks = "--rank, --energy or --init=influential" if looks else f"share {share_flags.given()}"
    calibration_flags.check(asks, needed=looks)
    model, began = gptjax.load(_CKPT.value), time.perf_counter()
    batches, facts = calibration_flags.batches(model) if looks else ([], None)
    cfg, params, tables, asked = share_flags.apply(model, batches)
    source = {"path": _CKPT.value, "params_sha256": saving.fingerprint(model.config, model.params)}
    entry = {"stage": "share", **asked, "calibration": facts, "source": source}
    saving.write(destination, cfg, params, entry=entry, source=model.meta, tokenizer=model.tokenizer)
    _print(tables, before=model.params, after=params, seconds=time.perf_counter() - began)
    print(f"to train it: experiments.distill or pretrain with --init={_DST.value}")


def _print(tables: Mapping[str, Sequence[Line]], *, before: Params, after: Params, seconds: float) -> None:
    import jax

    width = max(len(line.part) for lines in tables.values() for line in lines)
    for name, lines in tables.items():
        print(f"{f'{name}:':{width + 2}}  {'parameters':>12} -> {'now':>12}  how")
        for line in lines:
            print(f"  {line.part:{width}}  {line.before:>12,} -> {line.after:>12,}  {line.how}")
    for name, of in (("parameters", "size"), ("bytes", "nbytes")):
        was, now = (sum(getattr(leaf, of) for leaf in jax.tree.leaves(tree)) for tree in (before, after))
        print(f"{name:{width + 2}}  {was:>12,} -> {now:>12,}  {now / was:.1%}, in {seconds:.0f} s")


if __name__ == "__main__":
    common.start(main)
