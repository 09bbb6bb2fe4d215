"""Config files: the flag `--config` of entry points that train, and reading one without it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

# How a model is trained, not what it is.
_OF_INIT = ("seq_len", "dtype", "remat", "quant")


def define(**sections: Callable[[], ConfigDict]) -> Callable[[], ConfigDict]:
    """Defines `--config`, a config file whose keys are then set by `--config.section.key=value`, and `--init`.

    Args:
      sections: by name, those that a file without them gets.

    Returns:
      What gives the config that the command line says.
    """
    holder = config_flags.DEFINE_config_file(
        "config",
        None,
        "Config file; --config.section.key=value sets a key, also one that the file leaves at its default.",
        accept_new_attributes=True,
        lock_config=False,
    )
    flags.FLAGS["config"].parser = _Open(flags.FLAGS["config"].parser, sections)
    init = flags.DEFINE_string(
        "init",
        None,
        "Checkpoint or workdir (its newest) that training starts from: its parameters, and its architecture instead of "
        f"config.model, of which only {', '.join(_OF_INIT)} count then. --config.train.init_from takes the parameters "
        "alone.",
    )

    def config() -> ConfigDict:
        values = holder.value
        if init.value is not None:
            _start_from(init.value, values)
        return values

    return config


def _start_from(checkpoint: str, values: ConfigDict) -> None:
    given = [name.removeprefix("config.model.") for name in flags.FLAGS if _is_given(name, "config.model.")]
    if unread := [name for name in given if name.partition(".")[0] not in _OF_INIT]:
        raise ValueError(
            f"--config.model.{unread[0]} has no effect: the model is that of --init={checkpoint}; leave it out, or "
            f"give --config.train.init_from={checkpoint} instead, which takes the parameters alone"
        )
    if _is_given("config.train.init_from"):
        raise ValueError("--init and --config.train.init_from both say what training starts from; give one of them")
    own = {name: values.model[name] for name in _OF_INIT if values.model.get(name) is not None}
    values.model = ConfigDict({"checkpoint": checkpoint} | own)
    values.train.init_from = checkpoint


def _is_given(name: str, prefix: str = "") -> bool:
    return name.startswith(prefix) and name in flags.FLAGS and bool(flags.FLAGS[name].present)


def read(path: str, *arguments: str) -> ConfigDict:
    """What `get_config` of a config file returns for these arguments.

    Raises:
      ValueError: if there is none, or no such file of Python.
    """
    spec = importlib.util.spec_from_file_location("config_file", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path}: expected a file of Python")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: there is no such config file") from error
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path}: expected a function get_config in it")
    return module.get_config(*arguments)


class _Open(flags.ArgumentParser):
    """Undoes the lock of config files: `RunConfig` knows better which keys there are, and which is nearest."""

    def __init__(self, parser: flags.ArgumentParser, sections: Mapping[str, Callable[[], ConfigDict]]) -> None:
        self._parser = parser
        self._sections = sections

    def parse(self, argument: str) -> Any:
        config = self._parser.parse(argument)
        if not isinstance(config, ConfigDict):
            return config
        config.unlock()
        for name, section_fn in self._sections.items():
            if name not in config:
                config[name] = section_fn()
        return config
