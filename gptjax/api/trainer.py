"""transformers' Trainer over `train.loop.fit`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
from absl import logging
from jax.sharding import Mesh

from gptjax import lock
from gptjax.api.arguments import TrainingArguments
from gptjax.api.model import GPT4LMHeadModel
from gptjax.api.text import DataCollatorForLanguageModeling, GPT4Tokenizer
from gptjax.checkpoint import directory
from gptjax.checkpoint import meta as meta_lib
from gptjax.checkpoint.store import CheckpointStore
from gptjax.data import mixture
from gptjax.data import tokenizer as tokenizer_lib
from gptjax.data.examples import token_ids
from gptjax.eval import perplexity
from gptjax.nn import transformer
from gptjax.optim import build, zeros
from gptjax.parallel import hosts, rules
from gptjax.parallel import mesh as mesh_lib
from gptjax.train import hooks, loop, setup
from gptjax.train import state as state_lib
from gptjax.train.evaluate import EvaluateFn, evaluator
from gptjax.train.metrics import MetricsWriter
from gptjax.train.resume import resume
from gptjax.train.state import TrainState
from gptjax.types import Batch, Objective, Params

_ALL_DEVICES = mesh_lib.all_devices("data")


class TrainOutput(NamedTuple):
    """What `Trainer.train` returns; `metrics` are the newest figures by name."""

    global_step: int
    training_loss: float
    metrics: dict[str, float]


class Trainer:
    """Trains a model on all of this machine's devices, each with its part of every batch; what was pruned stays 0.

    Args:
      model: its parameters are replaced by the trained ones when `train` returns.
      data_collator: decides the objective; causal language modelling unless given.
      train_dataset, eval_dataset: sequences of token ids or of mappings with `input_ids`.
      tokenizer: saved with every checkpoint; the collator's unless given.
    """

    def __init__(
        self,
        model: GPT4LMHeadModel,
        args: TrainingArguments,
        *,
        data_collator: DataCollatorForLanguageModeling | None = None,
        train_dataset: Sequence[Any] | None = None,
        eval_dataset: Sequence[Any] | None = None,
        tokenizer: GPT4Tokenizer | None = None,
    ) -> None:
        if not isinstance(args, TrainingArguments):
            raise ValueError(f"Trainer: args={args!r}: expected TrainingArguments(output_dir=...)")
        tokenizer = tokenizer or (data_collator.tokenizer if data_collator else None)
        if tokenizer is None:
            raise ValueError("Trainer: give a tokenizer, or a data_collator that has one")
        if model.config.has_stored_kernels:
            raise ValueError("Trainer: the model's kernels are in few bits, which do not train; train it in floats")
        self.model, self.args, self.tokenizer = model, args, tokenizer
        self.data_collator = data_collator or DataCollatorForLanguageModeling(tokenizer, mlm=False)
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        if args.eval_strategy != "no":
            _required(eval_dataset, f"eval_dataset, for eval_strategy={args.eval_strategy!r}")
        model.tokenizer = tokenizer
        model.config = self.data_collator.model_config(model.config)
        if args.bf16:
            model.config = dataclasses.replace(model.config, dtype="bfloat16")
        setup.check_tokenizer(model.config, tokenizer.inner, path="given to the Trainer")

    def train(self, *, resume_from_checkpoint: bool = False) -> TrainOutput:
        """Trains to the end of the epochs or steps asked for; checkpoints go to `output_dir`.

        Args:
          resume_from_checkpoint: goes on from the newest checkpoint in `output_dir`, if there is one; never
            from one elsewhere.

        Raises:
          ValueError: if there is no data or it does not fit the model, `output_dir` has a run that is not to be
            resumed, or training diverges.
        """
        if not isinstance(resume_from_checkpoint, bool):
            raise ValueError(
                f"resume_from_checkpoint={resume_from_checkpoint!r}: expected True or False, for the newest checkpoint "
                f"of output_dir; to start from another, give the Trainer a model that from_pretrained read"
            )
        args, dataset = self.args, _required(self.train_dataset, "train_dataset")
        num_rows, length = args.num_rows(len(dataset)), self._row_length(dataset)
        if args.eval_strategy != "no":
            self._row_length(_required(self.eval_dataset, "eval_dataset"))
        is_pruned = zeros.part_of_kernels(self.model.params) >= zeros.LEAST_PRUNED
        treated: Literal["kept", "trained"] = "kept" if is_pruned else "trained"
        with (
            mesh_lib.use(_ALL_DEVICES) as mesh,
            lock.exclusive(args.output_dir),
            contextlib.closing(self._store(resume_from_checkpoint)) as store,
        ):
            batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * mesh.size
            num_steps = args.max_steps if num_rows is None else math.ceil(num_rows / batch_size)
            steps_per_epoch = math.ceil(len(dataset) / batch_size)
            optimizer, state = self._start(mesh, store, num_steps, treated)
            start_step = int(state.step)
            result = loop.fit(
                self._objective(),
                optimizer,
                state,
                self._train_batches(
                    mesh, dataset, length=length, batch_size=batch_size, num_rows=num_rows, start_step=start_step
                ),
                frozen=self._frozen(mesh),
                num_steps=num_steps,
                seed=args.seed,
                accumulate_steps=args.gradient_accumulation_steps,
                log_every=args.logging_steps,
                hooks=self._hooks(store, num_steps, start_step=start_step, steps_per_epoch=steps_per_epoch),
            )
        self.model.params = result.state.params
        return TrainOutput(result.step, result.values.get("loss", math.nan), dict(result.values))

    def evaluate(self, eval_dataset: Sequence[Any] | None = None) -> dict[str, float]:
        """`eval_loss` (nats per target), `eval_perplexity` and `eval_accuracy` over every target of the set."""
        with mesh_lib.use(_ALL_DEVICES) as mesh:
            return self._evaluate(jax.device_put(self.model.params, rules.replicated(mesh)), eval_dataset)

    def save_model(self, output_dir: str | os.PathLike[str] | None = None) -> None:
        """Writes model and tokenizer for `from_pretrained`; to `output_dir/model` unless told."""
        self.model.save_pretrained(output_dir or os.path.join(self.args.output_dir, "model"))

    def _objective(self) -> Objective:
        """What is minimised."""
        return self.data_collator.objective(self.model.config)

    def _frozen(self, mesh: Mesh) -> Any:
        """The objective's second argument, on the mesh."""
        del mesh
        return ()

    def _evaluate(self, params: Params, eval_dataset: Sequence[Any] | None = None) -> dict[str, float]:
        dataset = _required(self.eval_dataset if eval_dataset is None else eval_dataset, "eval_dataset")
        figures = self._evaluator(params, self._eval_batches(dataset))
        return {
            "eval_loss": figures["loss"],
            "eval_perplexity": perplexity.perplexity(figures["loss"], 1.0),
            "eval_accuracy": figures["accuracy"],
        }

    @functools.cached_property
    def _evaluator(self) -> EvaluateFn:
        return evaluator(self.data_collator.objective(self.model.config), seed=self.args.seed)

    def _eval_batches(self, dataset: Sequence[Any]) -> Iterator[Batch]:
        mesh = jax.sharding.get_mesh()
        size, length = self.args.per_device_eval_batch_size * mesh.size, self._row_length(dataset)
        for start in range(0, len(dataset), size):
            rows = [dataset[i] if i < len(dataset) else () for i in range(start, start + size)]
            yield self._to_devices(mesh, rows, length)

    def _store(self, resume: bool) -> CheckpointStore:
        store = CheckpointStore(self.args.output_dir, keep_last=self.args.save_total_limit or 0)
        newest = store.latest()
        if newest is None and resume:
            logging.info("%s: no checkpoint to resume from, so training starts at step 0.", store.directory)
        if newest is None or resume:
            return store
        if self.args.overwrite_output_dir:
            logging.warning("%s: removing the run with checkpoints up to step %d", store.directory, newest)
            for step in store.steps():
                directory.remove(store.directory / str(step))
            return store
        store.close()
        raise ValueError(
            f"{self.args.output_dir} holds a run with checkpoints up to step {newest}: go on with "
            f"train(resume_from_checkpoint=True), choose another output_dir, or set overwrite_output_dir=True"
        )

    def _start(
        self, mesh: Mesh, store: CheckpointStore, num_steps: int, treated: Literal["kept", "trained"]
    ) -> tuple[build.Optimizer, TrainState]:
        config = self.model.config
        shapes, axes = transformer.abstract_params(config), transformer.param_axes(config)
        optimizer = build.build(
            dataclasses.replace(self.args.optimizer(num_steps=num_steps), zeros=treated),
            shapes,
            axes,
            num_steps=num_steps,
            balance_rate=setup.balance_rate(config),
        )
        abstract = state_lib.abstract_state(shapes, optimizer.tx)
        shardings = rules.state_shardings(mesh, abstract, axes, shapes)
        newest = store.latest()
        if newest is None:
            # A copy: the loop takes over the buffers of its state, and these are the user's.
            params = jax.device_put(self.model.params, shardings.params, may_alias=False)
            return optimizer, state_lib.from_params(params, optimizer.tx, shardings=shardings)
        found = resume(
            store, newest, shapes=abstract, shardings=shardings, model=config, tokenizer=self.tokenizer.inner
        )
        return optimizer, found.state

    def _hooks(
        self, store: CheckpointStore, num_steps: int, *, start_step: int, steps_per_epoch: int
    ) -> list[hooks.Hook]:
        args = self.args
        meta = meta_lib.make(
            self.model.config,
            run=args.to_dict(),
            tokenizer=self.tokenizer.inner.fingerprint,
            lineage=self.model.lineage,
        )
        assets = {tokenizer_lib.FILE_NAME: self.tokenizer.inner.to_bytes()}

        def save(step: int, state: TrainState) -> None:
            store.save(step, meta=meta, params=state.params, opt_state=state.opt_state, assets=assets)

        chosen: list[hooks.Hook] = [
            # A notebook is no terminal, and shows no log lines.
            hooks.ProgressLine(num_steps=num_steps, log_fn=print),
            MetricsWriter(args.output_dir, start_step=start_step),
        ]
        eval_every = args.eval_every(steps_per_epoch)
        if eval_every is not None:
            chosen.append(hooks.Evaluation(lambda state: self._evaluate(state.params), every=eval_every))
        save_every = args.save_every(steps_per_epoch)
        return [*chosen, hooks.Checkpoints(save, store.wait, every=save_every, last_step=start_step)]

    def _train_batches(
        self, mesh: Mesh, dataset: Sequence[Any], *, length: int, batch_size: int, num_rows: int | None, start_step: int
    ) -> Iterator[Batch]:
        """Endless shuffled epochs; rows from `num_rows` on are padding."""
        row = start_step * batch_size
        while True:
            wanted = range(row, row + batch_size)
            rows = [self._example(dataset, i) if num_rows is None or i < num_rows else () for i in wanted]
            yield self._to_devices(mesh, rows, length)
            row += batch_size

    def _example(self, dataset: Sequence[Any], row: int) -> Any:
        epoch, index = divmod(row, len(dataset))
        return dataset[mixture.permute(index, len(dataset), key=mixture.stream_key(self.args.seed, epoch))]

    def _to_devices(self, mesh: Mesh, rows: Sequence[Any], length: int) -> Batch:
        return hosts.to_global(self.data_collator(rows, length=length), rules.batch_sharding(mesh))

    def _row_length(self, dataset: Sequence[Any]) -> int:
        """That of the longest example, all of which are checked: rows of one length need one compilation."""
        length, size = 0, self.tokenizer.vocab_size
        for ids in map(token_ids, dataset):
            if len(ids) and not 0 <= ids.min() <= ids.max() < size:
                raise ValueError(
                    f"an example has tokens {ids.min()} to {ids.max()}, expected 0 to {size - 1}; "
                    f"is it made with the Trainer's tokenizer?"
                )
            length = max(length, len(ids))
        if length > self.model.config.seq_len:
            raise ValueError(
                f"an example has {length} tokens, more than the model's seq_len={self.model.config.seq_len}; "
                f"choose a smaller block_size"
            )
        if length < (1 if self.data_collator.mlm else 2):
            raise ValueError(f"the longest example has {length} tokens, so there is nothing to predict")
        return length


def _required(dataset: Sequence[Any] | None, name: str) -> Sequence[Any]:
    if dataset is None or not len(dataset):
        raise ValueError(f"{name}: expected at least one example, got {'none' if dataset is None else 'an empty one'}")
    return dataset
