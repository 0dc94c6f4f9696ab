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
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stethoscope.adapters import loading as files
from stethoscope.adapters.authors.processor import CLIP_MEAN, CLIP_STD
from stethoscope.adapters.loading import Loading, is_folder, silenced, translate_loading_errors
from stethoscope.core.digests import cached_digest
from stethoscope.core.errors import CapabilityError, ConfigError, DataError, first_line, unknown

if TYPE_CHECKING:
    import torch
    from transformers import LlamaTokenizer, PreTrainedConfig, PreTrainedModel


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
    return cached_digest([path], lambda: _read_through(path))


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
            f"{' among the files on this machine' if loading.hub_kwargs(False)['local_files_only'] else ''}"
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

    hub_kwargs = loading.hub_kwargs(False)
    offline, revision = hub_kwargs["local_files_only"], match["revision"] or hub_kwargs["revision"]

    def get(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(match["id"], name, revision=revision, local_files_only=offline))
        except (EntryNotFoundError, LocalEntryNotFoundError):
            return None

    with files.translate_loading_errors(match["id"]):
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


Settings = Mapping[str, Any]

LLAMA_7B = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""Sizes of Llama-2 7B and of the Vicuna that was made of it."""


def find_file(source: str, name: str, loading: Loading) -> Path | None:
    """A file of a folder or of a hub model, downloaded; None where there is no such file.

    Raises:
        ConfigError: there is no such folder or hub model.
    """
    if is_folder(source):
        path = Path(source).expanduser() / name
        return path if path.is_file() else None
    from transformers.utils import cached_file

    hub_kwargs = loading.hub_kwargs(False)
    with translate_loading_errors(source):
        found = cached_file(
            source,
            name,
            revision=hub_kwargs["revision"],
            local_files_only=hub_kwargs["local_files_only"],
            _raise_exceptions_for_missing_entries=False,
        )
    return None if found is None else Path(found)


def read_config(source: str, loading: Loading, name: str = "config.json") -> dict[str, Any]:
    """The settings in a JSON file beside the weights; empty where a folder has no such file.

    Raises:
        ConfigError: there is no such folder or hub model.
        DataError: the file holds no JSON object.
    """
    path = find_file(source, name, loading)
    if path is None:
        if name == "config.json" and not is_folder(source):  # every hub model has one
            here = "among the files on this machine" if loading.hub_kwargs(False)["local_files_only"] else "on the hub"
            raise ConfigError(f"model {source} was not found as a folder or {here}")
        return {}
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DataError(f"{path} is no JSON file: {error}") from error
    if not isinstance(held, dict):
        raise DataError(f"{path} holds a {type(held).__name__}; it should hold an object of settings")
    return held


def sized(cls: type[PreTrainedConfig], what: str, *sources: Settings | None, chosen: Settings | None) -> Any:
    """A configuration of transformers from several sources; later ones win.

    Args:
        cls: the configuration's class; what it does not know is left out of the sources.
        what: the setting that holds ``chosen``, for messages.
        sources: published sizes, then those of the files.
        chosen: what the user set.

    Raises:
        ConfigError: the user set something that is not known, or the sizes do not fit together.
    """
    from transformers import PreTrainedConfig

    known = {field.name for field in fields(cls)} - {field.name for field in fields(PreTrainedConfig)}
    known = {name for name in known if not name.startswith("_")}
    known |= {"rope_theta", "rope_scaling"} if "rope_parameters" in known else set()  # as they were called before
    for name in chosen or {}:
        if name not in known:
            raise ConfigError(unknown(f"size in model.{what}", name, known))
    values = {
        name: value
        for source in (*sources, chosen)
        for name, value in (source or {}).items()
        if name in known and value is not None
    }
    try:
        return cls(**values)
    except Exception as error:  # transformers' checks have errors of their own
        raise ConfigError(f"model.{what}: the sizes do not fit together: {_last(error)}") from error


def dtype_of(held: Settings, loading: Loading) -> torch.dtype:
    """What the weights are computed in: that of ``config.json`` for ``auto``, half precision where it tells none."""
    import torch

    named = loading.dtype if loading.dtype != "auto" else held.get("torch_dtype") or held.get("dtype")
    found = getattr(torch, str(named), None)
    return found if isinstance(found, torch.dtype) else torch.float16


def mean_and_std(source: str, loading: Loading) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of red, green and blue by ``preprocessor_config.json``; CLIP's without it.

    Raises:
        ConfigError, DataError: as ``read_config``.
    """
    held = read_config(source, loading, "preprocessor_config.json")
    return tuple(held.get("image_mean") or CLIP_MEAN), tuple(held.get("image_std") or CLIP_STD)


def load_llama_tokenizer(source: str, loading: Loading) -> LlamaTokenizer:
    """Llama's tokenizer from ``tokenizer.json``, or from SentencePiece's ``tokenizer.model``.

    Without either transformers would make one of three words and say nothing.

    Raises:
        ConfigError: there is neither.
        CapabilityError: only ``tokenizer.model`` is there, and sentencepiece, which reads it, is not installed.
        DataError: the file is damaged.
    """
    from transformers import AutoTokenizer, LlamaTokenizer

    if find_file(source, "tokenizer.json", loading) is None:
        if find_file(source, "tokenizer.model", loading) is None:
            raise ConfigError(f"{source} holds no tokenizer; it should hold tokenizer.json or tokenizer.model")
        if find_spec("sentencepiece") is None:
            raise CapabilityError(
                f"{source}: sentencepiece, which reads its tokenizer.model, is not installed; "
                "pip install 'lvlm-stethoscope[sentencepiece]'"
            )
    named = read_config(source, loading, "tokenizer_config.json").get("tokenizer_class")
    cls = LlamaTokenizer if named in (None, "LlamaTokenizer", "LlamaTokenizerFast") else AutoTokenizer
    folder = is_folder(source)
    with translate_loading_errors(source), silenced(folder):
        return cls.from_pretrained(str(Path(source).expanduser()) if folder else source, **loading.hub_kwargs(folder))


def warn_of_strays(what: str, report: Report) -> None:
    """Warns of tensors in the files that the model has no place for."""
    if stray := report.unexpected:
        warnings.warn(f"{what}: {len(stray)} tensors in the files are not used, such as {stray[0]}", stacklevel=2)


def _last(error: Exception) -> str:
    """The line of an error that names the reason; checks of whole classes put it last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
