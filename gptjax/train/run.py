"""Training, from a config, a directory and a task (pretraining unless told) to a summary.

A workdir holds one run: `config.json`, `ckpt/`, `metrics.jsonl`, `tensorboard/`, `summary.json` and, if
asked for, `profile/`. Started again with the same config, a run goes on from its newest
checkpoint and computes what it would have computed without the interruption, to the last bit
on as many devices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from absl import logging
from etils import epath
from jax.sharding import NamedSharding

from gptjax import config as config_lib
from gptjax import lock, process
from gptjax.checkpoint import directory
from gptjax.checkpoint import meta as meta_lib
from gptjax.checkpoint.meta import Meta
from gptjax.checkpoint.store import CheckpointStore, committed_steps, read_meta
from gptjax.data import loader
from gptjax.data import store as store_lib
from gptjax.data import tokenizer as tokenizer_lib
from gptjax.data.tokenizer import Tokenizer
from gptjax.json_files import read_json, write_json
from gptjax.nn import cost, transformer
from gptjax.optim import ema
from gptjax.parallel import hosts, rules
from gptjax.parallel import mesh as mesh_lib
from gptjax.train import hooks as hooks_lib
from gptjax.train import inventory, workdir
from gptjax.train import setup as setup_lib
from gptjax.train import state as state_lib
from gptjax.train.evaluate import evaluator
from gptjax.train.hooks import Hook, Values
from gptjax.train.loop import FitResult, fit
from gptjax.train.metrics import MetricsWriter, read_metrics
from gptjax.train.model_of import ModelOf
from gptjax.train.resume import check_start, resume, start_from, warn_of_zeros
from gptjax.train.setup import RunConfig, Setup, TaskFn, TrainConfig
from gptjax.train.state import TrainState
from gptjax.train.task import Companions
from gptjax.train.throughput import Throughput
from gptjax.train.workdir import SUMMARY_FILE
from gptjax.types import Array, Batch, Params

__all__ = ["RunConfig", "TrainConfig", "run"]


def run(cfg: RunConfig, path: epath.PathLike, *, task_fn: TaskFn = setup_lib.pretraining) -> dict[str, Any]:
    """Trains, or goes on training, in the workdir `path`; returns what its `summary.json` says.

    Args:
      task_fn: what to train for.

    Raises:
      ValueError: for a config whose parts do not fit each other or the machine, a workdir of
        another run, a checkpoint that cannot be read, unusable data, or training that diverges.
    """
    path = directory.absolute(path)
    tokenizer = tokenizer_lib.load(cfg.data.tokenizer)
    with mesh_lib.use(cfg.mesh) as mesh:
        setup = setup_lib.make(_with_own_model(cfg, path), mesh, tokenizer, task_fn=task_fn)
        setup_lib.check_vocabulary(cfg, setup.model, tokenizer)
        data = _open_data(cfg, tokenizer)
        if cfg.train.init_from is not None and not (path / directory.DIRECTORY).exists():
            check_start(cfg.train.init_from, setup.model, tokenizer=tokenizer)
        with lock.exclusive(path) if hosts.is_lead() else contextlib.nullcontext():
            workdir.claim(path, cfg)
            _show("config", json.dumps(config_lib.to_dict(cfg), indent=2))
            _show("mesh", f"{dict(mesh.shape)} of {mesh.size} x {mesh.devices.flat[0].device_kind}")
            _show("state", inventory.table(setup.shapes, setup.shardings, cost.count(setup.model)))
            train = cfg.train
            store = CheckpointStore(
                path, keep_last=train.keep_checkpoints, keep_every=train.keep_every, keep_best=train.keep_best
            )
            with contextlib.closing(store):
                return _train(cfg, path, setup, data, tokenizer, store)


def _with_own_model(cfg: RunConfig, path: epath.Path) -> RunConfig:
    """A run that goes on has its architecture in its own checkpoints, wherever that which it began with has gone."""
    if not isinstance(cfg.model, ModelOf) or not committed_steps(path / directory.DIRECTORY):
        return cfg
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, checkpoint=str(path)))


class Data(NamedTuple):
    """This host's part of the data, opened and checked."""

    train: loader.TrainData
    eval: loader.EvalBatches | None


def _open_data(cfg: RunConfig, tokenizer: Tokenizer) -> Data:
    sharding: NamedSharding = rules.batch_sharding(jax.sharding.get_mesh())
    # Hosts that split heads or a sequence load the same rows.
    host, num_hosts = hosts.row_group(sharding, (cfg.data.batch_size, cfg.model.seq_len))
    train = loader.TrainData(cfg.data, seq_len=cfg.model.seq_len, seed=cfg.seed, num_hosts=num_hosts, host=host)
    for name, content in train.contents.items():
        hosts.check_same(int(content, 16), name)
    if cfg.data.eval is None:
        return Data(train, None)
    heldout_store = store_lib.open_store(cfg.data.eval, fingerprint=tokenizer.fingerprint)
    hosts.check_same(int(heldout_store.content, 16), cfg.data.eval)
    heldout = loader.eval_batches(
        heldout_store,
        batch_size=cfg.data.batch_size,
        seq_len=cfg.model.seq_len,
        max_batches=cfg.train.eval_batches or None,
        num_hosts=num_hosts,
        host=host,
    )
    return Data(train, heldout)


def _train(
    cfg: RunConfig, path: epath.Path, setup: Setup, data: Data, tokenizer: Tokenizer, store: CheckpointStore
) -> dict[str, Any]:
    account = Account(data.train.contents)
    latest = store.latest()
    if latest is None:
        state, lineage = _start(cfg, setup, tokenizer)
    else:
        summary = _finished(cfg, path, latest)
        if summary is not None:
            logging.info("%s: finished already, at step %d of %d.", path, latest, cfg.train.num_steps)
            return summary
        lineage = read_meta(store.directory / str(latest)).lineage
        _check_stage(store.directory / str(latest), lineage, setup.task.stage)
        state = _restore(store, latest, setup, tokenizer, account)
        logging.info("Going on from step %d of %d.", latest, cfg.train.num_steps)
    meta = meta_lib.make(setup.model, run=config_lib.to_dict(cfg), tokenizer=tokenizer.fingerprint, lineage=lineage)
    prepared = setup.task.prepare(data.train)
    throughput = Throughput(
        flops_per_token=cost.flops_per_token(setup.model, cfg.model.seq_len).train,
        devices=list(jax.sharding.get_mesh().devices.flat),
    )
    result = fit(
        setup.task.objective,
        setup.optimizer,
        state,
        iter(GlobalBatches(loader.train_batches(prepared.data, start_step=latest or 0))),
        frozen=prepared.frozen,
        num_steps=cfg.train.num_steps,
        seed=cfg.seed,
        accumulate_steps=cfg.train.accumulate_steps,
        log_every=cfg.train.log_every,
        hooks=_hooks(cfg, path, setup, data, tokenizer, store, meta, account, latest or 0),
        throughput=throughput,
        mix_fn=setup.task.carried.mix_fn if setup.task.carried else None,
        renew_fn=prepared.renew_fn,
    )
    summary = _summary(cfg, path, setup, result, account, throughput)
    if hosts.is_lead():
        write_json(path / SUMMARY_FILE, summary)
    return summary


def _start(cfg: RunConfig, setup: Setup, tokenizer: Tokenizer) -> tuple[TrainState, Sequence[Mapping[str, Any]]]:
    """A new run's state, and its lineage."""
    tx, shardings = setup.optimizer.tx, setup.shardings
    companions, stage = setup.task.companions, dict(setup.task.stage) | setup_lib.facts(cfg)

    def init_fn(rng: Array) -> Params:
        return {**transformer.init(setup.model, rng), **companions.init_fn(rng)}

    if cfg.train.init_from is None:
        return state_lib.create(init_fn, tx, seed=cfg.seed, shardings=shardings, extra=setup.shapes.extra), [stage]
    own, others = companions.apart(shardings.params)
    meta, params = start_from(cfg.train.init_from, setup.model, shardings=own, tokenizer=tokenizer)
    if cfg.optim.zeros == "trained" and cfg.optim.prune is None:
        warn_of_zeros(params)
    if others:
        params = {**params, **jax.jit(companions.init_fn, out_shardings=others)(jax.random.key(cfg.seed))}
    stage |= {"init_from": cfg.train.init_from, "init_step": meta.step}
    stage["init_params_sha256"] = meta_lib.params_hash(meta.model, meta.checksums)
    return state_lib.from_params(params, tx, shardings=shardings, extra=setup.shapes.extra), [*meta.lineage, stage]


def _check_stage(path: epath.Path, lineage: Sequence[Mapping[str, Any]], stage: Mapping[str, Any]) -> None:
    """Raises:
    ValueError: when what was trained here was another task.
    """
    before = lineage[-1] if lineage else {}
    changes = [f"{key}: {before[key]} -> {now}" for key, now in stage.items() if before.get(key, now) != now]
    if changes:
        raise ValueError(
            f"{path}: the run was started with another task (old -> new): {'; '.join(changes)}; "
            "go on with the old one, or choose another --workdir"
        )


def _finished(cfg: RunConfig, path: epath.Path, latest: int) -> dict[str, Any] | None:
    """The summary of a run with nothing left to do; None if it was killed before writing one."""
    if latest < cfg.train.num_steps:
        return None
    read_meta(path / directory.DIRECTORY / str(latest))  # A damaged checkpoint is no end.
    try:
        summary = read_json(path / SUMMARY_FILE)
        return summary if summary.get("step") == latest else None
    except (ValueError, AttributeError):
        logging.warning("%s: is damaged; it is written again.", path / SUMMARY_FILE)
        return None


class Account(Hook):
    """What a run has used since its beginning, over all its restarts.

    Args:
      contents: the checksum of each source's tokens.
    """

    def __init__(self, contents: Mapping[str, str]) -> None:
        self.tokens = 0
        self._contents = dict(contents)
        self._wall_before = 0.0
        self._started = time.perf_counter()

    def on_step(self, step: int, values: Values) -> None:
        self.tokens += round(values["tokens"])

    @property
    def wall_seconds(self) -> float:
        return self._wall_before + time.perf_counter() - self._started

    def used(self) -> dict[str, float]:
        return {"train_tokens": self.tokens, "wall_seconds": self.wall_seconds}

    def to_json(self) -> dict[str, Any]:
        return self.used() | {"contents": self._contents}

    def restore(self, data: Mapping[str, Any]) -> None:
        """Raises:
        ValueError: if the run was trained on other tokens.
        """
        for name, now in self._contents.items():
            before = data.get("contents", {}).get(name, now)
            if before != now:
                raise ValueError(
                    f"{name}: holds other tokens than the run was trained on (checksum {now}, then {before}); "
                    "put the old ones back, or choose another --workdir (train.init_from starts from these parameters)"
                )
        self.tokens, self._wall_before = data["train_tokens"], data["wall_seconds"]


def _restore(store: CheckpointStore, step: int, setup: Setup, tokenizer: Tokenizer, account: Account) -> TrainState:
    apart = functools.partial(_apart, setup.task.companions)
    found = resume(
        store,
        step,
        shapes=apart(setup.shapes),
        shardings=apart(setup.shardings),
        model=setup.model,
        tokenizer=tokenizer,
    )
    lacking = account.used().keys() - found.data.keys()
    if lacking:
        raise ValueError(
            f"{store.directory / str(step)}: its data item lacks {', '.join(sorted(lacking))}; restore it from a copy, "
            "or choose another workdir if this is not a checkpoint of a pretraining run"
        )
    account.restore(found.data)
    return _together(setup.task.companions, found.state)


def _apart(companions: Companions, state: TrainState) -> TrainState:
    """A state as it is saved: parameters that are not the model's are in `extra`."""
    params, others = companions.apart(state.params)
    return dataclasses.replace(state, params=params, extra={**state.extra, **others})


def _together(companions: Companions, state: TrainState) -> TrainState:
    """The inverse of `_apart`."""
    others = {name: state.extra[name] for name in companions.shapes}
    extra = {name: value for name, value in state.extra.items() if name not in others}
    return dataclasses.replace(state, params={**state.params, **others}, extra=extra)


def _hooks(
    cfg: RunConfig,
    path: epath.Path,
    setup: Setup,
    data: Data,
    tokenizer: Tokenizer,
    store: CheckpointStore,
    meta: Meta,
    account: Account,
    start_step: int,
) -> list[Hook]:
    """In the order in which they are called: figures of a step are on disk before its checkpoint is."""
    scores: dict[int, float] = {}

    def save(step: int, state: TrainState) -> None:
        state = _apart(setup.task.companions, state)
        store.save(
            step,
            score=scores.get(step),
            meta=meta,
            params=state.params,
            opt_state=state.opt_state,
            extra=state.extra,
            data=account.to_json(),
            assets={tokenizer_lib.FILE_NAME: tokenizer.to_bytes()},
        )

    hooks: list[Hook] = [account]
    if cfg.train.profile_steps is not None:
        first, last = cfg.train.profile_steps
        hooks.append(hooks_lib.Profiler(str(path / "profile"), first=first, last=last))
    if data.eval is not None:
        hooks.append(_evaluation(cfg, setup, data.eval, scores))
    hooks.append(hooks_lib.Checkpoints(save, store.wait, every=cfg.train.checkpoint_every, last_step=start_step))
    if hosts.is_lead():
        hooks.append(MetricsWriter(path, start_step=start_step))
        hooks.append(hooks_lib.ProgressLine(num_steps=cfg.train.num_steps))
    return hooks


def _evaluation(cfg: RunConfig, setup: Setup, batches: loader.EvalBatches, scores: dict[int, float]) -> Hook:
    """Evaluates the parameters and, where the optimizer keeps one, their average.

    Args:
      scores: gets the loss by step.
    """
    evaluate = functools.partial(
        evaluator(setup.task.evaluated, seed=cfg.seed),
        batches=GlobalBatches(batches),
        num_bytes=batches.num_bytes if cfg.train.objective == "next_token" else None,
    )

    def values(state: TrainState) -> Values:
        found = {f"eval/{name}": value for name, value in evaluate(state.params).items()}
        if cfg.optim.ema_decay:
            average = ema.averaged_params(state.opt_state, state.params)
            found |= {f"eval_ema/{name}": value for name, value in evaluate(average).items()}
        if math.isfinite(found["eval/loss"]):
            scores[int(state.step)] = found["eval/loss"]
        return found

    return hooks_lib.Evaluation(values, every=cfg.train.eval_every)


class GlobalBatches:
    """Batches of this host's rows as global arrays on the mesh in use; iterable as often as what it wraps."""

    def __init__(self, host_batches: Iterable[Batch]) -> None:
        self._host_batches = host_batches

    def __iter__(self) -> Iterator[Batch]:
        sharding: NamedSharding = rules.batch_sharding(jax.sharding.get_mesh())
        for batch in self._host_batches:
            yield hosts.to_global(batch, sharding)


def _summary(
    cfg: RunConfig, path: epath.Path, setup: Setup, result: FitResult, account: Account, throughput: Throughput
) -> dict[str, Any]:
    counts = cost.count(setup.model)
    values: dict[str, Any] = {}
    # The newest of each figure, also of those that were written down before a restart.
    for figures in (*(read_metrics(path) if hosts.is_lead() else ()), result.values):
        values |= figures
    shown = ("accuracy", "skipped_steps", "tokens_per_second", "mfu")
    return {
        "name": cfg.name,
        "outcome": result.outcome,
        "step": result.step,
        "num_params": counts.total,
        "num_active_params": counts.active,
        **account.used(),
        "peak_memory_bytes": peak_memory_bytes(),
        **{name: value for name, value in values.items() if name in shown or "loss" in name or name.startswith("eval")},
        **throughput.overall(),
    }


def peak_memory_bytes() -> int:
    """The most that was in use: on the fullest local accelerator or, on CPU, by this process."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [stat["peak_bytes_in_use"] for stat in stats if stat and "peak_bytes_in_use" in stat]
    return max(peaks, default=process.peak_memory_bytes())


def _show(title: str, text: str) -> None:
    if hosts.is_lead():
        logging.info("%s\n%s", title, text)
