from pathlib import Path

import pytest

from tools import lint_budget


def problems(path: str, text: str) -> list[str]:
    return list(lint_budget.check_file(Path(path), text))


@pytest.mark.parametrize(
    "path, text, expected",
    [
        ("gptjax/nn/block.py", "x = 1\n" * 401, "401 lines"),
        ("gptjax/nn/block.py", "def f() -> None:\n" + "    x = 1\n" * 60, "f has 61 lines"),
        ("gptjax/utils.py", "", "name the idea"),
        ("gptjax/nn/block.py", "x = 1  # TO" + "DO later\n", "finish it"),
        ("gptjax/nn/block.py", "from jax.sharding import PartitionSpec as P\n", "only gptjax/parallel"),
        ("gptjax/train/run.py", "import jax\nx = jax.sharding.PartitionSpec()\n", "only gptjax/parallel"),
        ("gptjax/api/trainer.py", "import optax\nx = optax.apply_updates\n", "only gptjax/train steps an optimizer"),
        ("gptjax/nn/block.py", "def f(x, *, y: int): pass\n", "f: no type for x, the result"),
        ("gptjax/nn/block.py", "class A:\n    def g(self): pass\n", "g: no type for the result"),
        ("gptjax/train/run.py", "from ml_collections import ConfigDict\n", "frozen dataclass"),
    ],
)
def test_names_each_violation(path, text, expected):
    found = problems(path, text)
    assert len(found) == 1 and expected in found[0] and found[0].startswith(f"{path}:")


@pytest.mark.parametrize(
    "path, text",
    [
        ("gptjax/parallel/rules.py", "from jax.sharding import PartitionSpec\n"),
        ("gptjax/train/step.py", "import optax\nx = optax.apply_updates\n"),
        ("configs/base.py", "from ml_collections import ConfigDict\n"),
        ("gptjax/nn/block.py", "def f() -> None:\n" + "    x = 1\n" * 59),
        ("gptjax/nn/block.py", "def _f(x):\n    def g(y): pass\n"),
        ("gptjax/nn/block.py", '"""A ConfigDict or PartitionSpec in prose is fine."""\n'),
    ],
)
def test_lets_the_rest_pass(path, text):
    assert not problems(path, text)
