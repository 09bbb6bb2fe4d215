"""A dataclass is the schema: what is refused, by which name, and that a config reads back equal."""

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import ml_collections
import pytest

from gptjax import config
from gptjax.compress.distill import DistillRun
from gptjax.nn.config import ModelConfig
from gptjax.parallel import mesh
from gptjax.train.setup import RunConfig


@dataclass(frozen=True, kw_only=True)
class Square:
    kind: Literal["square"] = "square"
    side: float


@dataclass(frozen=True, kw_only=True)
class Circle:
    kind: Literal["circle"] = "circle"
    radius: float

    def __post_init__(self) -> None:
        if self.radius <= 0:
            raise ValueError(f"radius={self.radius}: expected above 0")


@dataclass(frozen=True, kw_only=True)
class Painter:
    name: str
    born: int
    died: int | None = None


@dataclass(frozen=True, kw_only=True)
class Workshop:
    name: str
    members: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Picture:
    name: str
    width: int
    visible: bool = True
    shade: Literal["light", "dark"] = "light"
    weights: dict[str, float] = field(default_factory=dict)
    shapes: tuple[Square | Circle, ...] = ()
    corner: tuple[int, int] | None = None
    scale: float | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    origin: Painter | Workshop | None = None


FULL = dict(
    name="a", width=3, visible=False, shade="dark", weights={"x/y.z": 1.0, "w": 2}, corner=[1, 2], scale=2,
    shapes=[{"kind": "circle", "radius": 1}, {"kind": "square", "side": 2.5}], notes={"free": [1, "two"]},
    origin={"name": "b", "members": ["c"]},
)  # fmt: skip


def read(**changes):
    return config.from_dict(Picture, FULL | changes)


def test_values_get_the_types_of_the_schema():
    picture = read()
    assert picture.shapes == (Circle(radius=1.0), Square(side=2.5))
    assert picture.corner == (1, 2) and picture.origin == Workshop(name="b", members=("c",))
    assert (picture.weights, picture.scale) == ({"x/y.z": 1.0, "w": 2.0}, 2.0)
    assert all(isinstance(value, float) for value in (picture.scale, *picture.weights.values()))
    assert config.from_dict(Picture, {"name": "a", "width": 3}) == Picture(name="a", width=3)


def test_a_config_reads_back_equal_from_json_and_from_a_config_dict():
    picture = read()
    values = config.to_dict(picture)
    assert config.from_dict(Picture, json.loads(json.dumps(values))) == picture
    assert config.from_dict(Picture, ml_collections.ConfigDict(values, allow_dotted_keys=True)) == picture
    assert config.from_dict(Picture, values | {"shapes": picture.shapes}) == picture, "parts may be dataclasses already"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widht": 3}, r"config\.widht: unknown key; did you mean `width`\? Known keys: corner, name, notes"),
        ({"width": True}, r"config\.width: expected int, got True \(bool\)"),
        ({"width": 3.0}, r"config\.width: expected int, got 3\.0 \(float\)"),
        ({"visible": 1}, r"config\.visible: expected bool, got 1"),
        ({"name": None}, r"config\.name: expected str, got None"),
        ({"shade": "drak"}, r"config\.shade: expected one of 'light', 'dark', got 'drak'; did you mean 'dark'"),
        ({"weights": {"x": "much"}}, r"config\.weights\.x: expected float, got 'much'"),
        ({"weights": [1.0]}, r"config\.weights: expected a mapping, got \[1\.0\]"),
        ({"corner": [1]}, r"config\.corner: expected 2 values, got \[1\]"),
        ({"corner": 1}, r"config\.corner: expected a list, got 1"),
        ({"scale": "big"}, r"config\.scale: expected float, got 'big'"),
        ({"shapes": [{"kind": "oval"}]}, r"config\.shapes\[0\]\.kind: expected one of square, circle, got 'oval'"),
        ({"shapes": [{"side": 1.0}]}, r"config\.shapes\[0\]\.kind: expected one of square, circle, got None"),
        (
            {"origin": {"name": "b", "born": 3, "members": []}},
            r"config\.origin\.members: unknown key.*born, died",
        ),
        ({"origin": {"members": [], "born": 3}}, r"config\.origin\.members: unknown key"),
        ({"origin": {"name": "b", "borne": 3}}, r"config\.origin\.borne: unknown key; did you mean `born`"),
        ({"shapes": [{"kind": "square"}]}, r"config\.shapes\[0\]: missing keys: side \(of Square\)"),
        ({"shapes": [{"kind": "circle", "radius": 0}]}, r"config\.shapes\[0\]: radius=0\.0: expected above 0"),
    ],
)
def test_what_is_wrong_is_named_by_its_path(changes, message):
    with pytest.raises(ValueError, match=message):
        read(**changes)


def test_missing_keys_and_no_mapping_are_named():
    with pytest.raises(ValueError, match=r"config: missing keys: name, width \(of Picture\)"):
        config.from_dict(Picture, {})
    with pytest.raises(ValueError, match=r"model: expected a mapping of Picture keys, got \[\]"):
        config.from_dict(Picture, [], path="model")


def test_leaves_have_dotted_names_and_empty_ones_are_kept():
    leaves = dict(config.flatten({"a": {"b": 1, "c": {}}, "d": [1, 2]}))
    assert leaves == {"a.b": 1, "a.c": {}, "d": [1, 2]}


def test_differences_are_one_line_a_leaf():
    old, new = {"a": {"b": 1, "c": 2}, "same": [1]}, {"a": {"b": 3}, "same": [1], "d": None}
    assert config.diff(old, new) == ["a.b: 1 -> 3", "a.c: 2 -> '(absent)'", "d: '(absent)' -> None"]
    assert config.diff(read(), read()) == []
    assert config.diff(read(), read(width=4)) == ["width: 3 -> 4"]


def test_every_key_is_read_somewhere():
    """A key that nothing reads would be set in vain."""
    package = Path(config.__file__).parent
    nodes = [node for path in package.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    read |= set(mesh.AXES)  # read by name
    pending, seen = [RunConfig, ModelConfig, DistillRun], set()
    while pending:
        cls = pending.pop()
        seen.add(cls)
        for name, hint in get_type_hints(cls).items():
            assert name in read, f"{cls.__name__}.{name}"
            pending += [part for part in parts_of(hint) if is_dataclass(part) and part not in seen]
    assert {"DistillConfig", "OptimConfig", "MoEConfig", "MLAConfig", "RopeScaling", "DataConfig", "MeshConfig"} <= {
        c.__name__ for c in seen
    }


def parts_of(hint):
    yield hint
    for argument in get_args(hint):
        yield from parts_of(argument)
