"""A model family as data: which tensor of theirs is which of ours, and how the configs translate.

A `Family` drives both directions. Its rows name our parameters within a block (or of the whole
model) and their tensors by a template with `{layer}` and, where each expert is a tensor of its
own, `{expert}`. Converting is then a list of `Unit`s, each one tensor of theirs: whoever holds
the data goes through them one at a time, so memory is that of a tensor, not of the model.

Other formats than Hugging Face's (GGUF, llama2.c) present their tensors under its names.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gptjax import config as config_lib
from gptjax.checkpoint import arrays
from gptjax.checkpoint.meta import model_differences
from gptjax.interop.layout import Layout, Same, Shape
from gptjax.interop.reader import MAX_EXPERTS_TOGETHER, ConfigReader
from gptjax.nn import transformer
from gptjax.nn.config import BlockConfig, LayerGroup, ModelConfig, MoEConfig


@dataclass(frozen=True)
class Row:
    """`theirs` holds `ours`, laid out by `layout`.

    Attributes:
      theirs: name with `{layer}` where each layer has one, and `{expert}` where each expert has.
      ours: path or paths; within a block where `theirs` has a layer. A row is for the blocks that have them all.
      layout: or how to find it from the block (None for the whole model).
    """

    theirs: str
    ours: str | tuple[str, ...]
    layout: Layout | Callable[[BlockConfig], Layout] = Same()

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.ours,) if isinstance(self.ours, str) else self.ours


@dataclass(frozen=True)
class Family:
    """A family of models, under the name that Hugging Face's `config.json` has in `model_type`.

    Attributes:
      architecture: the class in `architectures`.
      read_config: their config to ours; it takes every key that matters, and what it leaves is refused.
      write_config: the keys of their config for one of ours; need not check that the family can express it.
      ignored: patterns of tensors without information of their own (old buffers).
      prefix: of all names but the head's, which files of the model without its head lack.
      adapt: their tensors without those that the model does not compute with.
    """

    name: str
    architecture: str
    rows: tuple[Row, ...]
    read_config: Callable[[ConfigReader], ModelConfig]
    write_config: Callable[[ModelConfig], dict[str, Any]]
    ignored: tuple[str, ...] = ()
    prefix: str = "model."
    adapt: Callable[[Mapping[str, Any], ModelConfig], Mapping[str, Any]] = lambda tensors, model: tensors

    def name_of(self, ours: str) -> str:
        """The tensor of theirs that holds a parameter of the whole model."""
        return next(row.theirs for row in self.rows if row.ours == ours)


@dataclass(frozen=True)
class Slice:
    """`parameter[index]`; `shape` is that of the slice."""

    path: str
    index: tuple[int, ...]
    shape: Shape


@dataclass(frozen=True)
class Unit:
    """One tensor of theirs and the slices of our parameters that it holds."""

    theirs: str
    ours: tuple[Slice, ...]
    layout: Layout

    @property
    def theirs_shape(self) -> Shape:
        return self.layout.theirs_shape([part.shape for part in self.ours])


def units(family: Family, model: ModelConfig) -> list[Unit]:
    """Every tensor of the model, layer after layer; together they hold each of our values once.

    A group that shares its weights is written once for each of its layers. Kernels in few bits are the floats that they
    stand for.
    """
    floats = transformer.abstract_params(dataclasses.replace(model, quant=None))
    shapes = {path: leaf.shape for path, leaf in arrays.flatten(floats).items()}
    found: list[Unit] = []
    covered: set[str] = set()
    for prefix, index, layer, block in _scopes(model):
        for row in family.rows:
            paths = [prefix + path for path in row.paths]
            if ("{layer}" in row.theirs) != (layer is not None) or not all(path in shapes for path in paths):
                continue
            covered.update(paths)
            layout = row.layout(block) if callable(row.layout) and block is not None else row.layout
            for expert in range(_num_experts(block)) if "{expert}" in row.theirs else [None]:
                at = index if expert is None else (*index, expert)
                slices = tuple(Slice(path, at, tuple(shapes[path][len(at) :])) for path in paths)
                found.append(Unit(row.theirs.format(layer=layer, expert=expert), slices, layout))  # type: ignore[arg-type]
    missing = sorted(shapes.keys() - covered)
    assert not missing, f"{family.name}: no row holds {missing[:5]}"
    return found


def _scopes(model: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], int | None, BlockConfig | None]]:
    """Where our paths begin: the whole model, then each layer, with its index into stacked parameters."""
    yield "", (), None, None
    layer = 0
    for number, group in enumerate(model.groups):
        for repeat in range(group.repeats):
            for position, block in enumerate(group.pattern):
                yield f"group_{number}/block_{position}/", () if group.shared else (repeat,), layer, block
                layer += 1


def _num_experts(block: BlockConfig | None) -> int:
    assert block is not None and isinstance(block.mlp, MoEConfig), "only mixtures of experts have rows by expert"
    return block.mlp.num_experts


def check_names(family: Family, wanted: Sequence[Unit], found: Mapping[str, Any], *, path: str) -> None:
    """Compares the tensors of a file with those that the config asks for.

    Args:
      found: by name; values have a `shape`.
      path: of the file or folder, for messages.

    Raises:
      ValueError: naming the tensor that is missing, unknown, or of another shape.
    """
    names = {unit.theirs for unit in wanted}
    missing = [unit for unit in wanted if unit.theirs not in found]
    if missing:
        raise ValueError(
            f"{path}: {missing[0].theirs}: missing; expected {list(missing[0].theirs_shape)} from the config"
            + (f" ({len(missing) - 1} more are missing)" if len(missing) > 1 else "")
        )
    unknown = [n for n in found if n not in names and not any(re.fullmatch(p, n) for p in family.ignored)]
    if unknown:
        raise ValueError(
            f"{path}: {unknown[0]}: {list(found[unknown[0]].shape)} is no tensor of a {family.name} model of this "
            f"config ({len(unknown)} unknown); is the config that of these weights?"
        )
    for unit in wanted:
        if tuple(found[unit.theirs].shape) != unit.theirs_shape:
            raise ValueError(
                f"{path}: {unit.theirs}: got {list(found[unit.theirs].shape)}, "
                f"expected {list(unit.theirs_shape)} from the config"
            )


def family_of(model: ModelConfig, families: Mapping[str, Family], *, name: str | None = None) -> Family:
    """The family that can express a model: its config, written and read back, is the same.

    Args:
      name: the family to use; None takes the first that fits.

    Raises:
      ValueError: naming what the nearest family cannot express.
    """
    if name is not None and name not in families:
        raise ValueError(f"family {name!r}: unknown; expected one of {', '.join(sorted(families))}")
    lost: dict[str, list[str]] = {}
    refused: dict[str, str] = {}  # another kind of model altogether
    for family in [families[name]] if name is not None else families.values():
        try:
            lost[family.name] = _lost(family, model)
        except (ValueError, AssertionError, AttributeError, TypeError, KeyError) as error:
            refused[family.name] = str(error)
            continue
        if not lost[family.name]:
            return family
    if name is not None and lost:
        raise ValueError(
            f"family {name!r} is not this model's; it differs in (its -> this model's) {'; '.join(lost[name][:6])}"
        )
    if not lost:
        reasons = "; ".join(f"{family}: {reason}" for family, reason in refused.items())
        raise ValueError(f"no model family of other frameworks has this architecture: {reasons}")
    nearest = min(lost, key=lambda family: len(lost[family]))
    raise ValueError(
        f"no model family of other frameworks has this architecture; the nearest is {nearest}, where (its -> this "
        f"model's) {'; '.join(lost[nearest][:6])}"
    )


def _lost(family: Family, model: ModelConfig) -> list[str]:
    written = family.write_config(model)
    return model_differences(inference_form(read_config(family, written, path=family.name)), inference_form(model))


def read_config(family: Family, values: Mapping[str, Any], *, path: str) -> ModelConfig:
    """Our config of theirs.

    Raises:
      ValueError: naming the key that is missing, mistyped, unknown or not supported.
    """
    reader = ConfigReader(values, path=path)
    try:
        model = family.read_config(reader)
        reader.finish()
        config_lib.check(model)
        num_experts = sum(block.mlp.num_experts for block in model.blocks if isinstance(block.mlp, MoEConfig))
        if num_experts > MAX_EXPERTS_TOGETHER:
            raise ValueError(f"{num_experts:,} experts in all layers together, expected at most {MAX_EXPERTS_TOGETHER}")
    except ValueError as error:  # our own configs' do not know of the file
        raise error if str(error).startswith(path) else ValueError(f"{path}: {error}") from error
    return model


def inference_form(model: ModelConfig) -> ModelConfig:
    """The model with all that only training or the machine decides at its default, and layers in one grouping.

    So are few bits: what other frameworks are told of is the floats that they stand for.
    """

    def plain(block: BlockConfig) -> BlockConfig:
        if not isinstance(block.mlp, MoEConfig):
            return block
        # `bias` has a parameter. A capacity only bounds what training computes: decoding has none.
        balancing: Literal["bias", "none"] = "bias" if block.mlp.balancing == "bias" else "none"
        mlp = dataclasses.replace(block.mlp, balancing=balancing, balance_rate=0.0, z_loss=0.0, capacity_factor=None)
        return dataclasses.replace(block, mlp=mlp)

    blocks = tuple(plain(block) for block in model.blocks)
    return dataclasses.replace(model, groups=group_layers(blocks), dtype="auto", remat="none", quant=None)


def group_layers(blocks: Sequence[BlockConfig]) -> tuple[LayerGroup, ...]:
    """Layers in as few groups as a repeated pattern allows: equal layers first, then the pattern, then the rest."""
    assert blocks, "a model has layers"
    known: dict[BlockConfig, int] = {}
    kinds = [known.setdefault(block, len(known)) for block in blocks]
    best: list[_Grouping] = [()] * (len(kinds) + 1)  # of the layers from each on
    for start in reversed(range(len(kinds))):
        best[start] = _best_grouping(kinds, start, best)
    groups, start = [], 0
    for period, repeats in best[0]:
        groups.append(LayerGroup(pattern=tuple(blocks[start : start + period]), repeats=repeats))
        start += period * repeats
    return tuple(groups)


_Grouping = tuple[tuple[int, int], ...]  # the length and repeats of each group's pattern


def _best_grouping(kinds: Sequence[int], start: int, best: Sequence[_Grouping]) -> _Grouping:
    """Of the layers from `start` on, given those of all shorter rests."""
    found: _Grouping | None = None
    equal = _num_repeats(kinds, start, 1)
    for lead in (0, equal):
        first = start + lead
        leading: _Grouping = ((1, lead),) if lead else ()
        for period in range(1, len(kinds) - first + 1):
            if found is not None and _size((*leading, (period, 1))) >= _size(found):
                break
            repeats = _num_repeats(kinds, first, period)
            if repeats == 1 and first + period < len(kinds):
                continue
            candidate = (*leading, (period, repeats), *best[first + period * repeats])
            if found is None or _size(candidate) < _size(found):
                found = candidate
    assert found is not None, "all of them once are one"
    return found


def _size(grouping: _Grouping) -> int:
    return sum(period for period, _ in grouping) + len(grouping)


def _num_repeats(kinds: Sequence[int], start: int, period: int) -> int:
    """How often the pattern of that length at `start` comes one after another."""
    end = start + period
    while end < len(kinds) and kinds[end] == kinds[end - period]:
        end += 1
    return (end - start) // period
