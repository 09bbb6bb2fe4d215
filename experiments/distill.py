r"""Trains a student on what a teacher says of the same tokens, or goes on doing so.

    python -m experiments.distill --teacher=runs/demo --config=configs/demo.py --workdir=runs/student \
        --config.model.num_layers=2 --on_policy=0.25

The config is the student's, as for experiments.pretrain; its section `distill` says how it is taught:

    loss              forward_kl, reverse_kl or jsd (with beta)
    temperature       divides the logits of both
    weight            of the teacher; the data's own loss has the rest of 1
    top_k, cache      compare the teacher's likeliest tokens and the rest as one; keep them on disk for other students
    hidden_weight     of the hidden states of hidden_layers, pairs of a student's and a teacher's layer
    attention_weight  of the attention of attention_layers, whatever the heads; the last layers unless told
    on_policy         fraction of the rows that the student writes itself, after on_policy_prompt tokens of the data,
                      for on_policy_steps steps at once; of these the teacher alone is the judge

Teacher and student may differ in every size and in family, and the teacher may be imported or in few bits; the
tokenizer is the same: experiments.prepare_data --tokenizer=<teacher>/assets. A student that was made from the teacher
starts from --init=<checkpoint>, in the architecture that it has there, whatever the config's model is.
Started again with the same config it resumes. What teaches what, by which losses, is in the log; each loss is a
figure of metrics.jsonl.

Exit status: as that of experiments.pretrain.
"""

from __future__ import annotations

from absl import flags

from configs import base
from experiments import common, run_config_flag

_CONFIG = run_config_flag.define(distill=base.distill)
flags.adopt_module_key_flags(run_config_flag)
_TEACHER = flags.DEFINE_string("teacher", None, "Checkpoint or workdir that teaches; sets config.distill.teacher.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the student's run, local or gs://.", required=True)
_ON_POLICY = flags.DEFINE_float("on_policy", None, "Rows that the student writes; sets config.distill.on_policy.")


def main() -> int:
    # Imported late: JAX must not be touched before the processes of a job are connected.
    from gptjax import config as config_lib
    from gptjax.compress import distill
    from gptjax.train.run import run

    values = _CONFIG()
    if _TEACHER.value is not None:
        values.distill.teacher = _TEACHER.value
    if _ON_POLICY.value is not None:
        values.distill.on_policy = _ON_POLICY.value
    return common.train(
        lambda: run(config_lib.from_dict(distill.DistillRun, values), _WORKDIR.value, task_fn=distill.task)
    )


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    common.start(main)
