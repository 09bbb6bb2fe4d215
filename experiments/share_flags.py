"""Flags of sharing: what comes to use the same weights, and which kernels become two factors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from absl import flags

from experiments import calibration_flags

if TYPE_CHECKING:
    from gptjax.model import Model
    from gptjax.nn.sharing import SharingConfig

_PATTERN = flags.DEFINE_enum(
    "pattern", None, ["all", "cyclic", "adjacent", "sandwich"], "Which layers use the same weights."
)
_UNIQUE = flags.DEFINE_integer("unique", None, "Layers that keep weights of their own.", lower_bound=1)
_INIT = flags.DEFINE_enum(
    "init",
    None,
    ["first", "influential", "average"],
    "What shared weights begin as; with --calibration influential, which learns far better, else first, unless told.",
)
_KV_EVERY = flags.DEFINE_integer("kv_every", None, "Layers in a row that use the keys and values of the first.")
_KV_INIT = flags.DEFINE_enum("kv_init", "first", ["first", "average"], "Whose key and value kernels it begins with.")
_TIE = flags.DEFINE_enum("tie", None, ["input", "output", "average"], "The table that tokens and logits both use.")
_RANK = flags.DEFINE_float("rank", None, "Part of each kernel's parameters that its two factors have, as 0.5.")
_ENERGY = flags.DEFINE_float("energy", None, "Part of the outputs' square that the smallest factors keep, as 0.99.")
_SVD = flags.DEFINE_enum("svd", "activations", ["activations", "weights"], "What factors keep: outputs, or weights.")
_LEAVE = flags.DEFINE_string("leave", None, "Regular expression of the paths of kernels that stay whole.")


def _init() -> Any:
    return _INIT.value or ("influential" if calibration_flags.is_given() else "first")


def sharing() -> SharingConfig | None:
    """Of layers; None for none."""
    from gptjax.nn.sharing import SharingConfig

    if _PATTERN.value is None:
        return None
    return SharingConfig(pattern=_PATTERN.value, unique=_UNIQUE.value)  # type: ignore[arg-type]


def check() -> bool:
    """Whether calibration text is looked at.

    Raises:
      ValueError: for flags that nothing reads, or with nothing to do.
    """
    is_low_rank = _RANK.value is not None or _ENERGY.value is not None
    needs = {
        "--pattern": (_PATTERN, (_UNIQUE, _INIT)),
        "--kv_every": (_KV_EVERY, (_KV_INIT,)),
        "--rank or --energy": (_RANK if _ENERGY.value is None else _ENERGY, (_SVD, _LEAVE)),
    }
    for name, (flag, readers) in needs.items():
        unread = [f"--{reader.name}" for reader in readers if reader.present and flag.value is None]
        if unread:
            raise ValueError(f"{', '.join(unread)} without {name}: has no effect; give {name} too, or leave it out")
    if all(flag.value is None for flag, _ in needs.values()) and _TIE.value is None:
        raise ValueError("nothing to do: give --pattern, --kv_every, --tie, --rank or --energy")
    if _RANK.value is not None and _ENERGY.value is not None:
        raise ValueError("--rank and --energy both say how large factors are; give one")
    if _ENERGY.value is not None and _SVD.value == "weights":
        raise ValueError("--svd=weights does not read --energy, which is of outputs; give --rank")
    return (is_low_rank and _SVD.value == "activations") or (_PATTERN.value is not None and _init() == "influential")


def given() -> str:
    """The flags that say what is shared."""
    every = (_PATTERN, _UNIQUE, _INIT, _KV_EVERY, _KV_INIT, _TIE, _RANK, _ENERGY, _SVD, _LEAVE)
    return " ".join(f"--{flag.name}={flag.value}" for flag in every if flag.present)


def apply(model: Model, batches: list[Any]) -> tuple[Any, Any, dict[str, list[Any]], dict[str, Any]]:
    """The config, the parameters, the lines of each step's table, and what was asked for."""
    from gptjax.compress import low_rank, share

    cfg, params, tables, asked = model.config, model.params, dict[str, list[Any]](), dict[str, Any]()
    if _KV_EVERY.value is not None:
        cfg, params, lines = share.keys_and_values(cfg, params, _KV_EVERY.value, init=_KV_INIT.value)  # type: ignore[arg-type]
        tables["keys and values"], asked["kv_every"], asked["kv_init"] = list(lines), _KV_EVERY.value, _KV_INIT.value
    pattern = sharing()
    if pattern is not None:
        cfg, params, lines = share.layers(cfg, params, pattern, init=_init(), batches=batches)
        tables["layers"], asked["init"] = list(lines), _init()
        asked["sharing"] = {"pattern": pattern.pattern, "unique": pattern.num_unique(cfg.num_layers)}
    if _TIE.value is not None:
        cfg, params, lines = share.embeddings(cfg, params, _TIE.value)  # type: ignore[arg-type]
        tables["embeddings"], asked["tie"] = list(lines), _TIE.value
    if _RANK.value is not None or _ENERGY.value is not None:
        seen = batches if _SVD.value == "activations" else []
        if _RANK.value is not None:
            ranks = low_rank.ranks_of_size(cfg, _RANK.value, leave=_LEAVE.value)
        else:
            ranks = low_rank.ranks_of_energy(cfg, params, seen, _ENERGY.value or 0.0, leave=_LEAVE.value)
        cfg, params, lines, _ = low_rank.factorise(cfg, params, seen, ranks)
        tables["factors"], asked["svd"] = list(lines), _SVD.value
        asked["low_rank"] = [{"pattern": rule.pattern, "rank": rule.rank} for rule in cfg.low_rank]
    return cfg, params, tables, asked
