"""What identifies a loaded model beyond its name: digests of its weights, configuration, tokenizer and processor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.runs.digests import remembered

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, ProcessorMixin

_WEIGHTS = ("*.safetensors", "*.bin")
_PASSING = (
    "transformers_version", "dtype", "torch_dtype", "architectures", "name_or_path", "output_attentions",
    "output_hidden_states", "use_cache", "return_dict", "quantization_config", "processor_class",
)  # fmt: skip
"""Settings that say where a model comes from or how it is run, not what it computes; dtype and quantisation have keys
of their own in the fingerprint."""


def weights(model: PreTrainedModel, model_id: str | None, folder: bool) -> str:
    """Digest of the weight files of a folder, the commit of a hub model, or a digest of the weights in memory.

    Files are read whole; see ``digests.remembered`` for when they are read again.
    """
    if folder:
        root = Path(model_id).expanduser()
        paths = sorted(path for pattern in _WEIGHTS for path in root.glob(pattern))
        return f"sha256:{remembered(paths, lambda: _of_files(paths))}"
    commit = getattr(model.config, "_commit_hash", None)
    if model_id is not None and commit:
        return f"commit:{commit}"
    return f"state:{_of_state(model)}"


def tensors_of(model: PreTrainedModel) -> list[Tensor]:
    """All parameters and buffers."""
    return [*model.parameters(), *model.buffers()]


def versions(model: PreTrainedModel) -> tuple[int, ...] | None:
    """How often each of ``tensors_of`` was changed in place, but for changes through ``.data``.

    None where there is no count: made in inference mode, or moved in and out by accelerate (``is_meta`` in between).
    """
    tensors = tensors_of(model)
    if any(tensor.is_inference() or tensor.is_meta for tensor in tensors):
        return None
    return tuple(tensor._version for tensor in tensors)


def hooks(model: PreTrainedModel) -> tuple[int, ...]:
    """What tells one set of forward hooks from another."""
    return tuple(
        id(hook)
        for module in model.modules()
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    )


def _of_files(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    return digest.hexdigest()


def _of_state(model: PreTrainedModel) -> str:
    import torch

    tensors = model.state_dict()
    if any(tensor.is_meta for tensor in tensors.values()):  # accelerate holds them on another device or on disk
        from accelerate.utils.modeling import get_state_dict_offloaded_model

        here = {name: tensor for name, tensor in tensors.items() if not tensor.is_meta}
        tensors = here | get_state_dict_offloaded_model(model)
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def settings(model: PreTrainedModel, processor: ProcessorMixin) -> dict[str, str]:
    """Digests of the settings that change answers, as they are in memory: wherever they were read from.

    Returns:
        ``config`` of the model, ``tokenizer`` (vocabulary, rules, special tokens), ``image_processor`` where it can
        tell its settings, and ``chat_template`` where there is one.
    """
    tokenizer = processor.tokenizer
    images = getattr(processor.image_processor, "to_dict", dict)()
    template = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
    found = {
        "config": _plain(model.config.to_dict()),
        "tokenizer": [_rules(tokenizer), _plain(tokenizer.special_tokens_map), tokenizer.padding_side],
        "image_processor": _plain(images),
        "chat_template": template,
    }
    return {name: _digest(value) for name, value in found.items() if value}


def _rules(tokenizer: Any) -> Any:
    """All that a tokenizer goes by; what its last call has left in it (padding, truncation) stands before the rest."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return sorted(tokenizer.get_vocab().items())
    text = backend.to_str()
    return text[text.index('"added_tokens"') :]


def _plain(value: Any) -> Any:
    """Settings without those that pass, at any depth."""
    if isinstance(value, Mapping):
        kept = {str(key): item for key, item in value.items() if str(key) not in _PASSING and str(key)[:1] != "_"}
        return {key: _plain(item) for key, item in kept.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
