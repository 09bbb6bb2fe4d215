"""Scores held-out text: loss, perplexity, accuracy and bits per byte, beside gzip, bz2 and xz.

    python -m experiments.evaluate --workdir=runs/demo --data=runs/demo/data/eval
    python -m experiments.evaluate --ckpt=runs/demo/ckpt/400 --data=novel.txt --stride=128

--data is a token store, or anything that --source of experiments.prepare_data takes. Every token counts
once; a smaller --stride gives it more context and costs more. The summary goes to eval/summary.json of the
workdir, or to --out. All devices of all hosts share parameters and windows; on several hosts, start it on each.
"""

from __future__ import annotations

import pathlib
import tempfile
import time
from typing import TYPE_CHECKING, Any

from absl import flags

from experiments import common, model_flags

if TYPE_CHECKING:
    from jax.sharding import Mesh


_DATA = flags.DEFINE_string("data", None, "Token store, text file, or source such as dir:src/**/*.py.", required=True)
_STRIDE = flags.DEFINE_integer(
    "stride", None, "Targets that each window adds; half of the context unless told.", lower_bound=1
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 8, "Windows scored at once; rounded up to as many for each device.", lower_bound=1
)
_BASELINES = flags.DEFINE_bool("baselines", True, "Compress the same bytes with gzip, bz2 and xz.")
flags.adopt_module_key_flags(model_flags)


def main() -> None:
    """Evaluates the checkpoint on --data."""
    model_flags.path()
    with common.all_devices("fsdp") as mesh, tempfile.TemporaryDirectory() as scratch:
        summary = _evaluate(mesh, pathlib.Path(scratch) / "store")
        _print(summary)
        model_flags.write_summary("eval", summary)


def _evaluate(mesh: Mesh, scratch: pathlib.Path) -> dict[str, Any]:
    from gptjax.data import loader, writer
    from gptjax.eval import baselines, perplexity
    from gptjax.parallel import hosts, rules

    model, origin = model_flags.load()
    began, seq_len = time.perf_counter(), model.config.seq_len
    stride = max(1, seq_len // 2) if _STRIDE.value is None else _STRIDE.value
    if model.tokenizer is None:
        raise ValueError("this checkpoint has no tokenizer to read text with")
    store = writer.store_of(_DATA.value, model.tokenizer, scratch=scratch)
    rows = -(-_BATCH_SIZE.value // mesh.size) * mesh.size
    host, num = hosts.row_group(rules.batch_sharding(mesh), (rows, seq_len))
    batches = loader.eval_batches(store, batch_size=rows, seq_len=seq_len, stride=stride, host=host, num_hosts=num)
    found = perplexity.evaluate(model.config, model.params, batches)
    bits = {"model": perplexity.bits_per_byte(found.nats, batches.num_bytes)}
    if _BASELINES.value:
        bits |= baselines.bits_per_byte(baselines.text_of(store))
    return origin | {
        "data": _DATA.value,
        "stride": stride,
        "loss": found.loss,
        "perplexity": perplexity.perplexity(found.nats, found.tokens),
        "accuracy": found.accuracy,
        "tokens": int(found.tokens),
        "bytes": batches.num_bytes,
        "bits_per_byte": bits,
        "wall_seconds": time.perf_counter() - began,
    }


def _print(summary: dict[str, Any]) -> None:
    rows = {key: value for key, value in summary.items() if key != "bits_per_byte"}
    common.print_table(rows | {f"bits per byte, {name}": value for name, value in summary["bits_per_byte"].items()})


if __name__ == "__main__":
    common.start(main)
