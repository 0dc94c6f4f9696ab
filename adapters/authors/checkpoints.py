"""Read authors' original checkpoints, weights in any usual file format and config.json, and build models of them.

Tensors are mapped into memory, not read: a checkpoint takes no memory before ``from_pretrained`` copies it, weight by
weight, to its device in its precision. So every setting of ``Loading`` works for these families too, and nothing is
written to disk.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stethoscope.adapters import memory
from stethoscope.adapters.load_settings import Loading
from stethoscope.adapters.loading import LoadReport, is_folder, pretrained, surplus_layer, translate_loading_errors
from stethoscope.core.errors import ConfigError, DataError, StethoscopeError, first_line, unknown
from stethoscope.core.system import describe_error, out_of_memory

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
_STATE_KEYS = ("model", "state_dict", "module")  # under which training scripts save a state dict
_HUB_SOURCE = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[^:]+))?(:(?P<file>.+))?")

LLAMA_7B = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""Sizes of Llama-2 7B, and of the Vicuna that was fine-tuned from it."""

FindFile = Callable[[str], Path | None]  # path of a file by its name; None if it does not exist


@dataclass(frozen=True)
class Weight:
    """Hold one tensor of a checkpoint.

    Attributes:
        tensor: mapped into memory where the file's format allows it.
        file: file that holds it.
        key: its name in the file.
    """

    tensor: Tensor
    file: Path
    key: str


Weights = dict[str, Weight]


# --- weights --------------------------------------------------------------------------------------------------------


def read_weights(source: str, loading: Loading, prefixes: Sequence[str] = (), setting: str = "checkpoint") -> Weights:
    """Read the tensors of a checkpoint by their names in its files.

    Args:
        source: a file (.safetensors, .bin, .pth, .pt), a folder, or a hub id (``owner/name``, ``owner/name@revision``,
            ``owner/name:file``, ``owner/name@revision:file``). In a folder or on the hub the index of a sharded
            checkpoint comes first, then ``model.safetensors`` and ``pytorch_model.bin``; in a folder, then all files
            of one kind. Tensors may be nested under ``model``, ``state_dict`` or ``module``.
        loading: ``revision`` (where the source names none) and ``local_files_only`` are used.
        prefixes: of the names that are needed; shards without any are not opened or downloaded.
        setting: name of the setting that holds the source, for messages.

    Raises:
        ConfigError: there is no such file, folder or hub model.
        DataError: a file is damaged, holds anything but tensors and plain values, or none of the names.
    """
    weights: Weights = {}
    paths = _find_files(source, loading, prefixes, setting)
    for path in paths:
        for key, tensor in _load_tensors(path):
            if not prefixes or key.startswith(tuple(prefixes)):
                weights[key] = Weight(tensor, path, key)
    if not weights:
        names = f" whose names start with {' or '.join(prefixes)}" if prefixes else ""
        raise DataError(f"{setting} {source}: no tensors{names} in {', '.join(path.name for path in paths)}")
    return weights


def rename_weights(weights: Weights, rule: Callable[[str], str | None]) -> Weights:
    """Rename tensors by a rule; those for which it returns None are left out."""
    names = {key: rule(key) for key in weights}
    return {name: weights[key] for key, name in names.items() if name is not None}


def build_model(
    cls: type[PreTrainedModel], config: PreTrainedConfig, weights: Weights, loading: Loading, name: str
) -> tuple[PreTrainedModel, LoadReport]:
    """Build a model with these weights, on the devices and in the precision of ``loading``.

    Warns of tensors in the files that the model does not use.

    Args:
        cls: a model class of transformers, or one derived from it.
        config: of the model.
        weights: by the names of the model's own ``state_dict``.
        loading: settings.
        name: name of the model in messages.

    Raises:
        ConfigError: there is no model of these sizes.
        DataError: a weight is missing or has another shape.
        CapabilityError: see ``Loading.check_machine``.
    """
    with torch.device("meta"), translate_size_errors(name):
        expected = cls(config).state_dict()
    unexpected = tuple(key for key in weights if key not in expected)
    for key, weight in weights.items():
        if key in expected and weight.tensor.shape != expected[key].shape:
            raise DataError(
                f"{weight.file}: {weight.key} has the shape {tuple(weight.tensor.shape)}, {name} as configured wants "
                f"{tuple(expected[key].shape)} for {key}"
            )
    missing = [key for key in expected if key not in weights]
    if missing:
        stray = weights[unexpected[0]] if unexpected else None
        hint = f"; {stray.file} holds {stray.key}, which belongs nowhere" if stray else ""
        raise DataError(f"{name} lacks {len(missing)} of {len(expected)} weights, the first is {missing[0]}{hint}")
    if (surplus := surplus_layer(unexpected, expected)) is not None:
        raise DataError(
            f"{weights[surplus].file} holds {weights[surplus].key}, a layer behind the last of {name} as configured; "
            "set the number of layers to that of the file"
        )
    state = {key: weight.tensor for key, weight in weights.items() if key in expected}
    dtype = {"dtype": _most_common_dtype(state.values())} if loading.dtype == "auto" else {}
    model = pretrained(cls, None, loading, name=name, config=config, state_dict=state, **dtype)
    if unexpected:
        warnings.warn(
            f"{name}: {len(unexpected)} tensors in the files are not used, such as {unexpected[0]}", stacklevel=2
        )
    return model, LoadReport(len(state), unexpected, tuple(dict.fromkeys(weight.file for weight in weights.values())))


def build_skeleton(
    cls: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype, name: str
) -> PreTrainedModel:
    """Build a model on the meta device, to count its parameters; raise ConfigError where none has these sizes."""
    with memory.on_meta_device(), translate_size_errors(name):
        return cls._from_config(config, dtype=dtype)


@contextmanager
def translate_size_errors(name: str) -> Iterator[None]:
    """Turn whatever layers raise for sizes that they cannot have into a ConfigError about the model of that name."""
    try:
        yield
    except StethoscopeError:
        raise
    except Exception as error:  # a division by no heads, a negative width, a text in place of a number
        raise ConfigError(f"{name} cannot be built with its sizes: {describe_error(error)}") from error


def _most_common_dtype(tensors: Collection[Tensor]) -> torch.dtype:
    """Return the floating-point dtype of most values."""
    counts: dict[torch.dtype, int] = {}
    for tensor in tensors:
        if tensor.is_floating_point():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return max(counts, key=counts.__getitem__)


# --- files of weights -----------------------------------------------------------------------------------------------


def _find_files(source: str, loading: Loading, prefixes: Sequence[str], setting: str) -> list[Path]:
    """Find the files of a source that can hold names with one of the prefixes."""
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        paths = _choose_files(lambda name: path / name if (path / name).is_file() else None, prefixes)
        for suffix in () if paths else _SUFFIXES:
            paths = paths or sorted(file for file in path.glob(f"*{suffix}") if file.name[0] != ".")  # ._ of macOS
        if not paths:
            raise ConfigError(f"{setting}={path}: the folder holds no {', '.join(_SUFFIXES)} file")
        return paths
    match = _HUB_SOURCE.fullmatch(source)
    if match is None or source.startswith((".", "~", "/")) or (source.endswith(_SUFFIXES) and match["file"] is None):
        raise ConfigError(f"{setting}={source}: no such file or folder; a hub id has the form owner/name")
    paths = _find_hub_files(match, loading, prefixes)
    if not paths:
        raise ConfigError(
            f"{setting}={source}: neither a folder here nor a hub model with "
            f"{match['file'] or ', '.join((*_INDEXES, *_SINGLE_FILES))}"
            f"{' among the files on this machine' if loading.location(False)['local_files_only'] else ''}"
        )
    return paths


def _find_hub_files(source: re.Match[str], loading: Loading, prefixes: Sequence[str]) -> list[Path]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    location = loading.location(False) | ({"revision": source["revision"]} if source["revision"] else {})

    def download(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(source["id"], name, **location))
        except (EntryNotFoundError, LocalEntryNotFoundError):
            return None

    with translate_loading_errors(source["id"]):
        if source["file"]:
            path = download(source["file"])
            return [path] if path else []
        return _choose_files(download, prefixes)


def _choose_files(find: FindFile, prefixes: Sequence[str]) -> list[Path]:
    """Choose the shards that an index lists for the prefixes, or the single file; empty if there is neither."""
    for name in _INDEXES:
        if (index := find(name)) is not None:
            return _find_shards(index, find, prefixes)
    return next(([path] for name in _SINGLE_FILES if (path := find(name)) is not None), [])


def _find_shards(index: Path, find: FindFile, prefixes: Sequence[str]) -> list[Path]:
    try:
        weight_map: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = {str(file) for key, file in weight_map.items() if not prefixes or key.startswith(tuple(prefixes))}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise DataError(f"{index} is no index of a sharded checkpoint: {describe_error(error)}") from error
    paths = []
    for name in sorted(shards):
        if (path := find(name)) is None:
            raise DataError(f"{index} names {name}, which is not there")
        paths.append(path)
    return paths


def _load_tensors(path: Path) -> Iterable[tuple[str, Tensor]]:
    """Load names and tensors of one file."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                return [(key, file.get_tensor(key)) for key in file.keys()]  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path} is no whole safetensors file: {first_line(error)}") from error
    content = _load_pickle(path)
    outer = content if isinstance(content, dict) else {}
    state = next((outer[key] for key in _STATE_KEYS if isinstance(outer.get(key), dict)), outer)
    if not any(torch.is_tensor(value) for value in state.values()):
        keys = f"; its keys are {', '.join(map(str, list(content)[:5]))}" if isinstance(content, dict) else ""
        raise DataError(f"{path} holds no tensors by name{keys}")
    return [(str(key), value) for key, value in state.items() if torch.is_tensor(value)]


def _load_pickle(path: Path) -> Any:
    """Load a file of ``torch.save`` without running any code in it."""
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:  # files from before torch 1.6 cannot be mapped
            if "mmap" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(f"{path} is refused: it holds more than tensors and plain values, or is damaged") from error
    except Exception as error:  # broken bytes lead its reader to errors of any kind
        if out_of_memory(error):
            raise
        raise DataError(f"{path} is no whole checkpoint of torch: {describe_error(error)}") from error


# --- other files ----------------------------------------------------------------------------------------------------


def find_file(source: str, name: str, loading: Loading) -> Path | None:
    """Find a file of a folder or download it from a hub model; None where there is no such file.

    Raises:
        ConfigError: there is no such folder or hub model.
    """
    if is_folder(source):
        path = Path(source).expanduser() / name
        return path if path.is_file() else None
    from transformers.utils import cached_file

    with translate_loading_errors(source):
        file = cached_file(source, name, **loading.location(False), _raise_exceptions_for_missing_entries=False)
    return None if file is None else Path(file)


def read_config(source: str, loading: Loading, name: str = "config.json") -> dict[str, Any]:
    """Read a JSON file of settings; return an empty dict where a folder has no such file.

    Raises:
        ConfigError: there is no such folder or hub model.
        DataError: the file holds no JSON object.
    """
    path = find_file(source, name, loading)
    if path is None:
        if name == "config.json" and not is_folder(source):  # every hub model has one
            here = "among the files on this machine" if loading.location(False)["local_files_only"] else "on the hub"
            raise ConfigError(f"model {source} was not found as a folder or {here}")
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DataError(f"{path} is no JSON file: {error}") from error
    if not isinstance(settings, dict):
        raise DataError(f"{path} holds a {type(settings).__name__}; it should hold an object of settings")
    return settings


def merge_config(
    cls: type[PreTrainedConfig], setting: str, *sources: Mapping[str, Any] | None, overrides: Mapping[str, Any] | None
) -> Any:
    """Build a configuration of transformers from several sources, of which later ones win.

    Args:
        cls: class of the configuration; names that it does not know are dropped from the sources.
        setting: name of the setting that holds ``overrides``, for messages.
        sources: published sizes, then those of the files.
        overrides: sizes that the user set.

    Raises:
        ConfigError: the user set an unknown size, the sizes do not fit together, or a source is no mapping.
    """
    from transformers import PreTrainedConfig

    for source in (*sources, overrides):
        if source is not None and not isinstance(source, Mapping):
            raise ConfigError(
                f"model.{setting}: {source!r:.80} should be sizes by their names, as {{hidden_size: 4096}}"
            )
    known = {field.name for field in fields(cls)} - {field.name for field in fields(PreTrainedConfig)}
    known = {name for name in known if not name.startswith("_")}
    known |= {"rope_theta", "rope_scaling"} if "rope_parameters" in known else set()  # their names in older files
    for name in overrides or {}:
        if name not in known:
            raise ConfigError(unknown(f"size in model.{setting}", name, known))
    values = {
        name: value
        for source in (*sources, overrides)
        for name, value in (source or {}).items()
        if name in known and value is not None
    }
    try:
        return cls(**values)
    except Exception as error:  # transformers' checks raise errors of their own, with the reason in the last line
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[-1] if lines else type(error).__name__
        raise ConfigError(f"model.{setting}: the sizes do not fit together: {reason}") from error


def weight_dtype(config: Mapping[str, Any], loading: Loading) -> torch.dtype:
    """Return the dtype of the loaded weights; for ``auto`` that of ``config.json``, else float16."""
    name = loading.dtype if loading.dtype != "auto" else config.get("torch_dtype") or config.get("dtype")
    dtype = getattr(torch, str(name), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float16
