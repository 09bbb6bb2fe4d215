"""The main job from end to end on one machine: what `make demo` runs.

    python -m experiments.demo --workdir=runs/demo

Prepares the standard library's source, trains a small GPT on it, scores the held-out modules beside compressors,
writes samples, summary.json and report.html. Every stage is a command of its own, shown as it starts; one whose
product is complete is skipped, so that the demo goes on where it was killed.

How long it trains is set in minutes, since machines differ: a few steps are timed once, the number of steps that fit is
kept in plan.json, and from there on everything is exact. --train_minutes=0 takes the config's number of steps.

Exit status: 0 when everything is there, otherwise that of the stage that failed or was stopped.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from absl import flags

from experiments import common
from experiments.stages import Stages, plan
from gptjax.json_files import read_json, write_json
from gptjax.train import metrics

_WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "Directory of the run.")
_CONFIG = flags.DEFINE_string("config", "configs/demo.py", "Config; it is given the directory of the data.")
_SOURCE = flags.DEFINE_string("source", "stdlib", "Text, as experiments.prepare_data takes it.")
_TRAIN_MINUTES = flags.DEFINE_float("train_minutes", 11.0, "How long to train; 0: as many steps as the config says.")
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 4096, "Pieces of the tokenizer; the config's model.vocab_size.")

_TRIAL_STEPS = 40
_PROMPTS = ("def read_file(path):\n", "class Queue:\n    ", "import os\nimport sys\n", "    for key, value in ")
_SAMPLING = ("--temperature=0.7", "--top_p=0.95", "--max_new_tokens=96")


def main() -> None:
    workdir = Path(_WORKDIR.value)
    data, scores, samples = workdir / "data", workdir / "eval" / "summary.json", workdir / "samples.json"
    stages = Stages(workdir)
    if not (data / "summary.json").exists():
        stages.run("prepare_data", f"--source={_SOURCE.value}", f"--vocab_size={_VOCAB_SIZE.value}", f"--out={data}")
    pretrain = [f"--config={_CONFIG.value}:{data}"]
    if _TRAIN_MINUTES.value:
        pretrain.append(f"--config.train.num_steps={_num_steps(workdir, pretrain, stages)}")
    # It knows by itself whether there is something left to train.
    stages.run("pretrain", *pretrain, f"--workdir={workdir}")
    found = read_json(scores)
    if (found.get("step"), found.get("weights")) != (read_json(workdir / "summary.json")["step"], "last"):
        samples.unlink(missing_ok=True)
        stages.run("evaluate", f"--workdir={workdir}", f"--data={data / 'eval'}", "--nobaselines")
    if not samples.exists():
        prompts = [f"--prompt={text}" for text in _PROMPTS]
        stages.run("generate", f"--ckpt={workdir}", f"--out={samples}", *_SAMPLING, *prompts)
    _finish(workdir, read_json(scores), read_json(samples), stages)


def _num_steps(workdir: Path, pretrain: list[str], stages: Stages) -> int:
    """As many steps as fit into --train_minutes on this machine, timed in a run of its own before the first."""

    def timed() -> dict[str, Any]:
        trial = workdir / "trial"
        few = {"num_steps": _TRIAL_STEPS, "log_every": 5, "eval_batches": 1}
        shutil.rmtree(trial, ignore_errors=True)
        flags_of_trial = [f"--config.train.{key}={value}" for key, value in few.items()]
        stages.run("pretrain", *pretrain, *flags_of_trial, f"--workdir={trial}", label="trial")
        seconds = [row["step_seconds"] for row in metrics.read_metrics(trial) if "step_seconds" in row]
        shutil.rmtree(trial)
        # A median: a machine may be busy for a moment.
        num_steps = max(_TRIAL_STEPS, int(60 * _TRAIN_MINUTES.value / statistics.median(seconds)))
        return {"step_seconds": seconds, "num_steps": num_steps}

    return plan(workdir, minutes=_TRAIN_MINUTES.value, make_fn=timed)["num_steps"]


def _finish(workdir: Path, scores: dict[str, Any], samples: dict[str, Any], stages: Stages) -> None:
    """Adds to the run's summary what the other stages found, and draws the report."""
    import jax

    from gptjax.eval import report
    from gptjax.model import load
    from gptjax.optim.groups import path_of

    summary = read_json(workdir / "summary.json")
    summary.setdefault("train_wall_seconds", summary["wall_seconds"])
    stages.add("pretrain", seconds=summary["train_wall_seconds"])
    summary["bits_per_byte"] = scores["bits_per_byte"] | _compressors(workdir / "data", stages)
    summary |= {"samples": samples["samples"], **stages.total()}
    write_json(workdir / "summary.json", summary)
    leaves = jax.tree_util.tree_leaves_with_path(load(workdir).params)
    shapes = [(path_of(path), leaf.shape) for path, leaf in leaves]
    report.write(report.read(workdir, parameters=shapes), workdir / "report.html")
    print(json.dumps({key: value for key, value in summary.items() if key != "samples"}, indent=2))
    print(f"\n{workdir / 'report.html'}")


def _compressors(data: Path, stages: Stages) -> dict[str, float]:
    """What gzip, bz2 and xz need, xz also after the training text; measured once."""
    from gptjax.data.store import open_store
    from gptjax.eval import baselines

    path = data / "compressors.json"
    if not path.exists():
        began = time.perf_counter()
        train, heldout = (baselines.text_of(open_store(data / part)) for part in ("train", "eval"))
        write_json(path, baselines.bits_per_byte(heldout, train=train))
        stages.add("compressors", seconds=time.perf_counter() - began)
    return read_json(path)


if __name__ == "__main__":
    common.start(main)
