"""Decode the residual stream after each layer by the model's own final norm and head: the logit lens.

Source: nostalgebraist, "interpreting GPT: the logit lens" (2020); for LVLMs Neo et al., arXiv 2410.07149.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers import PreTrainedModel

from stethoscope.core.errors import CapabilityError
from stethoscope.tracing.hooks import sites

_NORMS = ("norm", "final_layer_norm", "final_layernorm", "ln_f")
_LOGITS = 2**24  # entries of logits computed at once where all layers of a token are decoded together


class Lens:
    """The stack of decoder layers, the final norm and the head of a model, checked against its own logits.

    Attributes:
        checked: whether they have reproduced the model's own logits.

    Raises:
        CapabilityError: the model has no such parts.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        text = model.config.get_text_config()
        count = getattr(text, "num_decoder_layers", None) or text.num_hidden_layers
        roles = sites(model)
        for module in model.modules():
            layers = [c for c in module.children() if isinstance(c, nn.ModuleList) and len(c) == count]
            norms = [child for name, child in module.named_children() if name in _NORMS]
            if layers and norms and roles[id(layers[0])].role == "language":
                break
        else:
            raise CapabilityError(f"logit lens: no layers with a final norm found in {type(model).__name__}")
        self.layers, self.norm, self.head = layers[0], norms[0], model.get_output_embeddings()
        # T5's first version shares the head with the input embeddings and scales what it reads
        self._scale = text.hidden_size**-0.5 if getattr(text, "scale_decoder_outputs", False) else 1.0
        self._softcap = getattr(text, "final_logit_softcapping", None)
        self.checked = False
        self._normalise: Callable[[Tensor], Tensor] | None = None

    @contextmanager
    def listen(self, rows: Tensor) -> Iterator[list[Tensor]]:
        """Capture the rows (B, T, D) of the residual stream after each layer, in the list that is returned.

        Args:
            rows: (B, T) positions.
        """
        captured: list[Tensor] = []

        def hook(module: nn.Module, arguments: tuple, output: Tensor | tuple) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            chosen = rows.to(hidden.device)
            captured.append(hidden.detach()[torch.arange(len(chosen), device=chosen.device)[:, None], chosen])

        handles = [layer.register_forward_hook(hook) for layer in self.layers]
        try:
            yield captured
        finally:
            for handle in handles:
                handle.remove()

    def decode(self, hidden: Tensor) -> Tensor:
        """Compute float32 logits (..., V) of a residual stream (..., D)."""
        return self.unembed(self.norm(hidden))

    def normalise(self, states: Tensor) -> Tensor:
        """Apply the final norm to a few states (rows, D), by torch's one-call RMS norm where that is equal."""
        if self._normalise is None:
            self._normalise = _one_call(self.norm, states)
        return self._normalise(states)

    def unembed(self, states: Tensor) -> Tensor:
        """Compute float32 logits (..., V) of normalised states (..., D)."""
        logits = self.head(states if self._scale == 1.0 else states * self._scale).float()
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap

    def read(self, hidden: list[Tensor], logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Compute log-probability and rank of the tokens after each layer; the last is the model's own output.

        One layer is decoded at a time, so memory is that of one row of logits per token.

        Args:
            hidden: L tensors (..., D), rows of those from ``listen``.
            logits: (..., V) the model's own.
            tokens: (...) ids.

        Returns:
            Both (..., L) float32 on the CPU.

        Raises:
            CapabilityError: norm and head do not reproduce the model's own logits.
        """
        if not self.checked and tokens.numel():
            self._check(hidden[-1], logits)
        pairs = [_logprob_and_rank(self.decode(layer), tokens) for layer in hidden[:-1]] + [
            _logprob_and_rank(logits, tokens)
        ]
        return torch.stack([p for p, _ in pairs], -1), torch.stack([r for _, r in pairs], -1)

    def divergence(self, hidden: list[Tensor], logits: Tensor) -> Tensor:
        """Compute the divergence of the distribution after each layer from the model's own.

        Args:
            hidden: L tensors (..., D), as for ``read``.
            logits: (..., V) the model's own.

        Returns:
            (..., L - 1) float32 on the CPU, Jensen-Shannon divergence in nats, in [0, log 2].
        """
        final = logits.log_softmax(-1)
        layers = [_divergence(self.decode(layer).log_softmax(-1).to(final.device), final) for layer in hidden[:-1]]
        return torch.stack(layers, -1) if layers else final.new_zeros((*final.shape[:-1], 0)).cpu()

    def read_together(
        self, hidden: Tensor, logits: Tensor, tokens: Tensor, requires: frozenset[str]
    ) -> dict[str, Tensor]:
        """Do ``read`` and ``divergence`` for a few tokens, all layers at once, which is faster for few tokens.

        Args:
            hidden: (T, L, D) the residual stream after each layer.
            logits: (T, V) the model's own, float32.
            tokens: (T,) ids.
            requires: ``lens``, ``trajectory`` or both.

        Returns:
            ``lens_logprob`` and ``lens_rank`` (T, L), ``trajectory`` (T, L - 1): float32 on the CPU, as asked for.

        Raises:
            CapabilityError: see ``read``.
        """
        logits = logits.to(hidden.device)
        if not self.checked:
            self._check(hidden[:, -1], logits)
        count, size = hidden.shape[1], max(1, _LOGITS // (hidden.shape[1] * logits.shape[-1]))
        parts: dict[str, list[Tensor]] = {"lens_logprob": [], "lens_rank": [], "trajectory": []}
        for states, own, ids in zip(hidden.split(size), logits.split(size), tokens.split(size), strict=True):
            decoded = torch.cat([self.decode(states[:, :-1]).to(own.device), own[:, None]], 1)
            if "lens" in requires:
                logprob, rank = _logprob_and_rank(decoded, ids[:, None].expand(-1, count))
                parts["lens_logprob"].append(logprob)
                parts["lens_rank"].append(rank)
            if "trajectory" in requires:
                logprobs = decoded.log_softmax(-1)
                parts["trajectory"].append(_divergence(logprobs[:, :-1], logprobs[:, -1:]))
        return {name: values[0] if len(values) == 1 else torch.cat(values) for name, values in parts.items() if values}

    def _check(self, hidden: Tensor, logits: Tensor) -> None:
        decoded = self.decode(hidden).to(logits.device)
        near = 1e-3 if hidden.dtype == torch.float32 else 5e-2
        if (decoded - logits).abs().max() > near * (1 + logits.abs().max()):
            raise CapabilityError("logit lens: final norm and head do not reproduce the model's logits")
        self.checked = True


def _one_call(norm: nn.Module, states: Tensor) -> Callable[[Tensor], Tensor]:
    """Return torch's own RMS norm if it equals the model's norm on these states, else the module itself."""
    weight, epsilon = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None)
    if not isinstance(weight, Tensor) or weight.device != states.device or not isinstance(epsilon, float):
        return norm
    usual = partial(rms_norm, normalized_shape=weight.shape, weight=weight, eps=epsilon)
    return usual if torch.allclose(usual(states), norm(states), rtol=1e-5, atol=1e-5) else norm


_lenses: WeakKeyDictionary[PreTrainedModel, Lens] = WeakKeyDictionary()


def lens_of(model: PreTrainedModel) -> Lens:
    """Return the cached lens of a model.

    Raises:
        CapabilityError: see ``Lens``.
    """
    if model not in _lenses:
        _lenses[model] = Lens(model)
    return _lenses[model]


def _logprob_and_rank(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    tokens = tokens.to(logits.device)[..., None]
    chosen = logits.gather(-1, tokens)
    logprob = logits.log_softmax(-1).gather(-1, tokens)[..., 0]  # a third of the time of logsumexp
    rank = (logits > chosen).sum(-1)
    return logprob.float().cpu(), rank.float().cpu()


def _divergence(first: Tensor, other: Tensor) -> Tensor:
    """Compute the (...) Jensen-Shannon divergence of two (..., V) log-distributions."""
    middle = torch.logaddexp(first, other) - math.log(2)
    halves = [(part.exp() * (part - middle)).sum(-1) for part in (first, other)]
    return ((halves[0] + halves[1]) / 2).clamp(min=0).cpu()
