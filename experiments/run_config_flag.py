"""The flag `--config` of entry points that train."""

from __future__ import annotations

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
