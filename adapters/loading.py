"""Load weights and processor from a folder or the hub, with one-line errors."""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.adapters import processors
from stethoscope.adapters.load_settings import Loading
from stethoscope.core.errors import CapabilityError, ConfigError, DataError, StethoscopeError, first_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, ProcessorMixin

_LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class LoadReport:
    """Describe how a checkpoint and a model fit together.

    Attributes:
        loaded: number of tensors that went into the model.
        unexpected: names that are in the files and not in the model, in order.
        files: files that were read, in order.
    """

    loaded: int
    unexpected: tuple[str, ...]
    files: tuple[Path, ...]


def is_folder(model_id: str) -> bool:
    """Check whether the id is an existing folder.

    Raises:
        ConfigError: it can only be a path (not of the form ``owner/name``) and there is no such folder.
    """
    path = Path(model_id).expanduser()
    if path.is_dir():
        return True
    if path.is_absolute() or model_id.startswith((".", "~")) or model_id.count("/") > 1:
        raise ConfigError(f"no model folder {model_id}; give a folder that exists or a hub id (owner/name)")
    return False


def model_name(source: str) -> str:
    """Return the last part of a hub id, or of the whole path of a folder.

    >>> model_name("llava-hf/llava-1.5-7b-hf"), model_name("models/llava/../blip2/")
    ('llava-1.5-7b-hf', 'blip2')
    """
    return os.path.basename(os.path.abspath(Path(source).expanduser()))


def load(
    model_id: str, loading: Loading, check: Callable[[ProcessorMixin], None] = lambda processor: None
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load model and processor.

    Args:
        model_id: folder or hub id.
        loading: settings.
        check: called with the processor before weights are read.

    Raises:
        ConfigError: there is no such model, or it needs code of its own.
        CapabilityError: transformers does not know it as an image-text model, or a package is not installed.
        DataError: its files are damaged or incomplete.
    """
    from transformers import AutoModelForImageTextToText
    from transformers.utils import cached_file, find_adapter_config_file

    loading.check_machine()
    folder = is_folder(model_id)
    source, location = str(Path(model_id).expanduser()), loading.location(folder)
    with translate_loading_errors(model_id), silenced(folder):
        lora = find_adapter_config_file(source, **location)
        _check_kind(model_id, source, location, is_lora=lora is not None)
        if lora is not None and not any(
            cached_file(source, name, **location, _raise_exceptions_for_missing_entries=False)
            for name in ("processor_config.json", "preprocessor_config.json")
        ):
            processor = processors.load(*_base_location(Path(lora), loading))
        else:
            processor = processors.load(source, loading.hub_kwargs(folder))
    check(processor)
    model = pretrained(AutoModelForImageTextToText, model_id, loading)
    processors.complete(model, processor)
    return model, processor


def _check_kind(model_id: str, source: str, location: Mapping[str, Any], is_lora: bool) -> None:
    """Refuse checkpoints in other formats than transformers', which would fail late or load as another model.

    Raises:
        CapabilityError: it is a LoRA adapter and peft is missing, or a checkpoint of LLaVA's authors.
    """
    from transformers import PreTrainedConfig
    from transformers.utils import is_peft_available

    if is_lora and not is_peft_available():
        raise CapabilityError(
            f"model {model_id} is a LoRA adapter (adapter_config.json); peft, which loads it, is not installed: "
            "pip install peft"
        )
    config, _ = PreTrainedConfig.get_config_dict(source, **location)
    tower = config.get("mm_vision_tower")
    if tower is not None and "vision_config" not in config:
        raise CapabilityError(
            f"model {model_id} is a checkpoint in the format of LLaVA's authors (mm_vision_tower={tower}), which "
            "transformers does not read; take the converted one, as llava-hf/llava-1.5-7b-hf, or model=convllava-768 "
            "for ConvLLaVA"
        )


def _base_location(lora: Path, loading: Loading) -> tuple[str, dict[str, Any]]:
    """Return folder or hub id of the base model that an ``adapter_config.json`` names, and how to read it."""
    settings = json.loads(lora.read_text(encoding="utf-8"))
    base, revision = str(settings["base_model_name_or_path"]), settings.get("revision") or "main"
    return str(Path(base).expanduser()), {**loading.hub_kwargs(is_folder(base)), "revision": revision}


def pretrained(
    cls: Any, source: str | None, loading: Loading, *, name: str | None = None, **more: Any
) -> PreTrainedModel:
    """Call ``cls.from_pretrained`` with all the options of ``loading``, and check that the weights fit.

    Args:
        cls: a model class of transformers or an ``AutoModel...``.
        source: folder or hub id; None with ``config`` and ``state_dict`` among the further arguments.
        loading: settings.
        name: name of the model in messages; ``source`` by default.
        more: further arguments, such as ``config`` or ``key_mapping``; they override those of ``loading``.

    Raises:
        ConfigError, CapabilityError, DataError: as ``load``; one line each.
    """
    import torch

    loading.check_machine()
    folder, name = source is None or is_folder(source), name or str(source)
    reporting = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # ``_check_weights`` reads the report
    options = {**reporting, **loading.hub_kwargs(folder), **loading.options(), **more}
    with translate_loading_errors(name), silenced(folder):
        model, report = cls.from_pretrained(source and str(Path(source).expanduser()), **options)
    _check_weights(report, name, model.state_dict())
    if loading.quantize == "4bit":
        import bitsandbytes

        # bitsandbytes computes in float32 by default. On CPUs with AVX-512 it packs weights in the first pass without
        # gradients, after which gradients are wrong without an error; relevancy needs the right ones.
        for module in model.modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                module.compute_dtype, module.compute_type_is_set = head_dtype(model), True
                module.support_avx512bf16_for_cpu = False
    if loading.quantize == "8bit" and head_dtype(model) != torch.float16:
        # one warning of ours instead of one of bitsandbytes for every product
        warnings.filterwarnings("ignore", "MatMul8bitLt: inputs will be cast")
        warnings.warn(
            f"model {name}: quantize=8bit multiplies in float16; dtype=float16 spares the casts", stacklevel=3
        )
    return model


def head_dtype(model: PreTrainedModel) -> torch.dtype:
    """Return the dtype of the head, or of the model where there is none.

    ``model.dtype`` is that of the first weights, and BLIP-2's stay in float32 when the others are in float16.
    """
    head = model.get_output_embeddings()
    return model.dtype if head is None else head.weight.dtype


def surplus_layer(unexpected: Iterable[str], known: Iterable[str]) -> str | None:
    """Find an unexpected weight of a layer beyond the model's last: one that differs from known ones by numbers alone.

    >>> surplus_layer(["head.bias", "layers.2.weight"], ["layers.0.weight", "layers.1.weight"])
    'layers.2.weight'
    """
    numbered = {_LAYER_NUMBER.sub("#", key) for key in known if _LAYER_NUMBER.search(key)}
    return next((key for key in unexpected if _LAYER_NUMBER.sub("#", key) in numbered), None)


def _check_weights(report: Mapping[str, Any], name: str, known: Iterable[str]) -> None:
    """Refuse missing weights and wrong sizes with a DataError; warn of weights that the model does not use."""
    if report["mismatched_keys"]:
        key, size, expected = sorted(report["mismatched_keys"])[0]
        sizes = f"{tuple(size)} in the files and {tuple(expected)} in the model"
        count = len(report["mismatched_keys"])
        raise DataError(f"model {name}: {count} weights have sizes that do not fit, the first is {key}: {sizes}")
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise DataError(f"model {name} lacks {len(missing)} weights, the first is {missing[0]}")
    if report["unexpected_keys"]:
        unused = sorted(report["unexpected_keys"])
        if (surplus := surplus_layer(unused, known)) is not None:
            raise DataError(
                f"model {name}: its files hold more layers than its config.json says, such as {surplus}; set the "
                "number of layers there to that of the files"
            )
        warnings.warn(
            f"model {name} has no use for {len(unused)} weights of its files, the first is {unused[0]}", stacklevel=4
        )


def dispatch_model(model: PreTrainedModel, loading: Loading) -> PreTrainedModel:
    """Save a model that was built in memory and load it again under ``loading``."""
    folder = tempfile.TemporaryDirectory(prefix="stethoscope-")
    with silenced(True):
        model.save_pretrained(folder.name)
    dispatched = pretrained(type(model), folder.name, loading)
    dispatched._stethoscope_files = folder  # keeps the files of layers on disk as long as the model lives
    return dispatched


def _no_model(model_id: str) -> str:
    """Say that a folder holds no model; empty for hub ids, and for folders with the configuration of one."""
    folder = Path(model_id).expanduser()
    if not folder.is_dir() or (folder / "config.json").exists():
        return ""
    return f"folder {model_id} holds no model: it has no config.json; name one that save_pretrained wrote, or a hub id"


@contextmanager
def translate_loading_errors(model_id: str) -> Iterator[None]:
    """Turn whatever loading raises into one of our errors, with a message of one line."""
    try:
        yield
    except StethoscopeError:
        raise
    except ImportError as error:
        raise CapabilityError(f"model {model_id} needs more to be installed: {first_line(error)}") from error
    except OSError as error:
        if Path(model_id).expanduser().is_dir():
            raise DataError(
                _no_model(model_id)
                or f"model folder {model_id} lacks a file or holds a damaged one: {first_line(error)}"
            ) from error
        raise ConfigError(f"model {model_id} was not found as a folder or on the hub: {first_line(error)}") from error
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise ConfigError(f"model {model_id} brings its own code; set trust_remote_code=true to run it") from error
        if reason := _no_model(model_id):
            raise DataError(reason) from error
        raise CapabilityError(f"model {model_id} cannot be loaded: {first_line(error)}") from error
    except Exception as error:  # safetensors and pickle errors have no common base
        raise DataError(f"the files of model {model_id} cannot be read: {first_line(error)}") from error


@contextmanager
def silenced(folder: bool) -> Iterator[None]:
    """Silence transformers' reports about weights, which we turn into errors, and progress bars for local folders."""
    from transformers.utils import logging

    progress_bar, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.set_verbosity_error()
    if folder:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if progress_bar:
            logging.enable_progress_bar()
