"""Logit lens: the residual stream of the predicting row after every layer, decoded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stethoscope.features.catalogue import feature

if TYPE_CHECKING:
    from torch import Tensor

    from stethoscope.trace import Trace


@feature("lens", high="depends", needs=["lens"])
def lens_rank(trace: Trace) -> Tensor:
    """log(1 + rank) of the token when the residual stream after a layer is decoded, for all layers but the last."""
    return trace.lens_rank[:, :-1].float().log1p()


@feature("lens", high="depends", needs=["lens"])
def lens_logprob(trace: Trace) -> Tensor:
    """Log-probability of the token when the residual stream after a layer is decoded, for all layers but the last."""
    return trace.lens_logprob[:, :-1]


@feature("trajectory", high="depends", needs=["trajectory"])
def lens_divergence(trace: Trace) -> Tensor:
    """Jensen-Shannon divergence of a layer's decoded distribution from the model's own, in nats, but for the last."""
    return trace.trajectory
