"""Decode the residual stream after each layer by the model's own final norm and head: the logit lens.

Source: nostalgebraist, "interpreting GPT: the logit lens" (2020); for LVLMs Neo et al., arXiv 2410.07149.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers import PreTrainedModel

from stethoscope.core.errors import CapabilityError
from stethoscope.tracing.model_parts import rms_epsilon, sites
from stethoscope.tracing.trace import hidden_layers

_NORMS = ("norm", "final_layer_norm", "final_layernorm", "ln_f")
_LOGITS = 2**24  # entries of logits computed at once where all layers of a token are decoded together
_CACHED = 2**17  # entries of logits reduced at once on a CPU, in whose cache they stay


class Lens:
    """The stack of decoder layers, the final norm and the head of a model, checked against its own logits.

    Attributes:
        checked: whether they have reproduced the model's own logits.

    Raises:
        CapabilityError: the model has no such parts.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        text, count = model.config.get_text_config(), layer_count(model)
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

    def probed(self, hidden: list[Tensor]) -> Tensor:
        """Return the states at ``HIDDEN_LAYERS``, (..., 2, D) float32 on the CPU, h_L after the final norm.

        Args:
            hidden: L tensors (..., D), those of ``listen``.
        """
        chosen = hidden_layers(len(hidden))
        states = [hidden[layer - 1] if layer < len(hidden) else self.norm(hidden[-1]) for layer in chosen]
        return torch.stack([state.detach().float().cpu() for state in states], -2)

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

    def read(
        self, hidden: list[Tensor], logits: Tensor, tokens: Tensor, requires: Collection[str] = ("lens",)
    ) -> dict[str, Tensor]:
        """Reduce the distribution after each layer; the last is the model's own output.

        Every layer is decoded once, by itself or, if all their logits stay in the cache of a CPU, with others. So
        memory is that of one row of logits per token.

        Args:
            hidden: L tensors (..., D), rows of those from ``listen``.
            logits: (..., V) the model's own.
            tokens: (...) ids.
            requires: ``lens``, ``trajectory``, ``layer_entropy`` or several of them.

        Returns:
            As asked for, on the CPU: ``lens_logprob`` and ``lens_rank`` (..., L), log-probability in nats and rank of
            the token; ``trajectory`` (..., L - 1), Jensen-Shannon divergence from the model's own distribution in nats,
            in [0, log 2]; ``lens_entropy`` (..., L) in nats and ``lens_top`` (..., L) int64, the most probable token.

        Raises:
            CapabilityError: norm and head do not reproduce the model's own logits.
        """
        if not self.checked and tokens.numel():
            self._check(hidden[-1], logits)
        final = logits.log_softmax(-1) if "trajectory" in requires else None
        shares = None if final is None else final.exp()
        empty = logits.new_zeros((0, *tokens.shape)).cpu()  # the trajectory of a model with one layer
        parts: dict[str, list[Tensor]] = {} if final is None else {"trajectory": [empty]}
        at_once = _CACHED // logits.shape[-1] if logits.device.type == "cpu" else len(tokens)
        size, together = max(1, at_once), max(1, at_once // max(1, tokens.numel()))  # rows, layers
        earlier = hidden[:-1]
        groups = [earlier[start : start + together] for start in range(0, len(earlier), together)]
        for layers in [*groups, None]:
            decoded = (logits[None] if layers is None else self.decode(torch.stack(layers))).split(size, 1)
            others: list[tuple[Tensor, Tensor] | None] = [None] * len(decoded)
            if layers is not None and final is not None and shares is not None:
                others = list(zip(final.split(size), shares.split(size), strict=True))
            rows = zip(decoded, tokens.split(size), others, strict=True)
            values = [_reduce(*part, requires) for part in rows]
            for name in values[0]:
                parts.setdefault(name, []).append(torch.cat([value[name] for value in values], 1))
        return {name: torch.cat(part).movedim(0, -1) for name, part in parts.items()}

    def evidence(self, hidden: Tensor) -> Tensor:
        """Compute the mean positive and the mean negative evidence of the head (Dempster-Shafer weights of EUQ, 2026).

        EUQ subtracts from every row of the head its mean over dimensions; to subtract the state's own is the same.

        Args:
            hidden: (..., D) the residual stream after the last layer.

        Returns:
            (..., 2) float32 on the CPU, both >= 0.
        """
        states = self.norm(hidden)
        centred = (states - states.mean(-1, keepdim=True)) * self._scale
        weights = self.head(centred).float()
        bias = getattr(self.head, "bias", None)
        weights = weights if bias is None else weights - bias.float()
        return torch.stack([weights.clamp(min=0).mean(-1), (-weights).clamp(min=0).mean(-1)], -1).cpu()

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
                parts["trajectory"].append(_divergence(logprobs[:, :-1], logprobs[:, -1:], logprobs[:, -1:].exp()))
        return {name: values[0] if len(values) == 1 else torch.cat(values) for name, values in parts.items() if values}

    def _check(self, hidden: Tensor, logits: Tensor) -> None:
        decoded = self.decode(hidden).to(logits.device)
        near = 1e-3 if hidden.dtype == torch.float32 else 5e-2
        if (decoded - logits).abs().max() > near * (1 + logits.abs().max()):
            raise CapabilityError("logit lens: final norm and head do not reproduce the model's logits")
        self.checked = True


def layer_count(model: PreTrainedModel) -> int:
    """Return the number of layers of the language model, of its decoder where it has an encoder too."""
    text = model.config.get_text_config()
    return getattr(text, "num_decoder_layers", None) or text.num_hidden_layers


def _one_call(norm: nn.Module, states: Tensor) -> Callable[[Tensor], Tensor]:
    """Return torch's own RMS norm if it equals the model's norm on these states, else the module itself."""
    epsilon = rms_epsilon(norm, norm, states, 1e-5)
    if epsilon is None:
        return norm
    weight = cast("Tensor", norm.weight)
    return partial(rms_norm, normalized_shape=weight.shape, weight=weight, eps=epsilon)


_lenses: WeakKeyDictionary[PreTrainedModel, Lens] = WeakKeyDictionary()


def lens_of(model: PreTrainedModel) -> Lens:
    """Return the cached lens of a model.

    Raises:
        CapabilityError: see ``Lens``.
    """
    if model not in _lenses:
        _lenses[model] = Lens(model)
    return _lenses[model]


def _reduce(
    logits: Tensor, tokens: Tensor, final: tuple[Tensor, Tensor] | None, requires: Collection[str]
) -> dict[str, Tensor]:
    """Reduce the (layers, ..., V) logits of some layers to (layers, ...), see ``Lens.read``.

    Args:
        logits: of the layers.
        tokens: (...) ids.
        final: (..., V) log-probabilities and probabilities to compare with.
        requires: see ``Lens.read``.
    """
    logprobs = logits.log_softmax(-1)
    values: dict[str, Tensor] = {}
    if "lens" in requires:
        values["lens_logprob"], values["lens_rank"] = _logprob_and_rank(logits, tokens, logprobs)
    if "layer_entropy" in requires:
        values["lens_entropy"] = -(logprobs.exp() * logprobs).sum(-1).cpu()
        values["lens_top"] = logits.argmax(-1).cpu()
    if final is not None:
        values["trajectory"] = _divergence(logprobs.to(final[0].device), *final)
    return values


def _logprob_and_rank(logits: Tensor, tokens: Tensor, logprobs: Tensor | None = None) -> tuple[Tensor, Tensor]:
    tokens = tokens.to(logits.device).expand(logits.shape[:-1])[..., None]
    chosen = logits.gather(-1, tokens)
    logprobs = logits.log_softmax(-1) if logprobs is None else logprobs  # a third of the time of logsumexp
    logprob = logprobs.gather(-1, tokens)[..., 0]
    rank = torch.gt(logits, chosen, out=torch.empty_like(logits)).sum(-1)  # a fifth of the time of counting booleans
    return logprob.float().cpu(), rank.float().cpu()


def _divergence(first: Tensor, other: Tensor, other_shares: Tensor) -> Tensor:
    """Compute the (...) Jensen-Shannon divergence of two (..., V) log-distributions; ``other_shares``: exp(other)."""
    shares = first.exp()
    middle = ((shares + other_shares) / 2).clamp(min=1e-38).log()  # a third of the time of logaddexp
    halves = [(shares * (first - middle)).sum(-1), (other_shares * (other - middle)).sum(-1)]
    return ((halves[0] + halves[1]) / 2).clamp(min=0).cpu()
