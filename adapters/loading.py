"""Load weights and processor from a folder or the hub, with one-line errors."""

from __future__ import annotations

import functools
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
from stethoscope.core.errors import CapabilityError, ConfigError, DataError, StethoscopeError, first_line, unknown
from stethoscope.core.system import env_int

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, ProcessorMixin

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
_DEVICE_MAP = re.compile(rf"{'|'.join(DEVICE_MAPS)}|(cpu|mps|cuda|xpu|npu|hpu)(:\d+)?")
_LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
QUANTIZE = ("4bit", "8bit")
NOT_QUANTIZED = (
    r"(?:.*\.)?(?:vision_tower|vision_model|visual|vision_encoder|image_encoder|multi_modal_projector|mm_projector|"
    r"connector|qformer|visual_abstractor|resampler|perceiver|language_projection|lm_head|embed_out)"
)
"""Modules that are never quantised, as a pattern of transformers: vision tower, connector and head. They hold at most
a twentieth of the weights; relevancy takes gradients through the first two, and every token probability comes from the
head."""


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


@dataclass(frozen=True)
class Loading:
    """Settings of loading, the same for every adapter.

    Attributes:
        dtype: name of a torch dtype, or ``auto`` for that of the checkpoint.
        revision: branch, tag or commit of a hub model; None for main.
        device_map: spreads the model over devices, as in transformers: ``auto``, ``balanced``, ``sequential``, or a
            mapping of module names to devices, ``cpu`` and ``disk`` among them; None for one device. Parameters of the
            model itself (``query_tokens``, ``image_newline``) must not be on ``disk``; a map by name respects that.
        max_memory: memory that a ``device_map`` by name may use of each device, as ``{0: 20GiB, cpu: 60GiB}``; devices
            that are not named are not used, and layers that fit on no device go to disk.
        offload_folder: folder for layers on ``disk`` that cannot be read from the model's own files.
        quantize: ``4bit`` (NF4) or ``8bit`` (LLM.int8) through bitsandbytes; all but ``NOT_QUANTIZED``.
        attention: attention implementation outside recordings; None for transformers' choice.
        local_files_only: use only files that are on this machine already.
        trust_remote_code: run code that comes with the model.

    Raises:
        ConfigError: a setting is wrong.
    """

    dtype: str = "auto"
    revision: str | None = None
    device_map: str | Mapping[str, Any] | None = None
    max_memory: Mapping[int | str, int | str] | None = None
    offload_folder: str | None = None
    quantize: str | None = None
    attention: str | None = None
    local_files_only: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(unknown("dtype", str(self.dtype), DTYPES))
        if self.quantize not in (None, *QUANTIZE):
            raise ConfigError(unknown("quantize", str(self.quantize), [*QUANTIZE, "null"]))
        if isinstance(self.device_map, str) and not _DEVICE_MAP.fullmatch(self.device_map):
            raise ConfigError(
                f"device_map={self.device_map!r} should be {', '.join(DEVICE_MAPS)}, a device or a mapping of module "
                f"names to devices"
            )
        if isinstance(self.device_map, Mapping):
            object.__setattr__(self, "device_map", dict(self.device_map))
        if self.max_memory is not None:
            if self.device_map not in DEVICE_MAPS:
                raise ConfigError(f"max_memory={dict(self.max_memory)} is read with device_map=auto only; set that too")
            object.__setattr__(self, "max_memory", _max_memory(self.max_memory))

    def check_machine(self) -> None:
        """Check that this machine can meet the settings, before anything is downloaded.

        Raises:
            CapabilityError: bitsandbytes or a GPU is missing, or other processes use the same GPUs.
        """
        import torch

        processes = env_int("LOCAL_WORLD_SIZE", 1)
        if self.device_map in DEVICE_MAPS and processes > 1 and torch.accelerator.device_count():
            raise CapabilityError(
                f"device_map={self.device_map} takes all GPUs of a machine, and {processes} processes run on this one; "
                "start one process for each machine, or leave device_map at null: each process then takes one GPU"
            )
        devices = list(self.device_map.values()) if isinstance(self.device_map, Mapping) else []
        gpus = [device for device in (*devices, *(self.max_memory or ())) if isinstance(device, int)]
        if gpus and max(gpus) >= (count := torch.accelerator.device_count()):
            raise CapabilityError(
                f"device_map or max_memory names GPU {max(gpus)}; this machine has {count}, counted from 0"
            )
        if self.quantize is None:
            return
        from transformers.utils import get_available_devices
        from transformers.utils.import_utils import BITSANDBYTES_MIN_VERSION, is_bitsandbytes_available

        if not is_bitsandbytes_available():
            raise CapabilityError(
                f"quantize={self.quantize} needs bitsandbytes>={BITSANDBYTES_MIN_VERSION}, which is not installed; "
                "pip install 'lvlm-stethoscope[quantize]'"
            )
        import bitsandbytes

        available = set(get_available_devices())
        supported = set(getattr(bitsandbytes, "supported_torch_devices", {"cuda"}))
        if not available & supported:
            raise CapabilityError(
                f"quantize={self.quantize} runs on {', '.join(sorted(supported))} with bitsandbytes "
                f"{bitsandbytes.__version__}; this machine has {', '.join(sorted(available))}"
            )

    def default_device(self) -> str:
        """Choose the device where none is given: a GPU if there is one, another for each process of a machine."""
        import torch

        if not torch.cuda.is_available():
            return "cpu"
        local_rank = env_int("LOCAL_RANK", 0)
        return f"cuda:{local_rank % torch.cuda.device_count()}" if "LOCAL_RANK" in os.environ else "cuda"

    def options(self) -> dict[str, Any]:
        """Build the arguments of a model's ``from_pretrained`` beyond ``hub_kwargs``."""
        options: dict[str, Any] = {"dtype": self.dtype, "device_map": self.device_map}
        options["attn_implementation"] = self.attention
        if self.max_memory is not None:
            options["max_memory"] = dict(self.max_memory)
        if self.offload_folder is not None:
            options["offload_folder"] = str(Path(self.offload_folder).expanduser())
        if self.quantize is not None:
            from transformers import BitsAndBytesConfig

            nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
            method = nf4 if self.quantize == "4bit" else {"load_in_8bit": True}
            options["quantization_config"] = BitsAndBytesConfig(**method, llm_int8_skip_modules=[NOT_QUANTIZED])
        return options

    def hub_kwargs(self, folder: bool) -> dict[str, Any]:
        """Build the arguments of every ``from_pretrained`` that say where the files are.

        Args:
            folder: the source is a local folder, so the hub need not be reachable.
        """
        # without a reachable hub its client would retry for minutes
        offline = self.local_files_only or not (folder or _hub_reachable())
        return {
            "revision": self.revision or "main",
            "local_files_only": offline,
            "trust_remote_code": self.trust_remote_code,
        }


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

    loading.check_machine()
    folder = is_folder(model_id)
    source, hub_kwargs = str(Path(model_id).expanduser()), loading.hub_kwargs(folder)
    with translate_loading_errors(model_id), silenced(folder):
        _check_kind(model_id, source, hub_kwargs)
        processor = processors.load(source, hub_kwargs)
    check(processor)
    model = pretrained(AutoModelForImageTextToText, model_id, loading)
    processors.complete(model, processor)
    return model, processor


def _check_kind(model_id: str, source: str, hub_kwargs: Mapping[str, Any]) -> None:
    """Refuse checkpoints in other formats than transformers', which would fail late or load as another model.

    Raises:
        CapabilityError: it is a LoRA adapter and peft is missing, or a checkpoint of LLaVA's authors.
    """
    from transformers import PreTrainedConfig
    from transformers.utils import find_adapter_config_file, is_peft_available

    location = {name: hub_kwargs[name] for name in ("revision", "local_files_only")}
    if not is_peft_available() and find_adapter_config_file(source, **location) is not None:
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


def _max_memory(given: Mapping[int | str, int | str]) -> dict[int | str, int]:
    """Convert memory sizes to bytes, and the names of GPUs to numbers.

    >>> _max_memory({"0": "1GiB", "cuda:1": "500MB", "cpu": 7})
    {0: 1073741824, 1: 500000000, 'cpu': 7}
    """
    from accelerate.utils import convert_file_size_to_int

    limits: dict[int | str, int] = {}
    for device, size in given.items():
        name = str(device).removeprefix("cuda:")
        if not name.isdigit() and name not in ("cpu", "disk", "mps"):
            raise ConfigError(f"max_memory names the device {device!r}; it should be a GPU's number, cpu or disk")
        try:
            limits[int(name) if name.isdigit() else name] = convert_file_size_to_int(size)
        except (ValueError, TypeError, AttributeError):
            raise ConfigError(f"max_memory of {device} is {size!r}; it should be bytes or a size as 20GiB") from None
    return limits


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
                f"model folder {model_id} lacks a file or holds a damaged one: {first_line(error)}"
            ) from error
        raise ConfigError(f"model {model_id} was not found as a folder or on the hub: {first_line(error)}") from error
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise ConfigError(f"model {model_id} brings its own code; set trust_remote_code=true to run it") from error
        raise CapabilityError(f"model {model_id} cannot be loaded: {first_line(error)}") from error
    except Exception as error:  # safetensors and pickle errors have no common base
        raise DataError(f"the files of model {model_id} cannot be read: {first_line(error)}") from error


@functools.cache  # once per process: an unreachable hub costs seconds each time
def _hub_reachable() -> bool:
    """Check whether the hub responds in time, through a proxy if there is one."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:  # the hub's client may use any HTTP library, each with its own errors
        return False
    return True


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
