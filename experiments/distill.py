r"""Trains a student on what a teacher says of the same tokens, or goes on doing so.

    python -m experiments.distill --teacher=runs/demo --config=configs/demo.py --workdir=runs/student \
        --config.model.num_layers=2 --config.distill.temperature=2

The config is the student's, as for experiments.pretrain; its section `distill` says how it is taught:

    loss           forward_kl, reverse_kl or jsd (with beta)
    temperature    divides the logits of both
    weight         of the teacher; the data's own loss has the rest of 1
    top_k, cache   compare the teacher's likeliest tokens and the rest as one; keep them on disk for other students
    hidden_weight  of the hidden states of hidden_layers, pairs of a student's and a teacher's layer

Teacher and student may differ in every size and in family; tokenizer and vocabulary are the same. Started again
with the same config it resumes.

Exit status: as that of experiments.pretrain.
"""

from __future__ import annotations

from absl import flags

from configs import base
from experiments import common, run_config_flag

_CONFIG = run_config_flag.define(distill=base.distill)
_TEACHER = flags.DEFINE_string("teacher", None, "Checkpoint or workdir that teaches; sets config.distill.teacher.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the student's run, local or gs://.", required=True)
_INIT = flags.DEFINE_string(
    "init", None, "Checkpoint or workdir whose parameters the student starts with; sets config.train.init_from."
)


def main() -> int:
    # Imported late: JAX must not be touched before the processes of a job are connected.
    from gptjax import config as config_lib
    from gptjax.compress import distill
    from gptjax.train.run import run

    values = _CONFIG.value
    if _TEACHER.value is not None:
        values.distill.teacher = _TEACHER.value
    if _INIT.value is not None:
        values.train.init_from = _INIT.value
    return common.train(
        lambda: run(config_lib.from_dict(distill.DistillRun, values), _WORKDIR.value, task_fn=distill.task)
    )


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    common.start(main)
