"""Weights and processor from a folder or the hub, with one-line errors."""

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
from stethoscope.core.launch import env_int

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, ProcessorMixin

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
_DEVICE_MAP = re.compile(rf"{'|'.join(DEVICE_MAPS)}|(cpu|mps|cuda|xpu|npu|hpu)(:\d+)?")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
QUANTIZE = ("4bit", "8bit")
WHOLE = (
    r"(?:.*\.)?(?:vision_tower|vision_model|visual|vision_encoder|image_encoder|multi_modal_projector|mm_projector|"
    r"connector|qformer|visual_abstractor|resampler|perceiver|language_projection|lm_head|embed_out)"
)
"""Modules that are never quantised, as transformers matches names: from the picture to the words' space, and the head.
They are a twentieth of the weights or less; relevancy takes gradients through the first, every figure about a token's
probability comes from the last."""


def is_folder(model_id: str) -> bool:
    """Whether the id is an existing folder.

    Raises:
        ConfigError: it can only be a path (not the form ``owner/name``) and there is no such folder.
    """
    path = Path(model_id).expanduser()
    if path.is_dir():
        return True
    if path.is_absolute() or model_id.startswith((".", "~")) or model_id.count("/") > 1:
        raise ConfigError(f"no model folder {model_id}; give a folder that exists or a hub id (owner/name)")
    return False


@dataclass(frozen=True)
class Loading:
    """How files become a model, the same for every adapter.

    Attributes:
        dtype: name of a torch dtype, or ``auto`` for that of the checkpoint.
        revision: branch, tag or commit of a hub model; None for main.
        device_map: spreads the model over devices, as in transformers: ``auto``, ``balanced``, ``sequential``, or a
            mapping of module names to devices, ``cpu`` and ``disk`` among them; None for one device. Weights that lie
            beside the modules (``query_tokens``, ``image_newline``) must not be on ``disk``; by name they are not.
        max_memory: how much a ``device_map`` by name may take of each device, as ``{0: 20GiB, cpu: 60GiB}``; devices
            that are not named are not used, and what fits on none goes to disk.
        offload_folder: where layers on ``disk`` are kept when they cannot be read from the model's own files.
        quantize: ``4bit`` (NF4) or ``8bit`` (LLM.int8) through bitsandbytes; see ``WHOLE`` for what stays as it is.
        attention: attention implementation outside recordings; None for transformers' choice.
        local_files_only: use nothing that is not on this machine already.
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

    def ready(self) -> None:
        """Raises CapabilityError when this machine cannot do what is asked. Called before anything is downloaded."""
        self._check_gpus()
        if self.quantize is None:
            return
        what = f"quantize={self.quantize}"
        from transformers.utils import get_available_devices
        from transformers.utils.import_utils import BITSANDBYTES_MIN_VERSION, is_bitsandbytes_available

        if not is_bitsandbytes_available():
            wanted = f"bitsandbytes>={BITSANDBYTES_MIN_VERSION}"
            raise CapabilityError(f"{what} needs {wanted}, which is not here; pip install 'lvlm-stethoscope[quantize]'")
        import bitsandbytes

        here, able = set(get_available_devices()), set(getattr(bitsandbytes, "supported_torch_devices", {"cuda"}))
        if not here & able:
            raise CapabilityError(
                f"{what} runs on {', '.join(sorted(able))} with bitsandbytes {bitsandbytes.__version__}; "
                f"this machine has {', '.join(sorted(here))}"
            )

    def _check_gpus(self) -> None:
        """Raises CapabilityError for a GPU, by its number, that is not there, or that other processes take too."""
        import torch

        beside = env_int("LOCAL_WORLD_SIZE", 1)
        if self.device_map in DEVICE_MAPS and beside > 1 and torch.accelerator.device_count():
            raise CapabilityError(
                f"device_map={self.device_map} takes all GPUs of a machine, and {beside} processes run on this one; "
                "start one process for each machine, or leave device_map at null: each process then takes one GPU"
            )
        places = list(self.device_map.values()) if isinstance(self.device_map, Mapping) else []
        named = [number for number in (*places, *(self.max_memory or ())) if isinstance(number, int)]
        if named and max(named) >= (count := torch.accelerator.device_count()):
            raise CapabilityError(
                f"device_map or max_memory names GPU {max(named)}; this machine has {count}, counted from 0"
            )

    def own_device(self) -> str:
        """Where a model goes that is told nothing: a GPU if there is one, each process of a machine to another."""
        import torch

        if not torch.cuda.is_available():
            return "cpu"
        local = env_int("LOCAL_RANK", 0)
        return f"cuda:{local % torch.cuda.device_count()}" if "LOCAL_RANK" in os.environ else "cuda"

    def options(self) -> dict[str, Any]:
        """What ``from_pretrained`` of a model is told beyond ``hub_kwargs``."""
        options = {"dtype": self.dtype, "device_map": self.device_map, "attn_implementation": self.attention}
        if self.max_memory is not None:
            options["max_memory"] = dict(self.max_memory)
        if self.offload_folder is not None:
            options["offload_folder"] = str(Path(self.offload_folder).expanduser())
        if self.quantize is not None:
            from transformers import BitsAndBytesConfig

            four = self.quantize == "4bit"
            chosen = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if four else {"load_in_8bit": True}
            options["quantization_config"] = BitsAndBytesConfig(**chosen, llm_int8_skip_modules=[WHOLE])
        return options

    def hub_kwargs(self, folder: bool) -> dict[str, Any]:
        """What every ``from_pretrained`` of transformers is told about where the files are."""
        offline = self.local_files_only
        if not folder and not offline and not _hub_answers():
            offline = True  # without this the hub's client tries again for minutes
        return {
            "revision": self.revision or "main",
            "local_files_only": offline,
            "trust_remote_code": self.trust_remote_code,
        }


def load(
    model_id: str, loading: Loading, check: Callable[[ProcessorMixin], None] = lambda processor: None
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Model and processor.

    Args:
        model_id: folder or hub id.
        check: called with the processor before weights are read.

    Raises:
        ConfigError: there is no such model, or it asks for code of its own.
        CapabilityError: transformers does not know it as an image-text model, or something needed is not installed.
        DataError: its files are damaged or incomplete.
    """
    from transformers import AutoModelForImageTextToText

    loading.ready()
    folder = is_folder(model_id)
    source, hub_kwargs = source_of(model_id, folder), loading.hub_kwargs(folder)
    with translate_loading_errors(model_id), silenced(folder):
        _check_kind(model_id, source, hub_kwargs)
        is_blip = processors.model_type_of(source, hub_kwargs) in processors.BLIP_PROCESSORS
        processor = (processors.load_blip if is_blip else processors.load)(source, hub_kwargs)
    check(processor)
    model = pretrained(AutoModelForImageTextToText, model_id, loading)
    if is_blip:
        processors.complete_blip(model, processor)
    processors.complete(model, processor)
    return model, processor


def _check_kind(model_id: str, source: str, hub_kwargs: Mapping[str, Any]) -> None:
    """Refuse folders of other kinds than models of transformers, which would fail late or load as something else.

    Raises:
        CapabilityError: it is a LoRA adapter and peft is missing, or a checkpoint of LLaVA's authors.
    """
    from transformers import PreTrainedConfig
    from transformers.utils import find_adapter_config_file, is_peft_available

    places = {name: hub_kwargs[name] for name in ("revision", "local_files_only")}
    if not is_peft_available() and find_adapter_config_file(source, **places) is not None:
        raise CapabilityError(
            f"model {model_id} is a LoRA adapter (adapter_config.json); peft, which loads it, is not installed: "
            "pip install peft"
        )
    config, _ = PreTrainedConfig.get_config_dict(source, **places)
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
    """``cls.from_pretrained`` under all the options of ``loading``, for every adapter that loads a model.

    Args:
        cls: a model class of transformers or an ``AutoModel...``.
        source: folder or hub id; None with ``config`` and ``state_dict`` among the further arguments.
        name: how messages call the model, ``source`` by default.
        more: further arguments, such as ``config`` or ``key_mapping``, and others than those of ``loading``.

    Raises:
        ConfigError, CapabilityError, DataError: as ``load``; one line each.
    """
    import torch

    loading.ready()
    folder, name = source is None or is_folder(source), name or str(source)
    told = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # so that it says which do not fit
    options = {**told, **loading.hub_kwargs(folder), **loading.options(), **more}
    with translate_loading_errors(name), silenced(folder):
        model, report = cls.from_pretrained(None if source is None else source_of(source, folder), **options)
    _check_report(report, name, model.state_dict())
    if loading.quantize == "4bit":
        _settle_four_bits(model)
    if loading.quantize == "8bit" and head_dtype(model) != torch.float16:
        # bitsandbytes says so for every product of every step
        warnings.filterwarnings("ignore", "MatMul8bitLt: inputs will be cast")
        warnings.warn(
            f"model {name}: quantize=8bit multiplies in float16; dtype=float16 spares the casts", stacklevel=3
        )
    return model


def head_dtype(model: PreTrainedModel) -> torch.dtype:
    """What the head computes in, or the model where it has none.

    ``model.dtype`` goes by the first weights, and BLIP-2's stay in float32 when the others are in float16.
    """
    head = model.get_output_embeddings()
    return model.dtype if head is None else head.weight.dtype


def _settle_four_bits(model: PreTrainedModel) -> None:
    """Computes in the dtype of the rest, and so that gradients are right.

    bitsandbytes computes in float32 unless told otherwise. On CPUs with AVX-512 it packs weights at the first pass
    without gradients, after which the product has a wrong gradient, without an error; relevancy needs the right one.
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = head_dtype(model), True
            module.support_avx512bf16_for_cpu = False


def surplus_layer(unexpected: Iterable[str], known: Iterable[str]) -> str | None:
    """Find a weight of a layer behind the last one that the model has: it differs from others by numbers alone.

    >>> surplus_layer(["head.bias", "layers.2.weight"], ["layers.0.weight", "layers.1.weight"])
    'layers.2.weight'
    """
    numbered = {_NUMBER.sub("#", key) for key in known if _NUMBER.search(key)}
    return next((key for key in unexpected if _NUMBER.sub("#", key) in numbered), None)


def _check_report(report: Mapping[str, Any], name: str, known: Iterable[str]) -> None:
    """Raises DataError for weights that are missing or of another size; warns of such that the model has no use for."""
    if report["mismatched_keys"]:
        key, there, wanted = sorted(report["mismatched_keys"])[0]
        sizes = f"{tuple(there)} in the files and {tuple(wanted)} in the model"
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
    """A model that was made in memory, loaded again so that it follows ``loading`` like one from files."""
    folder = tempfile.TemporaryDirectory(prefix="stethoscope-")
    with silenced(True):
        model.save_pretrained(folder.name)
    again = pretrained(type(model), folder.name, loading)
    again._stethoscope_files = folder  # layers on disk are read from there as long as the model lives
    return again


def source_of(source: str, folder: bool) -> str:
    """A folder with the home directory spelled out, or the hub id."""
    return str(Path(source).expanduser()) if folder else source


def _max_memory(given: Mapping[int | str, int | str]) -> dict[int | str, int]:
    """Bytes per device, GPUs by number.

    >>> _max_memory({"0": "1GiB", "cuda:1": "500MB", "cpu": 7})
    {0: 1073741824, 1: 500000000, 'cpu': 7}
    """
    from accelerate.utils import convert_file_size_to_int

    found: dict[int | str, int] = {}
    for device, size in given.items():
        name = str(device).removeprefix("cuda:")
        if not name.isdigit() and name not in ("cpu", "disk", "mps"):
            raise ConfigError(f"max_memory names the device {device!r}; it should be a GPU's number, cpu or disk")
        try:
            found[int(name) if name.isdigit() else name] = convert_file_size_to_int(size)
        except (ValueError, TypeError, AttributeError):
            raise ConfigError(f"max_memory of {device} is {size!r}; it should be bytes or a size as 20GiB") from None
    return found


@contextmanager
def translate_loading_errors(model_id: str) -> Iterator[None]:
    """Turns what loading raises into an error of one line."""
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


@functools.cache  # once a process: a hub that is out of reach costs seconds each time
def _hub_answers() -> bool:
    """Whether the hub says anything, through a proxy if there is one; one that takes calls and is silent does not."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:  # of whichever HTTP library the hub's client builds on: each has its own
        return False
    return True


@contextmanager
def silenced(folder: bool) -> Iterator[None]:
    """Without transformers' reports about weights, which come as errors, nor progress bars where nothing is fetched."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.set_verbosity_error()
    if folder:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
