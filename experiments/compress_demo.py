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

from absl import flags

from experiments import common
from experiments.stages import Stages
from gptjax.json_files import read_json, write_json

_DEMO = flags.DEFINE_string("demo", "runs/demo", "Directory of the finished demo; only read.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/compressed", "Directory of what is made of it.")
_CONFIG = flags.DEFINE_string("config", "configs/demo.py", "The demo's config; it is given the directory of its data.")
_MINUTES = flags.DEFINE_float("train_minutes", 2.0, "Of training for each student, in steps of the demo's machine.")
_TOKENS = flags.DEFINE_integer("num_tokens", 32_768, "Held-out tokens that all are compared on.")

# A distilled step reads the teacher forwards and trains half of it: of a step of the teacher, about this much.
_STEP_COST = 0.75


def main() -> None:
    demo, workdir = Path(_DEMO.value), Path(_WORKDIR.value)
    if not (demo / "summary.json").exists():
        raise ValueError(f"{demo}: no finished demo there; run `make demo` first, or name another by --demo")
    stages = Stages(workdir)
    model = read_json(demo / "config.json")["model"]
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
    half = {"num_layers": max(1, model["num_layers"] // 2), "d_ff": model["d_ff"] // 2}
    make("prune", "cut", "--width=0.5", f"--depth={half['num_layers']}", *read)
    _train(demo, workdir, half, stages)
    made += [str(workdir / "cut_distilled"), str(workdir / "alone")]
    report = workdir / "report"
    if not (report / "compress.html").exists():
        stages.run(
            "compress_report", f"--ckpts={','.join(made)}", f"--data={demo / 'data' / 'eval'}", f"--out={report}",
            f"--num_tokens={_TOKENS.value}",
        )  # fmt: skip
    print(f"\n{report / 'compress.html'}, {stages.total()['wall_seconds'] / 60:.1f} minutes in all")


def _train(demo: Path, workdir: Path, half: dict[str, int], stages: Stages) -> None:
    """The same student twice, on the same tokens: cut out of the demo's model and taught by it, and alone."""
    num_steps = _num_steps(demo, workdir)
    config = [
        f"--config={_CONFIG.value}:{demo / 'data'}", *(f"--config.model.{key}={size}" for key, size in half.items()),
        *(f"--config.train.{key}={num_steps}" for key in ("num_steps", "eval_every", "checkpoint_every")),
    ]  # fmt: skip
    taught = [f"--teacher={demo}", f"--init={workdir / 'cut'}"]
    stages.run("distill", *config, *taught, f"--workdir={workdir / 'cut_distilled'}", label="cut_distilled")
    stages.run("pretrain", *config, f"--workdir={workdir / 'alone'}", label="alone")


def _num_steps(demo: Path, workdir: Path) -> int:
    """As many steps of a student as take --train_minutes, by the demo's own; planned once."""
    path, minutes = workdir / "plan.json", _MINUTES.value
    if not path.exists():
        seconds = _STEP_COST * statistics.median(read_json(demo / "plan.json")["step_seconds"])
        write_json(path, {"train_minutes": minutes, "num_steps": max(20, int(60 * minutes / seconds))})
    plan = read_json(path)
    if plan["train_minutes"] != minutes:
        raise ValueError(
            f"{path}: planned for {plan['train_minutes']:g} minutes, got --train_minutes={minutes:g}; "
            "choose another --workdir"
        )
    return plan["num_steps"]


if __name__ == "__main__":
    common.start(main)
