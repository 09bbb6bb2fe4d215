"""From a checkpoint back to the state of a run, or to the parameters that another run starts with."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath

from gptjax.checkpoint import arrays
from gptjax.checkpoint import meta as meta_lib
from gptjax.checkpoint.meta import Meta
from gptjax.checkpoint.store import CheckpointStore, find, find_agreed, read_meta, restore_params
from gptjax.data.tokenizer import Tokenizer
from gptjax.nn import transformer
from gptjax.nn.config import ModelConfig
from gptjax.optim import zeros
from gptjax.train.model_of import check_floats
from gptjax.train.state import TrainState
from gptjax.types import Params


def check_start(path: str, model: ModelConfig, *, tokenizer: Tokenizer) -> None:
    """What `start_from` refuses, before anything of a run is written.

    Raises:
      ValueError: as `start_from`.
    """
    checkpoint = find(path)
    _check(path, checkpoint, read_meta(checkpoint), model, tokenizer)


def start_from(path: str, model: ModelConfig, *, shardings: Params, tokenizer: Tokenizer) -> tuple[Meta, Params]:
    """The parameters of another run, to go on from in a new one; every process calls it.

    Args:
      path: its workdir (the newest checkpoint) or a checkpoint.
      model: what they are for; its sizes must be theirs, and what else differs is logged.
      shardings: where they go.

    Raises:
      ValueError: if they cannot be read, are of another shape, or were trained with another tokenizer.
    """
    checkpoint = find_agreed(path)
    _check(path, checkpoint, read_meta(checkpoint), model, tokenizer)
    logging.info("Starting with the parameters of %s.", checkpoint)
    meta, params = restore_params(checkpoint, shardings=shardings, dtype=jnp.float32)
    for change in meta_lib.model_differences(meta.model, model):
        logging.warning("They were trained in a model that differs (theirs -> this one): %s", change)
    return meta, params


def warn_of_zeros(params: Params) -> None:
    """Says so where training is about to fill in what pruning left out."""
    part = zeros.part_of_kernels(params)
    if part >= zeros.LEAST_PRUNED:
        logging.warning(
            "%.0f %% of the kernels' weights are 0, and will not stay so; optim.zeros=kept keeps them.", 100 * part
        )


def _check(path: str, checkpoint: epath.Path, meta: Meta, model: ModelConfig, tokenizer: Tokenizer) -> None:
    check_floats(meta.model, f"train.init_from={path}")
    theirs, ours = (arrays.flatten(transformer.abstract_params(cfg)) for cfg in (meta.model, model))
    for line in arrays.mismatches(ours, theirs):
        raise ValueError(f"train.init_from={path}: {line}; expected a model of the same sizes")
    if meta.tokenizer != tokenizer.fingerprint:
        raise ValueError(
            f"train.init_from={path}: trained with tokenizer {meta.tokenizer[:12]}, but data.tokenizer is "
            f"{tokenizer.fingerprint[:12]}; prepare data with its own, --tokenizer={checkpoint}/assets"
        )


class Resumed(NamedTuple):
    """A state laid out as asked for, and the JSON that was saved with it."""

    state: TrainState
    data: dict[str, Any]


def resume(
    store: CheckpointStore,
    step: int,
    *,
    shapes: TrainState,
    shardings: TrainState,
    model: ModelConfig,
    tokenizer: Tokenizer,
) -> Resumed:
    """Reads the checkpoint of a step.

    Args:
      shapes, shardings: what the state is to be like, and where it goes.
      model: explains a mismatch of shapes.
      tokenizer: what the run goes on with.

    Raises:
      ValueError: with the path, if the checkpoint cannot be read, has other shapes, or was trained with
        another tokenizer.
    """
    wanted = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )
    found = store.restore(step, params=wanted.params, opt_state=wanted.opt_state, extra=wanted.extra, model=model)
    if found.meta.tokenizer != tokenizer.fingerprint:
        raise ValueError(
            f"{store.directory / str(step)}: its tokens are those of tokenizer {found.meta.tokenizer[:12]}, "
            f"but the one given is {tokenizer.fingerprint[:12]}; give the one that the run was started with"
        )
    count = jax.device_put(jnp.asarray(step, jnp.int32), shardings.step)
    state = TrainState(step=count, params=found.params, opt_state=found.opt_state, extra=found.extra)
    return Resumed(state, found.data)
