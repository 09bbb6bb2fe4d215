"""Where compiled programs are kept, and that a second start finds them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import compilation_cache

REPOSITORY = Path(__file__).resolve().parents[2]


def configured(tmp_path, **environ):
    environ = {"XDG_CACHE_HOME": str(tmp_path)} | environ
    compilation_cache.configure(environ)
    return environ.get("JAX_COMPILATION_CACHE_DIR")


def test_programs_go_to_a_private_directory_of_this_processor_and_jaxlib(tmp_path, monkeypatch):
    path = Path(configured(tmp_path))
    assert path.parent == tmp_path / "gptjax" / "jax" and path.stat().st_mode & 0o777 == 0o700
    real = Path.read_text
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda self, *args, **rest: real(self, *args, **rest).replace("flags\t\t:", "flags\t\t: avx9"),
    )
    other = Path(configured(tmp_path))
    monkeypatch.undo()
    assert (other != path) == ("flags" in Path("/proc/cpuinfo").read_text())
    monkeypatch.setattr(compilation_cache.importlib.metadata, "version", lambda name: "0.0.0")
    assert Path(configured(tmp_path)) not in (path, other)


def test_what_the_user_set_stays_and_a_job_of_several_processes_keeps_nothing(tmp_path):
    assert configured(tmp_path, JAX_COMPILATION_CACHE_DIR="elsewhere") == "elsewhere"
    assert configured(tmp_path, JAX_COMPILATION_CACHE_DIR="") == ""
    for name in ("JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS"):
        assert configured(tmp_path, **{name: "2"}) is None
    assert configured(tmp_path, SLURM_NTASKS="4", SLURM_STEP_NUM_TASKS="1") is not None


def test_without_a_place_to_write_nothing_is_kept(tmp_path):
    (tmp_path / "file").write_text("")
    assert configured(tmp_path, XDG_CACHE_HOME=str(tmp_path / "file")) is None


@pytest.mark.parametrize("enabled", ["true", "false"])
def test_a_second_start_finds_what_the_first_compiled_and_it_can_be_switched_off(tmp_path, enabled):
    code = (
        "from experiments import compilation_cache; compilation_cache.configure()\n"
        "import jax, jax.numpy as jnp\n"
        "events = []\n"
        "jax.monitoring.register_event_listener(lambda event, **_: events.append(event))\n"
        "jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((3, 3))).block_until_ready()\n"
        "print(events.count('/jax/compilation_cache/cache_hits'))\n"
    )
    unset = [name for name in os.environ if name.startswith("JAX_")]
    environ = {name: value for name, value in os.environ.items() if name not in unset}
    environ |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path), "JAX_ENABLE_COMPILATION_CACHE": enabled}
    hits = []
    for _ in range(2):
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, cwd=REPOSITORY, env=environ, capture_output=True, text=True, check=False)
        assert result.returncode == 0 and not result.stderr, result.stderr
        hits.append(int(result.stdout))
    assert hits[0] == 0 and (hits[1] > 0) == (enabled == "true")
    assert bool(list(tmp_path.rglob("*-cache"))) == (enabled == "true")
