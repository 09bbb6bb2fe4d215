"""Reads another framework's config key by key, so that no key goes unread."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")

MAX_LAYERS = 1024
"""Of a config to be believed: layers are listed one by one."""
MAX_EXPERTS = 4096
"""Likewise of one layer."""
MAX_EXPERTS_TOGETHER = 1 << 17
"""Likewise of all layers, each expert being a tensor or several."""
_MAX_SIZE = 2**31 - 1

# What says nothing of the forward pass: bookkeeping, training, and how a library caches or parallelises.
_WITHOUT_MEANING = frozenset(
    """_name_or_path architectures model_type transformers_version torch_dtype dtype use_cache bos_token_id eos_token_id
    pad_token_id initializer_range attention_dropout hidden_dropout attn_pdrop embd_pdrop resid_pdrop dropout
    output_router_logits router_aux_loss_coef router_jitter_noise pretraining_tp task_specific_params
    keys_to_ignore_at_inference output_attentions output_hidden_states return_dict is_encoder_decoder
    chunk_size_feed_forward id2label label2id problem_type finetuning_task tf_legacy_loss unk_token_id sep_token_id
    auto_map n_ctx summary_activation summary_first_dropout summary_proj_to_labels
    summary_type summary_use_proj initial_context_length cache_implementation _attn_implementation_autoset _num_labels
    tokenizer_class is_llama_config transformers.js_config unsloth_fixed unsloth_version""".split()
)


class ConfigReader:
    """Takes keys out of a config; `finish` refuses those that are left.

    Attributes:
      path: of the file, for messages.
    """

    def __init__(self, values: Mapping[str, Any], *, path: str) -> None:
        self._values = dict(values)
        self._left = {name for name, value in self._values.items() if value is not None} - _WITHOUT_MEANING
        self.path = path

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def assume(self, defaults: Mapping[str, Any]) -> None:
        """What absent and null keys mean from here on."""
        self._values |= {name: value for name, value in defaults.items() if name not in self}

    def take(self, name: str, kind: type[T], default: T | None = None) -> T:
        """The value of a key; absent and null mean the default, without which the key is required.

        Raises:
          ValueError: if it is missing, of another type, or not finite.
        """
        self._left.discard(name)
        value = self._values.get(name)
        if value is None:
            if default is None:
                raise ValueError(f"{self.path}: {name}: missing; expected {kind.__name__}")
            return default
        if kind is float and type(value) in (int, float):
            if not abs(value) <= sys.float_info.max:  # JSON as Python reads it has NaN, and numbers of any length
                raise ValueError(f"{self.path}: {name}: got {value!r:.40}, expected a finite number")
            return float(value)  # type: ignore[return-value]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{self.path}: {name}: got {value!r}, expected {kind.__name__}")
        return value

    def size(self, name: str, default: int | None = None, *, most: int = _MAX_SIZE) -> int:
        """A number of things, at least one.

        Raises:
          ValueError: if it is missing, another type, or out of range.
        """
        value = self.take(name, int, default)
        if not 1 <= value <= most:
            raise ValueError(f"{self.path}: {name}: got {value}, expected 1 to {most}")
        return value

    def known_as(self, *names: str) -> str:
        """The name that the config has a key under, of those that it goes by, the usual one first.

        Raises:
          ValueError: if it is there twice with different values.
        """
        found = [name for name in names if name in self]
        for other in found[1:]:
            self.require(other, self._values[found[0]])
        return found[0] if found else names[0]

    def optional(self, name: str, kind: type[T], *, absent: T | None = None) -> T | None:
        """The value of a key, None where it is null, `absent` where it is absent."""
        self._left.discard(name)
        if name not in self._values:
            return absent
        return self.take(name, kind) if name in self else None

    def require(self, name: str, *allowed: Any, default: Any = None) -> Any:
        """The value of a key that this code knows only some values of.

        Raises:
          ValueError: if it is another.
        """
        self._left.discard(name)
        value = self._values.get(name)
        value = default if value is None else value
        if value not in allowed:
            raise ValueError(
                f"{self.path}: {name}: got {value!r}, expected {' or '.join(map(repr, allowed))}; others are not "
                "supported"
            )
        return value

    def section(self, name: str) -> ConfigReader | None:
        """A mapping inside the config, with its own unread keys."""
        values = self.optional(name, dict)
        return None if values is None else ConfigReader(values, path=f"{self.path}: {name}")

    def ignore(self, names: Iterable[str]) -> None:
        """Passes over keys that have no meaning for this family."""
        self._left.difference_update(names)

    def finish(self) -> None:
        """Raises:
        ValueError: naming the keys that nobody took.
        """
        if self._left:
            name = sorted(self._left)[0]
            others = (
                f" (and {len(self._left) - 1} more: {', '.join(sorted(self._left)[1:6])})"
                if len(self._left) > 1
                else ""
            )
            raise ValueError(
                f"{self.path}: {name}: {self._values[name]!r} is not known{others}; it may change what the model "
                "computes, so it is not passed over"
            )
