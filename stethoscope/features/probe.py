"""Hidden states as they are, a column for every dimension: what a linear probe is fitted on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stethoscope.features.catalogue import both_rows
from stethoscope.features.heads import rows_of
from stethoscope.trace import Trace, of_depth

if TYPE_CHECKING:
    from torch import Tensor


def _state(trace: Trace, offset: int, layer: int) -> Tensor:
    """(T, D) state of the token's row at the share of depth of a layer of 32."""
    return rows_of(trace.states.token[of_depth(layer, trace.states.sinks.shape[0])], trace, offset)


@both_rows("hidden", high="depends", needs=["states"], vector=True)
def hidden_middle(trace: Trace, offset: int) -> Tensor:
    """Hidden state after the middle layer (16 of 32), a column per dimension: input of the linear probe."""
    return _state(trace, offset, 16)


@both_rows("hidden", high="depends", needs=["states"], vector=True)
def hidden_last(trace: Trace, offset: int) -> Tensor:
    """Hidden state after the last layer and the final norm, a column per dimension: input of the linear probe."""
    return _state(trace, offset, 32)
