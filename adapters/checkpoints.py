"""Authors' checkpoints as they are: files in any of the usual forms, renamed and put into a model of transformers.

Tensors are mapped into memory, not read: a checkpoint takes no memory before ``from_pretrained`` copies it, weight by
weight, to the device and the precision where it belongs. So all of ``Loading`` holds for these families too, and
nothing is written to disk.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stethoscope.adapters import loading as files
from stethoscope.adapters.loading import Loading
from stethoscope.core.digests import remembered
from stethoscope.core.errors import ConfigError, DataError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
_INSIDE = ("model", "state_dict", "module")
_HUB = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[^:]+))?(:(?P<file>.+))?")


@dataclass(frozen=True)
class Weight:
    """One tensor of a checkpoint.

    Attributes:
        tensor: mapped into memory where the file's format allows it.
        file: where it is.
        key: its name there.
    """

    tensor: Tensor
    file: Path
    key: str


Weights = dict[str, Weight]


@dataclass(frozen=True)
class Report:
    """How a checkpoint and a model fit together.

    Attributes:
        loaded: number of tensors that went into the model.
        unexpected: names that are in the files and not in the model, in order.
        files: the files that were read, in order.
    """

    loaded: int
    unexpected: tuple[str, ...]
    files: tuple[Path, ...]


def read(source: str, loading: Loading, only: Sequence[str] = (), what: str = "checkpoint") -> Weights:
    """The tensors of a checkpoint by their names in it.

    Args:
        source: a file (.safetensors, .bin, .pth, .pt), a folder, or a hub id (``owner/name``, ``owner/name@revision``,
            ``owner/name:file``, ``owner/name@revision:file``). In a folder or on the hub the index of a sharded
            checkpoint comes first, then ``model.safetensors`` and ``pytorch_model.bin``; of a folder, then all files
            of one kind. Tensors may lie below ``model``, ``state_dict`` or ``module``.
        loading: ``revision`` (where the source names none) and ``local_files_only`` are read.
        only: prefixes of the names that are needed; shards without any are not opened or downloaded.
        what: the setting that names the source, for messages.

    Raises:
        ConfigError: there is no such file, folder or hub model.
        DataError: a file is damaged, holds anything but tensors and plain values, or none of the names.
    """
    weights: Weights = {}
    paths = _locate(source, loading, only, what)
    for path in paths:
        for key, tensor in _tensors(path):
            if not only or key.startswith(tuple(only)):
                weights[key] = Weight(tensor, path, key)
    if not weights:
        wanted = f" whose names start with {' or '.join(only)}" if only else ""
        raise DataError(f"{what} {source}: no tensors{wanted} in {', '.join(path.name for path in paths)}")
    return weights


def renamed(weights: Weights, rule: Callable[[str], str | None]) -> Weights:
    """The same tensors under the names that a rule gives; those for which it gives None are left out."""
    names = {key: rule(key) for key in weights}
    return {name: weights[key] for key, name in names.items() if name is not None}


def build(
    cls: type[PreTrainedModel], config: PreTrainedConfig, weights: Weights, loading: Loading, what: str
) -> tuple[PreTrainedModel, Report]:
    """A model with these weights, placed and quantised as ``loading`` says.

    Args:
        cls: a model class of transformers, or one derived from it.
        weights: by the names of the model's own ``state_dict``.
        what: how messages call the model.

    Raises:
        DataError: a weight is missing or has another shape.
        CapabilityError: see ``Loading.ready``.
    """
    with torch.device("meta"):
        wanted = cls(config).state_dict()
    unexpected = tuple(name for name in weights if name not in wanted)
    for name, weight in weights.items():
        if name in wanted and weight.tensor.shape != wanted[name].shape:
            raise DataError(
                f"{weight.file}: {weight.key} has the shape {tuple(weight.tensor.shape)}, {what} as configured wants "
                f"{tuple(wanted[name].shape)} for {name}"
            )
    missing = [name for name in wanted if name not in weights]
    if missing:
        stray = weights[unexpected[0]] if unexpected else None
        hint = f"; {stray.file} holds {stray.key}, which belongs nowhere" if stray else ""
        raise DataError(f"{what} lacks {len(missing)} of {len(wanted)} weights, the first is {missing[0]}{hint}")
    if (surplus := files.surplus_layer(unexpected, wanted)) is not None:
        raise DataError(
            f"{weights[surplus].file} holds {weights[surplus].key}, a layer behind the last of {what} as configured; "
            "set the number of layers to that of the file"
        )
    fitting = {name: weight for name, weight in weights.items() if name in wanted}
    options: dict[str, Any] = {"config": config, "state_dict": {name: one.tensor for name, one in fitting.items()}}
    if loading.dtype == "auto":
        options["dtype"] = _prevailing(options["state_dict"].values())
    model = files.pretrained(cls, None, loading, name=what, **options)
    return model, Report(len(fitting), unexpected, tuple(dict.fromkeys(weight.file for weight in weights.values())))


def digest(paths: Iterable[Path]) -> str:
    """Digest of what is in files, whatever they are called."""
    whole = hashlib.sha256()
    for path in paths:
        whole.update(_sha256(path).encode())
    return f"sha256:{whole.hexdigest()}"


def _sha256(path: Path) -> str:
    """Of one file; the hub's cache calls its large files by it."""
    blob = path.resolve()
    if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):
        return blob.name
    return remembered([path], lambda: _read_through(path))


def _read_through(path: Path) -> str:
    one = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            one.update(block)
    return one.hexdigest()


def _prevailing(tensors: Collection[Tensor]) -> torch.dtype:
    """The floating dtype of most values."""
    counts: dict[torch.dtype, int] = {}
    for tensor in tensors:
        if tensor.is_floating_point():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return max(counts, key=counts.__getitem__)


def _locate(source: str, loading: Loading, only: Sequence[str], what: str) -> list[Path]:
    """The files of a source that can hold names with one of the prefixes."""
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return _chosen(lambda name: path / name if (path / name).is_file() else None, only) or _all(path, what)
    match = _HUB.fullmatch(source)
    if match is None or source.startswith((".", "~", "/")) or (source.endswith(_SUFFIXES) and match["file"] is None):
        raise ConfigError(f"{what}={source}: no such file or folder; a hub id has the form owner/name")
    found = _of_hub(match, loading, only)
    if not found:
        raise ConfigError(
            f"{what}={source}: neither a folder here nor a hub model with "
            f"{match['file'] or ', '.join((*_INDEXES, *_SINGLE))}"
            f"{' among the files on this machine' if loading.where(False)['local_files_only'] else ''}"
        )
    return found


def _all(folder: Path, what: str) -> list[Path]:
    for suffix in _SUFFIXES:
        if found := sorted(path for path in folder.glob(f"*{suffix}") if path.name[0] != "."):  # ._ of macOS
            return found
    raise ConfigError(f"{what}={folder}: the folder holds no {', '.join(_SUFFIXES)} file")


def _of_hub(match: re.Match[str], loading: Loading, only: Sequence[str]) -> list[Path]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    where = loading.where(False)
    offline, revision = where["local_files_only"], match["revision"] or where["revision"]

    def get(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(match["id"], name, revision=revision, local_files_only=offline))
        except (EntryNotFoundError, LocalEntryNotFoundError):
            return None

    with files.one_line(match["id"]):
        if match["file"]:
            found = get(match["file"])
            return [found] if found else []
        return _chosen(get, only)


def _chosen(get: Callable[[str], Path | None], only: Sequence[str]) -> list[Path]:
    """The shards that an index names for the prefixes, or the single file."""
    for name in _INDEXES:
        if (index := get(name)) is not None:
            return _shards(index, get, only)
    return next(([found] for name in _SINGLE if (found := get(name)) is not None), [])


def _shards(index: Path, get: Callable[[str], Path | None], only: Sequence[str]) -> list[Path]:
    try:
        places: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
        names = sorted({file for key, file in places.items() if not only or key.startswith(tuple(only))})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{index} is no index of a sharded checkpoint: {type(error).__name__}: {error}") from error
    shards = {name: get(name) for name in names}
    if missing := [name for name, path in shards.items() if path is None]:
        raise DataError(f"{index} names {missing[0]}, which is not there")
    return list(shards.values())


def _tensors(path: Path) -> Iterable[tuple[str, Tensor]]:
    """Names and tensors of one file."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                return [(key, file.get_tensor(key)) for key in file.keys()]  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path} is no whole safetensors file: {first_line(error)}") from error
    held = _unpickled(path)
    inner = next((held[key] for key in _INSIDE if isinstance(held, dict) and isinstance(held.get(key), dict)), held)
    if not isinstance(inner, dict) or not any(torch.is_tensor(value) for value in inner.values()):
        keys = f"; its keys are {', '.join(map(str, list(held)[:5]))}" if isinstance(held, dict) else ""
        raise DataError(f"{path} holds no tensors by name{keys}")
    return [(str(key), value) for key, value in inner.items() if torch.is_tensor(value)]


def _unpickled(path: Path) -> Any:
    """What a file of ``torch.save`` holds, without running any code in it."""
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:  # files from before torch 1.6 cannot be mapped
            if "mmap" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(f"{path} is refused: it holds more than tensors and plain values, or is damaged") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} is no whole checkpoint of torch: {first_line(error)}") from error
