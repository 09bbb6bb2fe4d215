"""Pretrains a model, or goes on pretraining it.

    python -m experiments.pretrain --config=configs/demo.py --workdir=runs/demo --config.train.num_steps=100
    python -m experiments.pretrain --config=configs/demo.py --workdir=runs/more --init=runs/half

The second starts from a checkpoint, in its architecture: imported, pruned and shared models are trained on so. With
--config.optim.zeros=kept zeros of kernels stay, --config.optim.prune='{"sparsity": 0.5, "first_step": 100, "last_step":
800}' makes them on the way, and --config.model.quant=int4:g32 trains for few bits.

The workdir, local or gs://, gets the checkpoints, metrics.jsonl, TensorBoard files and summary.json. Started again
with the same config it resumes. On several hosts, start it on each; Slurm and TPU VMs need no flags.
SIGTERM and Ctrl-C save and stop after the current step.

Exit status: 0 finished, 2 stopped by a mistake in the configuration or the data or by diverging, 75 stopped
by a signal (start it again to go on).
"""

from __future__ import annotations

from absl import flags

from experiments import common, run_config_flag

_CONFIG = run_config_flag.define()
flags.adopt_module_key_flags(run_config_flag)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run, local or gs://.", required=True)


def main() -> int:
    # Imported late: JAX must not be touched before the processes of a job are connected.
    from gptjax import config as config_lib
    from gptjax.train.run import RunConfig, run

    return common.train(lambda: run(config_lib.from_dict(RunConfig, _CONFIG()), _WORKDIR.value))


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    common.start(main)
