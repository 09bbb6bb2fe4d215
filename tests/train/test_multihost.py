"""Two real processes of four devices each are one machine of eight."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gptjax import config as config_lib
from gptjax.train.metrics import read_metrics
from gptjax.train.run import run

REPOSITORY = Path(__file__).resolve().parents[2]
CHILD = """
import json, sys
from gptjax.parallel import hosts
hosts.initialize()
import jax
assert jax.process_count() == 2 and jax.local_device_count() == 4
from gptjax import config
from gptjax.train.run import RunConfig, run
run(config.from_dict(RunConfig, json.loads(sys.argv[1])), sys.argv[2])
"""
MOE = {"num_experts": 4, "num_experts_per_token": 2, "d_ff": 16, "activation": "swiglu"}


def unused_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def run_on_two_hosts(cfg, workdir, *, child=CHILD):
    for status, output in outputs_of_two_hosts(cfg, workdir, child=child):
        assert status == 0, output[-4000:]


def outputs_of_two_hosts(cfg, workdir, *, folders=(REPOSITORY, REPOSITORY), child=CHILD):
    """Exit status and output of each; `folders` are where they run."""
    port = unused_port()
    children = []
    for process in range(2):
        env = os.environ | {
            "PYTHONPATH": str(REPOSITORY),
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(process),
            "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=4",
        }
        command = [sys.executable, "-c", child, json.dumps(config_lib.to_dict(cfg)), str(workdir)]
        children.append(
            subprocess.Popen(
                command, cwd=folders[process], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    outputs = [child.communicate(timeout=300)[0] for child in children]
    return [(child.returncode, output) for child, output in zip(children, outputs, strict=True)]


def figures(workdir):
    lines = [line for line in read_metrics(workdir) if "loss" in line or "eval/loss" in line]
    return [
        (line["step"], name, line[name])
        for line in lines
        for name in ("loss", "eval/loss", "grad_norm")
        if name in line
    ]


@pytest.mark.parametrize(
    ("mesh", "moe"),
    [
        ({"data": 1, "fsdp": 4, "expert": 1, "context": 1, "tensor": 2}, None),
        # Both hosts hold parts of every row.
        ({"data": 1, "fsdp": 1, "expert": 1, "context": 4, "tensor": 2}, None),
        ({"data": 1, "fsdp": 2, "expert": 4, "context": 1, "tensor": 1}, MOE),
    ],
    ids=["fsdp_tensor", "context_tensor", "expert"],
)
def test_two_hosts_compute_what_one_does(mesh, moe, run_config, data_dir, tmp_path):
    cfg = run_config(
        mesh=mesh, model__moe=moe, data__eval=str(data_dir / "eval"), train__eval_every=3, train__num_steps=3
    )
    run(cfg, tmp_path / "one")
    run_on_two_hosts(cfg, tmp_path / "two")
    one, two = figures(tmp_path / "one"), figures(tmp_path / "two")
    assert len(one) >= 7 and [key[:2] for key in one] == [key[:2] for key in two]
    assert [value for *_, value in two] == pytest.approx([value for *_, value in one], rel=1e-5)


def test_hosts_with_other_tokens_do_not_train_together(run_config, data_dir, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, split in zip(folders, ("train", "eval"), strict=True):
        shutil.copytree(data_dir / split, folder / "store")
    mesh = {"data": 8, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1}
    cfg = run_config(mesh=mesh, data__train={"store": 1.0})
    for status, output in outputs_of_two_hosts(cfg, tmp_path / "run", folders=folders):
        assert status and "ValueError: store: not the same on all hosts (checksums " in output, output[-4000:]
    assert not (tmp_path / "run").exists()
