"""A signal to one host of several stops all of them after the same step."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import portpicker

from gptjax import config as config_lib
from gptjax.checkpoint import store as store_lib
from gptjax.train.metrics import read_metrics

REPOSITORY = Path(__file__).resolve().parents[2]
CHILD = """
import json, sys
from gptjax.parallel import hosts
hosts.initialize()
from gptjax import config
from gptjax.train.run import RunConfig, run
summary = run(config.from_dict(RunConfig, json.loads(sys.argv[1])), sys.argv[2])
print("SUMMARY", summary["outcome"], summary["step"])
"""


def test_an_interrupt_of_one_host_stops_both_after_the_same_step(run_config, tmp_path):
    mesh = dict(data=2, fsdp=1, expert=1, context=1, tensor=1)
    cfg = run_config(mesh=mesh, train__num_steps=10**6, train__checkpoint_every=0)
    port = portpicker.pick_unused_port()
    children = [start_host(cfg, tmp_path, port=port, host=host) for host in range(2)]
    try:
        wait_for_lines(tmp_path, children, num_lines=3)
        children[1].send_signal(signal.SIGINT)  # becomes a SIGTERM there, and so tests both
        outputs = [child.communicate(timeout=120)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    ends = [line for output in outputs for line in output.splitlines() if line.startswith("SUMMARY")]
    assert len(ends) == 2 and ends[0] == ends[1], outputs
    _, outcome, step = ends[0].split()
    assert outcome == "stopped" and store_lib.committed_steps(tmp_path / "ckpt") == [int(step)]
    assert read_metrics(tmp_path)[-2]["step"] == int(step)


def start_host(cfg, workdir, *, port, host):
    env = os.environ | {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(host),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
    }
    command = [sys.executable, "-c", CHILD, json.dumps(config_lib.to_dict(cfg)), str(workdir)]
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_lines(workdir, children, *, num_lines):
    deadline = time.monotonic() + 240
    while len(read_metrics(workdir)) < num_lines:
        assert all(child.poll() is None for child in children), [child.communicate()[0][-2000:] for child in children]
        assert time.monotonic() < deadline, "the run did not start"
        time.sleep(0.1)
