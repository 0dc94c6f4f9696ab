"""Compute digests of a loaded model's weights, configuration, tokenizer and image processor."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.core.digests import cached_digest
from stethoscope.core.errors import DataError
from stethoscope.tracing.model_parts import modules_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, ProcessorMixin

_WEIGHTS = ("*.safetensors", "*.bin")
_NOT_DIGESTED = (
    "transformers_version", "dtype", "torch_dtype", "architectures", "name_or_path", "output_attentions",
    "output_hidden_states", "use_cache", "return_dict", "quantization_config", "processor_class",
)  # fmt: skip
"""Settings of where a model comes from or how it runs, not of what it computes; dtype and quantisation have keys of
their own in the fingerprint."""


def weights(model: PreTrainedModel, model_id: str | None, folder: bool, files: Sequence[Path] = ()) -> str:
    """Compute a digest of the weight files of a folder, name the commit of a hub model, or digest weights in memory.

    ``files`` are those that were read, where it was not transformers that read them; then it is their digest.
    Files are read whole; see ``digests.cached_digest`` for when they are read again. Weights in memory are digested
    where a second repository was loaded too, as under a LoRA, and where the folder holds no known weight files.
    """
    if files:
        return digest_files(files)
    if not getattr(model, "_hf_peft_config_loaded", False):
        commit = getattr(model.config, "_commit_hash", None)
        if folder and model_id is not None:
            paths = _weight_files(Path(model_id).expanduser())
            if paths:
                return f"sha256:{cached_digest(paths, lambda: _digest_named_files(paths))}"
        elif model_id is not None and commit:
            return f"commit:{commit}"
    return f"state:{_digest_state(model)}"


def _all_tensors(model: PreTrainedModel) -> list[Tensor]:
    """List all parameters and buffers, in a fifth of the time of ``parameters()``, which builds names."""
    held = (part for module in modules_of(model) for part in (module._parameters, module._buffers))
    return [tensor for part in held for tensor in part.values() if tensor is not None]


def versions(model: PreTrainedModel) -> tuple[int, ...] | None:
    """Count how often each parameter and buffer was changed in place, except through ``.data``.

    None where there is no count: made in inference mode, or moved in and out by accelerate (``is_meta`` in between).
    """
    return _versions(_all_tensors(model))


def _versions(tensors: Sequence[Tensor]) -> tuple[int, ...] | None:
    if any(tensor.is_inference() or tensor.is_meta for tensor in tensors):
        return None
    return tuple([tensor._version for tensor in tensors])


def state_key(model: PreTrainedModel) -> tuple[Any, ...] | None:
    """Build a key that changes when weights or forward hooks are replaced, or weights change in place.

    None where changes in place cannot be counted, see ``versions``.
    """
    tensors = _all_tensors(model)
    counts = _versions(tensors)
    return counts and (counts, [tensor.data_ptr() for tensor in tensors], _hooks(model))


def _hooks(model: PreTrainedModel) -> tuple[int, ...]:
    """List the ids of all forward hooks, to detect added or removed ones."""
    return tuple(
        id(hook)
        for module in modules_of(model)
        if module._forward_pre_hooks or module._forward_hooks
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    )


def _weight_files(root: Path) -> list[Path]:
    """List the weight files of a model folder: those in it, and the shards that its indices name, wherever they are.

    Raises:
        DataError: an index cannot be read.
    """
    paths = {path for pattern in _WEIGHTS for path in root.glob(pattern) if path.name[0] != "."}  # ._ of macOS
    for index in (path for path in root.glob("*.index.json") if path.name[0] != "."):
        try:
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            paths.update(root / shard for shard in shards if (root / shard).is_file())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{index} is no index of weights: {error}") from None
    return sorted(paths)


def _digest_named_files(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    return digest.hexdigest()


def digest_files(paths: Iterable[Path]) -> str:
    """Compute the digest of the contents of files, whatever their names."""
    digest = hashlib.sha256()
    for path in paths:
        blob = path.resolve()
        if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):
            digest.update(blob.name.encode())  # the hub's cache names large files by their SHA-256
            continue
        digest.update(cached_digest([path], partial(_sha256, path)).encode())
    return f"sha256:{digest.hexdigest()}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_state(model: PreTrainedModel) -> str:
    import torch

    tensors = model.state_dict()
    if any(tensor.is_meta for tensor in tensors.values()):  # accelerate holds them on another device or on disk
        from accelerate.utils.modeling import get_state_dict_offloaded_model

        loaded = {name: tensor for name, tensor in tensors.items() if not tensor.is_meta}
        tensors = loaded | get_state_dict_offloaded_model(model)
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def settings(model: PreTrainedModel, processor: ProcessorMixin) -> dict[str, str]:
    """Compute digests of the settings that change answers, as they are in memory.

    The chat template is not among them: the prompt that it renders has a key of its own in the fingerprint.

    Returns:
        Digests of ``config`` (of the model), ``tokenizer`` (vocabulary, rules, special tokens) and ``image_processor``
        (where it lists its settings), 16 hex digits each.
    """
    tokenizer = processor.tokenizer
    parts = {
        "config": _relevant_settings(model.config.to_dict()),
        "tokenizer": [
            _tokenizer_rules(tokenizer), _relevant_settings(tokenizer.special_tokens_map), tokenizer.padding_side
        ],
        "image_processor": _relevant_settings(getattr(processor.image_processor, "to_dict", dict)()),
    }  # fmt: skip
    texts = {name: json.dumps(part, sort_keys=True, default=str) for name, part in parts.items() if part}
    return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in texts.items()}


def _tokenizer_rules(tokenizer: Any) -> Any:
    """Return everything that determines tokens, without padding and truncation, which the last call may have set."""
    backend, vocabulary = getattr(tokenizer, "backend_tokenizer", None), tokenizer.get_vocab()
    if backend is None:
        return sorted(vocabulary.items())
    token = max(vocabulary, key=vocabulary.__getitem__, default="")
    if vocabulary.get(token, 0) > 100 * (len(vocabulary) + 1000):  # to_str writes a line for every id without a token
        raise DataError(f"the tokenizer's {token[:80]!r} has the id {vocabulary[token]}, of {len(vocabulary)} tokens")
    text = backend.to_str()
    return text[text.index('"added_tokens"') :]  # padding and truncation come before


def _relevant_settings(value: Any) -> Any:
    """Drop private settings and ``_NOT_DIGESTED`` at any depth."""
    if isinstance(value, Mapping):
        names = [key for key in value if str(key) not in _NOT_DIGESTED and str(key)[:1] != "_"]
        return {str(key): _relevant_settings(value[key]) for key in names}
    return [_relevant_settings(item) for item in value] if isinstance(value, (list, tuple)) else value
