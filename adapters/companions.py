"""What lies beside an authors' weights: settings in JSON, a Llama tokenizer, colour statistics.

``AutoConfig`` is of no use here: the authors' ``model_type`` is unknown to transformers or belongs to another model.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.adapters.loading import Loading, is_folder, one_line, quiet
from stethoscope.adapters.pixels import CLIP_MEAN, CLIP_STD
from stethoscope.core.errors import CapabilityError, ConfigError, DataError, unknown

if TYPE_CHECKING:
    import torch
    from transformers import LlamaTokenizer, PreTrainedConfig

    from stethoscope.adapters.checkpoints import Report

Settings = Mapping[str, Any]

LLAMA_7B = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""Sizes of Llama-2 7B and of the Vicuna that was made of it."""


def find(source: str, name: str, loading: Loading) -> Path | None:
    """A file of a folder or of a hub model, downloaded; None where there is no such file.

    Raises:
        ConfigError: there is no such folder or hub model.
    """
    if is_folder(source):
        path = Path(source).expanduser() / name
        return path if path.is_file() else None
    from transformers.utils import cached_file

    where = loading.where(False)
    with one_line(source):
        found = cached_file(
            source,
            name,
            revision=where["revision"],
            local_files_only=where["local_files_only"],
            _raise_exceptions_for_missing_entries=False,
        )
    return None if found is None else Path(found)


def settings(source: str, loading: Loading, name: str = "config.json") -> dict[str, Any]:
    """The settings in a JSON file beside the weights; empty where a folder has no such file.

    Raises:
        ConfigError: there is no such folder or hub model.
        DataError: the file holds no JSON object.
    """
    path = find(source, name, loading)
    if path is None:
        if name == "config.json" and not is_folder(source):  # every hub model has one
            here = "among the files on this machine" if loading.where(False)["local_files_only"] else "on the hub"
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
        ConfigError, DataError: as ``settings``.
    """
    held = settings(source, loading, "preprocessor_config.json")
    return tuple(held.get("image_mean") or CLIP_MEAN), tuple(held.get("image_std") or CLIP_STD)


def llama_tokenizer(source: str, loading: Loading) -> LlamaTokenizer:
    """Llama's tokenizer from ``tokenizer.json``, or from SentencePiece's ``tokenizer.model``.

    Without either transformers would make one of three words and say nothing.

    Raises:
        ConfigError: there is neither.
        CapabilityError: only ``tokenizer.model`` is there, and sentencepiece, which reads it, is not installed.
        DataError: the file is damaged.
    """
    from transformers import AutoTokenizer, LlamaTokenizer

    if find(source, "tokenizer.json", loading) is None:
        if find(source, "tokenizer.model", loading) is None:
            raise ConfigError(f"{source} holds no tokenizer; it should hold tokenizer.json or tokenizer.model")
        if find_spec("sentencepiece") is None:
            raise CapabilityError(
                f"{source}: sentencepiece, which reads its tokenizer.model, is not installed; "
                "pip install 'lvlm-stethoscope[sentencepiece]'"
            )
    named = settings(source, loading, "tokenizer_config.json").get("tokenizer_class")
    cls = LlamaTokenizer if named in (None, "LlamaTokenizer", "LlamaTokenizerFast") else AutoTokenizer
    folder = is_folder(source)
    with one_line(source), quiet(folder):
        return cls.from_pretrained(str(Path(source).expanduser()) if folder else source, **loading.where(folder))


def warn_of_strays(what: str, report: Report) -> None:
    """Warns of tensors in the files that the model has no place for."""
    if stray := report.unexpected:
        warnings.warn(f"{what}: {len(stray)} tensors in the files are not used, such as {stray[0]}", stacklevel=2)


def _last(error: Exception) -> str:
    """The line of an error that names the reason; checks of whole classes put it last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
