"""``stethoscope doctor model=...``: what a model needs against what is free, and what would make it fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from stethoscope.errors import CapabilityError, ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from stethoscope.adapter import Adapter
    from stethoscope.records import Memory

_SLACK = 1.1
"""Asked for on top: fragments, buffers, the context of the driver."""
_SMALLER = (
    {"dtype": "bfloat16"},
    {"quantize": "8bit"},
    {"quantize": "4bit"},
    {"quantize": "4bit", "dtype": "bfloat16"},
)


_FEWER = (8, 1)
"""Prompts that may generate together instead."""


class Room(NamedTuple):
    """Free bytes of a device."""

    device: str
    free: int


def main(words: Sequence[str]) -> None:
    """Prints the table and the verdict.

    Raises:
        ConfigError: a setting is wrong, or the model has no configuration to read.
        CapabilityError: the model cannot tell.
    """
    config = _compose(words)
    adapter, rooms = _adapter(config), free()
    try:
        need = adapter.memory(config.context, config.batch_size, config.new_tokens)
    except ConfigError as error:
        model_id = config.model.get("model_id")
        print(f"note  {adapter.name}: nothing to count. {error}")
        print(
            f"      The configuration of a model is all that is read. Fetch it once where there is a network "
            f"(`hf download {model_id} config.json`), or give the folder of the model as model.model_id."
        )
        return
    print(_table(adapter.name, need, config, rooms))
    print(verdict(need, rooms, _alternatives(config)))


def _compose(words: Sequence[str]) -> DictConfig:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from stethoscope.build import compose
    from stethoscope.commands.words import spell

    wrong = next((word for word in words if "=" not in word or word.startswith("-")), None)
    if wrong is not None:
        raise ConfigError(f"doctor takes settings as model=llava-1.5-7b, got {wrong!r}")
    words = list(filter(None, (spell(word, "doctor") for word in words)))
    try:
        config = compose(words, "doctor")
    except (HydraException, OmegaConfBaseException) as error:
        from stethoscope.commands.overrides import explain

        raise ConfigError(explain(error, "doctor", list(words))) from error
    for name in ("context", "batch_size", "new_tokens"):
        if not isinstance(config[name], int) or config[name] < 1:
            raise ConfigError(f"{name}={config[name]} should be a number of at least 1")
    return config


def _adapter(config: DictConfig, **settings: str) -> Adapter:
    from omegaconf import open_dict

    from stethoscope.adapter import Adapter
    from stethoscope.build import build

    node = config.model.copy()
    with open_dict(node):
        node.update(settings)
    return build(node, Adapter, "model", config.plugins)


def _alternatives(config: DictConfig) -> dict[str, Memory]:
    """What the model needs in less, by the settings to write for it: in smaller batches, or stored in less."""
    found = {}
    for size in _FEWER:
        if size < config.batch_size:
            found[f"batch_size={size}"] = _adapter(config).memory(config.context, size, config.new_tokens)
    for settings in _SMALLER:
        if all(config.model.get(name) != value for name, value in settings.items()):
            try:
                need = _adapter(config, **settings).memory(config.context, config.batch_size, config.new_tokens)
            except (ConfigError, CapabilityError):  # an adapter without this setting
                continue
            found[" ".join(f"model.{name}={value}" for name, value in settings.items())] = need
    return found


def free() -> list[Room]:
    """What is free now: every GPU, then the CPU's memory."""
    import psutil
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    rooms = [Room(f"cuda:{index}", torch.cuda.mem_get_info(index)[0]) for index in range(count)]
    return [*rooms, Room("cpu", psutil.virtual_memory().available)]


def verdict(need: Memory, rooms: Sequence[Room], smaller: Mapping[str, Memory]) -> str:
    """Where the model fits, or what would make it fit.

    >>> from stethoscope.records import Memory
    >>> need = Memory(7 * 10**9, "bfloat16", weights=14 * 2**30, cache=2**30, relevancy=5 * 2**30)
    >>> verdict(need, [Room("cuda:0", 24 * 2**30), Room("cpu", 60 * 2**30)], {})
    'fits on cuda:0'
    >>> verdict(need, [Room("cuda:0", 16 * 2**30), Room("cuda:1", 16 * 2**30), Room("cpu", 2**30)], {})
    'needs model.device_map=auto: spreads over cuda:0, cuda:1'
    """
    gpus, cpu = [room for room in rooms if room.device != "cpu"], rooms[-1]
    main = max(gpus or rooms, key=lambda room: room.free)
    if _fits(need, main.free):
        return f"fits on {main.device}"
    ways = [
        f"{words} (about {_size(other.total)}, fits on {main.device})"
        for words, other in smaller.items()
        if _fits(other, main.free)
    ]
    spread = sum(room.free for room in gpus)
    if len(gpus) > 1 and _fits(need, spread):
        ways.insert(0, f"model.device_map=auto: spreads over {', '.join(room.device for room in gpus)}")
    elif gpus and _fits(need, spread + cpu.free):
        ways.append("model.device_map=auto: what the GPU cannot hold lies in the CPU's memory, which is slow")
    if not ways:
        ways.append("model.device_map=auto model.offload_folder=<folder>: the rest lies on disk, which is very slow")
    return f"needs {'; or '.join(ways)}"


def _fits(need: Memory, room: int) -> bool:
    return need.total * _SLACK <= room


def _table(name: str, need: Memory, config: DictConfig, rooms: Sequence[Room]) -> str:
    stored = f"{need.dtype}, {config.model.quantize}" if config.model.get("quantize") else need.dtype
    rows = [
        (f"{name}, weights", f"{need.parameters:,} in {stored}", _size(need.weights)),
        ("generation", f"{config.batch_size} x {config.context} tokens, cache and logits", _size(need.cache)),
        ("relevancy pass", "one answer, about", _size(need.relevancy)),
        ("together", "weights and the larger of the two", _size(need.total)),
        *((f"free on {room.device}", "", _size(room.free)) for room in rooms),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows)


def _size(number: float) -> str:
    units = ["B", "KiB", "MiB", "GiB"]
    while number >= 1024 and len(units) > 1:
        number /= 1024
        units.pop(0)
    return f"{number:.1f} {units[0]}" if number < 100 and units[0] != "B" else f"{number:.0f} {units[0]}"
