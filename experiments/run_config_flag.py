"""Config files: the flag `--config` of entry points that train, and reading one without it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags


def define(**sections: Callable[[], ConfigDict]) -> flags.FlagHolder:
    """Defines `--config`, a config file whose keys are then set by `--config.section.key=value`.

    Args:
      sections: by name, those that a file without them gets.
    """
    holder = config_flags.DEFINE_config_file(
        "config",
        None,
        "Config file; --config.section.key=value sets a key, also one that the file leaves at its default.",
        accept_new_attributes=True,
        lock_config=False,
    )
    flags.FLAGS["config"].parser = _Open(flags.FLAGS["config"].parser, sections)
    return holder


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
