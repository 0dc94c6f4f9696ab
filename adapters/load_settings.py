"""Check the settings of loading, and turn them into arguments of ``from_pretrained``."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stethoscope.core.errors import CapabilityError, ConfigError, first_line, unknown
from stethoscope.core.system import env_int

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
_DEVICE_MAP = re.compile(rf"{'|'.join(DEVICE_MAPS)}|(cpu|mps|cuda|xpu|npu|hpu)(:\d+)?")
QUANTIZE = ("4bit", "8bit")
NOT_QUANTIZED = (
    r"(?:.*\.)?(?:vision_tower|vision_model|visual|vision_encoder|image_encoder|multi_modal_projector|mm_projector|"
    r"connector|qformer|visual_abstractor|resampler|perceiver|language_projection|lm_head|embed_out)"
)
"""Modules that are never quantised, as a pattern of transformers: vision tower, connector and head. They hold at most
a twentieth of the weights; relevancy takes gradients through the first two, and every token probability comes from the
head."""


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
        for name in ("local_files_only", "trust_remote_code"):
            if not isinstance(getattr(self, name), (bool, type(None))):  # the text "false" would count as true
                raise ConfigError(f"model.{name}={getattr(self, name)!r} should be true or false")
        for name in ("revision", "offload_folder", "attention"):
            if not isinstance(getattr(self, name), (str, Path, type(None))):
                raise ConfigError(f"model.{name}={getattr(self, name)!r} should be a text or null")
        if self.dtype not in DTYPES:
            raise ConfigError(unknown("dtype", str(self.dtype), DTYPES))
        if self.quantize not in (None, *QUANTIZE):
            raise ConfigError(unknown("quantize", str(self.quantize), [*QUANTIZE, "null"]))
        is_map = self.device_map is None or isinstance(self.device_map, Mapping)
        if not (is_map or (isinstance(self.device_map, str) and _DEVICE_MAP.fullmatch(self.device_map))):
            raise ConfigError(
                f"device_map={self.device_map!r} should be {', '.join(DEVICE_MAPS)}, a device or a mapping of module "
                f"names to devices"
            )
        if isinstance(self.device_map, Mapping):
            object.__setattr__(self, "device_map", dict(self.device_map))
        if self.max_memory is not None:
            if not isinstance(self.max_memory, Mapping):
                raise ConfigError(
                    f"max_memory={self.max_memory!r} should be sizes by device, as {{0: 20GiB, cpu: 60GiB}}"
                )
            if self.device_map not in DEVICE_MAPS:
                raise ConfigError(f"max_memory={dict(self.max_memory)} is read with device_map=auto only; set that too")
            object.__setattr__(self, "max_memory", _max_memory(self.max_memory))

    def check_machine(self) -> None:
        """Check that this machine can meet the settings, before anything is downloaded.

        Raises:
            CapabilityError: bitsandbytes or a device is missing, or other processes use the same GPUs.
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
        alone = [self.device_map] if isinstance(self.device_map, str) and self.device_map not in DEVICE_MAPS else []
        for device in {device for device in (*devices, *alone) if not isinstance(device, int)} - {"cpu", "disk"}:
            check_device(device)
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

    def location(self, folder: bool) -> dict[str, Any]:
        """Build the arguments that say which revision to read, and whether only files on this machine.

        Args:
            folder: the source is a local folder, so the hub need not be reachable.
        """
        # without a reachable hub its client would retry for minutes
        offline = self.local_files_only or not (folder or _hub_reachable())
        return {"revision": self.revision or "main", "local_files_only": offline}

    def hub_kwargs(self, folder: bool) -> dict[str, Any]:
        """Build the arguments of every ``from_pretrained``: see ``location``, and whether the model's code may run."""
        return {**self.location(folder), "trust_remote_code": self.trust_remote_code}


def check_device(device: Any) -> None:
    """Check that tensors with values can be made on a device.

    Raises:
        CapabilityError: they cannot, on this machine.
    """
    import torch

    try:
        tensor = torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise CapabilityError(f"device {device!r} cannot be used: {first_line(error)}") from error
    if tensor.is_meta:
        raise CapabilityError(f"device {device!r} cannot be used: it holds no values")


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
