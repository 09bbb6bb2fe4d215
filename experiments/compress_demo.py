"""Compresses the model of `make demo` in every way, and compares the results: what `make compress_demo` runs.

    python -m experiments.compress_demo --demo=runs/demo --workdir=runs/compressed

Every stage is a command of its own, shown as it starts; one whose product is complete is skipped, so that it goes on
where it was killed. The page is <workdir>/report/compress.html. How long the students train is set in minutes; the
number of steps that this makes on this machine is kept in plan.json, and is the same for all of them.

Exit status: 0 when everything is there, otherwise that of the stage that failed or was stopped.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from absl import flags

from experiments import common, run_config_flag
from experiments.stages import Stages, plan
from gptjax import config as config_lib
from gptjax.json_files import read_json
from gptjax.nn.spec import ModelSpec

_DEMO = flags.DEFINE_string("demo", "runs/demo", "Directory of the finished demo; only read.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/compressed", "Directory of what is made of it.")
_CONFIG = flags.DEFINE_string("config", "configs/demo.py", "The demo's config; it is given the directory of its data.")
_MINUTES = flags.DEFINE_float("train_minutes", 1.5, "How long a student of half the size is taught.")
_TOKENS = flags.DEFINE_integer("num_tokens", 32_768, "Held-out tokens that all are compared on.")

# A step of distillation runs the teacher forwards and trains half of it: about this part of a step of the teacher.
_STEP_COST = 0.75
# What a student has half of.
_HALVED = ("num_layers", "num_heads", "num_kv_heads", "d_ff")


def main() -> None:
    demo, workdir = Path(_DEMO.value), Path(_WORKDIR.value)
    if not all((demo / name).exists() for name in ("summary.json", "config.json")):
        raise ValueError(f"{demo}: no finished demo there; run `make demo` first, or name another by --demo")
    model = read_json(demo / "config.json")["model"]
    _check(demo, model)
    num_steps = _num_steps(demo, workdir)
    stages = Stages(workdir)
    read = [f"--calibration={demo / 'data' / 'train'}", "--calibration_rows=32"]
    int4 = ["--weights=int4", f"--group_size={math.gcd(64, model['d_model'], model['d_ff'])}"]
    made = [str(demo)]

    def make(command: str, name: str, *arguments: str) -> None:
        made.append(str(workdir / name))
        if not (workdir / name).exists():
            stages.run(command, f"--ckpt={demo}", f"--dst={workdir / name}", *arguments, label=name)

    make("quantize", "int8", "--method=rtn", "--weights=int8", "--activations=int8")
    make("quantize", "int4_rtn", "--method=rtn", *int4)
    make("quantize", "int4_awq", "--method=awq", *int4, *read)
    make("quantize", "int4_gptq", "--method=gptq", *int4, *read)
    for sparsity, name in (("0.5", "half"), ("2:4", "2of4")):
        make("prune", f"{name}_magnitude", f"--sparsity={sparsity}", "--method=magnitude")
        make("prune", f"{name}_wanda", f"--sparsity={sparsity}", "--method=wanda", *read)
        make("prune", f"{name}_sparsegpt", f"--sparsity={sparsity}", "--method=sparsegpt", *read)
    layers = model["num_layers"] // 2
    make("prune", "cut", "--width=0.5", f"--heads={model['num_heads'] // 2}", f"--depth={layers}", *read)
    make("share", "shared", "--pattern=adjacent", f"--unique={layers}", *read)
    made += _train(demo, workdir, model, stages, num_steps=num_steps)
    report = workdir / "report"
    if not (report / "compress.json").exists():
        stages.run(
            "compress_report", f"--ckpts={','.join(made)}", f"--data={demo / 'data' / 'eval'}", f"--out={report}",
            f"--num_tokens={_TOKENS.value}",
        )  # fmt: skip
    print(f"\n{report / 'compress.html'}, {stages.total()['wall_seconds'] / 60:.1f} minutes in all")


def _train(demo: Path, workdir: Path, model: dict[str, Any], stages: Stages, *, num_steps: int) -> list[str]:
    """Students on the same tokens: what was cut or shares weights, taught by the original; half of it, alone."""
    config = [f"--config={_CONFIG.value}:{demo / 'data'}"]
    config += [f"--config.train.{key}={num_steps}" for key in ("num_steps", "eval_every", "checkpoint_every")]
    half = [f"--config.model.{name}={model[name] // 2}" for name in _HALVED]

    def train(command: str, name: str, *arguments: str) -> str:
        # It knows by itself whether there is something left to train.
        stages.run(command, *config, *arguments, f"--workdir={workdir / name}", label=name)
        return str(workdir / name)

    return [
        train("distill", "cut_distilled", f"--teacher={demo}", f"--init={workdir / 'cut'}"),
        train("pretrain", "cut_trained", f"--init={workdir / 'cut'}"),
        train("pretrain", "alone", *half),
        train("distill", "shared_distilled", f"--teacher={demo}", f"--init={workdir / 'shared'}"),
    ]


def _check(demo: Path, model: dict[str, Any]) -> None:
    """What only the last stages would stumble over, after minutes."""
    of_demo = config_lib.from_dict(ModelSpec, model, path=f"{demo}/config.json: model")
    if odd := [f"{name}={model[name]}" for name in _HALVED if model[name] % 2]:
        raise ValueError(f"{demo}: its students have half of everything; expected even numbers, got {', '.join(odd)}")
    of_config = config_lib.from_dict(ModelSpec, run_config_flag.read(_CONFIG.value, str(demo / "data")).model)
    if changes := config_lib.diff(of_demo, of_config):
        raise ValueError(
            f"{demo}: its model is not that of {_CONFIG.value}, by which one student is trained from scratch "
            f"({'; '.join(changes)}); name the config that it was trained with by --config"
        )


def _num_steps(demo: Path, workdir: Path) -> int:
    """As many steps of a student as take --train_minutes, by the time of the demo's own."""

    def of_demo() -> dict[str, Any]:
        timed = read_json(demo / "plan.json").get("step_seconds")
        if not timed:
            raise ValueError(f"{demo}/plan.json: no time of a step; the demo was trained with --train_minutes=0")
        seconds = _STEP_COST * statistics.median(timed)
        return {"num_steps": max(20, int(60 * _MINUTES.value / seconds))}

    return plan(workdir, minutes=_MINUTES.value, make_fn=of_demo)["num_steps"]


if __name__ == "__main__":
    common.start(main)
