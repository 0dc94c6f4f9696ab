"""Weights and processor from a folder or the hub, with one-line errors, and what identifies them."""

from __future__ import annotations

import hashlib
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.errors import CapabilityError, ConfigError, DataError, StethoscopeError, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

DTYPES = ("auto", "float32", "bfloat16", "float16")
_WEIGHTS = ("*.safetensors", "*.bin")


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
        device_map: spreads the model over devices, as in transformers (``auto``, ...); None for one device.
        attention: attention implementation outside recordings; None for transformers' choice.
        local_files_only: use nothing that is not on this machine already.
        trust_remote_code: run code that comes with the model.

    Raises:
        ConfigError: a setting is wrong.
    """

    dtype: str = "auto"
    revision: str | None = None
    device_map: str | Mapping[str, Any] | None = None
    attention: str | None = None
    local_files_only: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(unknown("dtype", str(self.dtype), DTYPES))

    def where(self, folder: bool) -> dict[str, Any]:
        """What every ``from_pretrained`` of transformers is told about where the files are."""
        offline = self.local_files_only
        if not folder and not offline and not _hub_answers():
            offline = True  # without this the hub's client tries again for minutes
        return {
            "revision": self.revision or "main",
            "local_files_only": offline,
            "trust_remote_code": self.trust_remote_code,
        }


def load(model_id: str, loading: Loading) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Model and processor.

    Args:
        model_id: folder or hub id.

    Raises:
        ConfigError: there is no such model, or it asks for code of its own.
        CapabilityError: transformers does not know it as an image-text model, or something needed is not installed.
        DataError: its files are damaged or incomplete.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = is_folder(model_id)
    source = str(Path(model_id).expanduser()) if folder else model_id
    where = loading.where(folder)
    with one_line(model_id), quiet(folder):
        processor = AutoProcessor.from_pretrained(source, **where)
        model, report = AutoModelForImageTextToText.from_pretrained(
            source,
            dtype=loading.dtype,
            device_map=loading.device_map,
            attn_implementation=loading.attention,
            output_loading_info=True,
            **where,
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise DataError(f"model {model_id} lacks {len(missing)} weights, the first is {missing[0]}")
    return model, processor


def weights_digest(model: PreTrainedModel, model_id: str | None, folder: bool) -> str:
    """Digest of the weight files of a folder, the commit of a hub model, or a digest of the weights in memory."""
    digest = hashlib.sha256()
    if folder:
        root = Path(model_id).expanduser()
        for path in sorted(path for pattern in _WEIGHTS for path in root.glob(pattern)):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while block := file.read(2**22):
                    digest.update(block)
        return f"sha256:{digest.hexdigest()}"
    commit = getattr(model.config, "_commit_hash", None)
    if model_id is not None and commit:
        return f"commit:{commit}"
    import torch

    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return f"state:{digest.hexdigest()}"


@contextmanager
def one_line(model_id: str) -> Iterator[None]:
    """Turns what loading raises into an error of one line."""
    try:
        yield
    except StethoscopeError:
        raise
    except ImportError as error:
        raise CapabilityError(f"model {model_id} needs more to be installed: {_first(error)}") from error
    except OSError as error:
        raise ConfigError(f"model {model_id} was not found as a folder or on the hub: {_first(error)}") from error
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise ConfigError(f"model {model_id} brings its own code; set trust_remote_code=true to run it") from error
        raise CapabilityError(f"model {model_id} cannot be loaded as an image-text model: {_first(error)}") from error
    except Exception as error:  # safetensors and pickle errors have no common base
        raise DataError(f"the files of model {model_id} cannot be read: {_first(error)}") from error


def _hub_answers() -> bool:
    """Whether the hub can be reached; taken for granted behind a proxy, where a direct connection proves nothing."""
    from huggingface_hub import constants

    if urllib.request.getproxies():
        return True
    url = urllib.parse.urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((url.hostname, url.port or (80 if url.scheme == "http" else 443)), timeout=5).close()
    except OSError:
        return False
    return True


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextmanager
def quiet(folder: bool) -> Iterator[None]:
    """No progress bar for a folder: reading it takes no download."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    if folder:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
