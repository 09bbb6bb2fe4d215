"""Pretrains a model, or goes on pretraining it.

    python -m experiments.pretrain --config=configs/demo.py --workdir=runs/demo --config.train.num_steps=100

The workdir, local or gs://, gets the checkpoints, metrics.jsonl, TensorBoard files and summary.json. Started again
with the same config it resumes. On several hosts, start it on each; Slurm and TPU VMs need no flags.
SIGTERM and Ctrl-C save and stop after the current step.

Exit status: 0 finished, 2 stopped by a mistake in the configuration or the data or by diverging, 75 stopped
by a signal (start it again to go on).
"""

from __future__ import annotations

import json
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from experiments import common

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file; --config.section.key=value sets a key, also one that the file leaves at its default.",
    accept_new_attributes=True,
    lock_config=False,
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run, local or gs://.", required=True)


class _Unlocked(flags.ArgumentParser):
    """Undoes the lock of config files: `RunConfig` knows better which keys there are, and which is nearest."""

    def __init__(self, parser: flags.ArgumentParser) -> None:
        self._parser = parser

    def parse(self, argument: str) -> Any:
        config = self._parser.parse(argument)
        return config.unlock() if isinstance(config, ConfigDict) else config


flags.FLAGS["config"].parser = _Unlocked(flags.FLAGS["config"].parser)


def main() -> int:
    # Imported late: JAX must not be touched before the processes of a job are connected.
    from gptjax import config as config_lib
    from gptjax.kernels import cpu
    from gptjax.parallel import hosts, mesh
    from gptjax.train.run import RunConfig, run

    cpu.configure_training()
    hosts.initialize()
    if mesh.platform() == "cpu":
        cpu.keep_freed_memory()
    if not hosts.is_lead():
        logging.set_verbosity(logging.WARNING)
    cfg = config_lib.from_dict(RunConfig, _CONFIG.value)
    summary = run(cfg, _WORKDIR.value)
    if hosts.is_lead():
        print(json.dumps(summary, indent=2))
    return common.STOPPED if summary["outcome"] == "stopped" else 0


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    common.start(main)
