"""What a run trains for, beyond what its config says of the model, the data and the optimizer.

Pretraining is one task; distillation is another, with a teacher that is an argument of the step, with
parameters that train beside the model's without being part of it, with data that a teacher has annotated, and with
rows that the model wrote itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gptjax.data.loader import TrainData
from gptjax.train.state import TrainState
from gptjax.types import Array, Batch, Objective, Params

MixFn = Callable[[Batch, Mapping[str, Any], Array], Batch]
RenewFn = Callable[[int, TrainState], TrainState]


class Prepared(NamedTuple):
    """What the steps read besides the state.

    Attributes:
      data: the training batches of this host.
      frozen: the objective's second argument, laid out on the mesh; neither saved nor differentiated.
      renew_fn: `(steps taken, state) -> state`, called before every step, to renew what `Carried` says.
    """

    data: TrainData
    frozen: Any = ()
    renew_fn: RenewFn | None = None


def _as_it_is(data: TrainData) -> Prepared:
    return Prepared(data)


def _nothing(rng: Array) -> Params:
    del rng
    return {}


@dataclass(frozen=True, kw_only=True)
class Companions:
    """Parameters that train with the model: entries of the tree at its top, under names that no model has.

    Attributes:
      shapes, axes: trees as `transformer.abstract_params` and `param_axes` give them.
      init_fn: key -> parameters.
    """

    shapes: Params = field(default_factory=dict)
    axes: Params = field(default_factory=dict)
    init_fn: Callable[[Array], Params] = _nothing

    def apart(self, params: Params) -> tuple[Params, Params]:
        """A tree, of parameters or of anything like them, as the model's part and the companions'."""
        model = {name: value for name, value in params.items() if name not in self.shapes}
        return model, {name: params[name] for name in self.shapes}


@dataclass(frozen=True, kw_only=True)
class Carried:
    """Entries of `TrainState.extra`: made from the state now and then, saved with it, and read by every step.

    Attributes:
      shapes: of the entries, a tree; they begin as zeros, on every device.
      mix_fn: `(batch, extra, steps taken) -> batch`, what a step makes of its batch with them.
    """

    shapes: Mapping[str, Any]
    mix_fn: MixFn


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a run trains for.

    Attributes:
      objective: minimised.
      evaluated: gives the figures on held-out text; it gets no `frozen`.
      stage: the entry in the lineage of what is trained; a run goes on only as the same.
      prepare: called once the run is known to have steps left, under its mesh.
      companions: saved for the run to go on with, apart from the model.
      carried: so too; what `Prepared.renew_fn` renews.
    """

    objective: Objective
    evaluated: Objective
    stage: Mapping[str, Any]
    prepare: Callable[[TrainData], Prepared] = _as_it_is
    companions: Companions = Companions()
    carried: Carried | None = None
