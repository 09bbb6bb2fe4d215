"""Folders of models that see images too: the text model in them is taken, the rest is left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from absl import logging

from gptjax.interop.reader import ConfigReader
from gptjax.interop.source import Readable
from gptjax.interop.table import Family


@dataclass(frozen=True)
class Multimodal:
    """Where such a folder has the text model of a family.

    Attributes:
      name: `model_type` of its `config.json`, whose `text_config` is a config of the family.
      other_keys: of its config, which only bear on other parts.
      prefixes: what the text model's tensors are called by, and what the family has in its place.
      left_out: prefixes of the tensors of other parts.
    """

    name: str
    family: Family
    other_keys: tuple[str, ...]
    prefixes: Mapping[str, str]
    left_out: tuple[str, ...]

    def text_config(self, values: Mapping[str, Any], *, path: str) -> dict[str, Any]:
        """The config of the text model.

        Raises:
          ValueError: naming the key that is missing, mistyped or unknown.
        """
        reader = ConfigReader(values, path=path)
        text = reader.take("text_config", dict)
        ConfigReader(text, path=f"{path}: text_config").require(
            "model_type", self.family.name, default=self.family.name
        )
        # transformers ties the head as the whole model's config says, whatever that of the text model does.
        tied = reader.take("tie_word_embeddings", bool, True)
        reader.ignore(self.other_keys)
        reader.finish()
        return text | {"tie_word_embeddings": tied}

    def text_tensors(self, found: Mapping[str, Readable], *, path: str) -> dict[str, Readable]:
        """The tensors of the text model by the family's names, with those that belong to no known part.

        Raises:
          ValueError: if a tensor is there under two names.
        """
        tensors: dict[str, Readable] = {}
        others = [name for name in found if name.startswith(self.left_out)]
        for name in sorted(found.keys() - set(others)):
            theirs = next((prefix for prefix in self.prefixes if name.startswith(prefix)), "")
            own = self.prefixes.get(theirs, "") + name.removeprefix(theirs)
            if own in tensors:
                raise ValueError(f"{path}: {name}: is there under another name too; expected one {own}")
            tensors[own] = found[name]
        parts = sorted({prefix for prefix in self.left_out if any(name.startswith(prefix) for name in others)})
        logging.info("%s: left out: %d tensors of %s, which see images", path, len(others), ", ".join(parts))
        return tensors
