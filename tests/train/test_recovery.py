"""Runs that keep the zeros of a pruned model, and runs that make them: by the config alone, through the one loop."""

import numpy as np

import gptjax
from gptjax.checkpoint import arrays
from gptjax.compress import prune
from gptjax.train.run import run


def zeros(workdir):
    flat = arrays.flatten(gptjax.load(workdir).params)
    return {path: np.asarray(leaf) == 0 for path, leaf in flat.items() if prune.why_left(path) is None}


def test_a_pruned_model_is_trained_with_its_zeros(run_config, tmp_path, caplog):
    gradual = dict(sparsity="2:4", first_step=1, last_step=4, every_steps=1)
    run(run_config(optim__prune=gradual, optim__ema_decay=0.0), tmp_path / "first")
    made = zeros(tmp_path / "first")
    (entry,) = gptjax.load(tmp_path / "first").lineage
    assert entry["prune"] == gradual and entry["num_steps"] == 6
    assert made and all(0.49 < mask.mean() <= 0.5 for mask in made.values())
    warning = "50 % of the kernels' weights are 0, and will not stay so; optim.zeros=kept keeps them."
    run(run_config(train__init_from=str(tmp_path / "first"), optim__zeros="kept"), tmp_path / "second")
    assert warning not in caplog.text
    run(run_config(train__init_from=str(tmp_path / "first")), tmp_path / "third")
    assert warning in caplog.text
    kept = zeros(tmp_path / "second")
    assert all(np.array_equal(made[path], kept[path]) for path in made)
    before, after = (arrays.flatten(gptjax.load(tmp_path / name).params) for name in ("first", "second"))
    assert all(np.any(np.asarray(before[path]) != np.asarray(after[path])) for path in made)
