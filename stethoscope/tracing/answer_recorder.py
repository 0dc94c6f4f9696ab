"""Record what traces read while answers are generated, so that no pass over the finished answers is needed.

The pass that reads answer token k - 1 predicts token k: its last query is row k of a trace. The recorder keeps these
queries, the residual stream and the scores of every pass. The maps follow at the end, all rows of a layer at once, from
the keys that generation has collected by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stethoscope.tracing.attention_recorder import RowAttentionRecorder
from stethoscope.tracing.hooks import AttentionRecorder, eager_attention, last_row, record
from stethoscope.tracing.logit_lens import Lens
from stethoscope.tracing.model_parts import Site, route_layers
from stethoscope.tracing.trace import STREAM_REQUIREMENTS, Encoded

ATTENTION_REQUIREMENTS = frozenset({"attention", "peaks", "own"})
RECORDED_REQUIREMENTS = ATTENTION_REQUIREMENTS | (STREAM_REQUIREMENTS - {"hidden"})
"""Parts of a trace that read no other rows than those that predict the answer's tokens."""


class AnswerRecorder(AttentionRecorder):
    """Records the passes of one ``generate`` call of a causal model without sliding windows.

    Args:
        requires: parts of ``RECORDED_REQUIREMENTS``.
        lens: logit lens of the model; None where no part reads the residual stream.

    Attributes:
        scores: (B, V) float32 of every pass, which the caller adds: those that ``generate`` gives to processors.
        depth: number of layers whose outputs are recorded; 0 without a lens.
        hidden: (B, 1, D) after each of these layers, pass by pass.
        queries: (B, H, 1, d) of each attention module, pass by pass.
        calls: by name of the module, in the order of a pass, the first call's site, module and options. Its keys stay
            in the cache, since holding on to those of every pass costs more than all else that is recorded.
    """

    roles = ("language",)
    observes = True

    def __init__(self, requires: frozenset[str], lens: Lens | None) -> None:
        self.requires, self._lens = requires, lens
        self.depth = 0 if lens is None else len(lens.layers)
        self.scores: list[Tensor] = []
        self.hidden: list[Tensor] = []
        self.queries: list[Tensor] = []
        self.calls: dict[str, tuple[Site, nn.Module, dict[str, Any]]] = {}

    @contextmanager
    def recorded(self, model: PreTrainedModel) -> Iterator[None]:
        """Record the passes of a model within the block."""
        with ExitStack() as stack:
            if not self.requires.isdisjoint(ATTENTION_REQUIREMENTS):
                stack.enter_context(record(model, self))
            if self._lens is not None:
                stack.enter_context(route_layers(list(self._lens.layers), self._run_layer))
            yield

    def observe(self, site: Site, module: nn.Module, query: Tensor, key: Tensor, options: dict[str, Any]) -> None:
        self.queries.append(last_row(query))
        if site.name not in self.calls:
            self.calls[site.name] = site, module, options

    def _run_layer(self, forward: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Run a layer and keep its output at the last position; a forward hook takes twice as long."""
        output = forward(*arguments, **options)
        self.hidden.append(last_row(output[0] if isinstance(output, tuple) else output))
        return output


class RecordedRows(NamedTuple):
    """Rows of B answers, in the form of a pass over them.

    Attributes:
        attention: recorder of their maps, which has seen all layers; None where none is required.
        hidden: residual stream (B, T, D) after each layer, if recorded.
        logits: (B, T, V) float32.
    """

    attention: RowAttentionRecorder | None
    hidden: list[Tensor]
    logits: Tensor


@dataclass(frozen=True, eq=False)
class RecordedAnswers:
    """The answers of one ``generate`` call and what was recorded of them.

    Attributes:
        token_ids: of every answer.
        columns: of every prompt, the ranges of its tokens in the sequence that ``generate`` read.
        keys: (B, key-value heads, sequence, d) of every layer, when the answers were finished.
        recorder: of the call.
    """

    token_ids: Sequence[tuple[int, ...]]
    columns: Sequence[Sequence[slice]]
    keys: Sequence[Tensor]
    recorder: AnswerRecorder

    def covers(self, indices: Sequence[int], token_ids: Sequence[Sequence[int]], requires: frozenset[str]) -> bool:
        """Tell whether a trace of some answers can be read from the record: they are as generated, and not empty."""
        same = all(tuple(ids) == self.token_ids[index] for index, ids in zip(indices, token_ids, strict=True))
        return same and requires <= self.recorder.requires and any(map(len, token_ids))

    def rows(self, indices: Sequence[int], prompts: Sequence[Encoded], requires: frozenset[str]) -> RecordedRows:
        """Return the rows of some answers.

        Args:
            indices: of the answers.
            prompts: of these answers.
            requires: parts of the trace, of those recorded.
        """
        count, picked = max(len(self.token_ids[index]) for index in indices), self._picked(indices)
        depth, states = self.recorder.depth, self.recorder.hidden
        hidden = [torch.cat(states[layer::depth][:count], 1)[picked] for layer in range(depth)]
        logits = torch.stack(self.recorder.scores[:count], 1)[picked]
        attention = None
        if not requires.isdisjoint(ATTENTION_REQUIREMENTS):
            attention = self._attention(indices, prompts, count, requires)
        return RecordedRows(attention, hidden, logits)

    def _picked(self, indices: Sequence[int]) -> slice | list[int]:
        """Return what takes some answers out of a batch: a slice, which copies nothing, where these are all."""
        return slice(None) if list(indices) == list(range(len(self.token_ids))) else list(indices)

    def _attention(
        self, indices: Sequence[int], prompts: Sequence[Encoded], count: int, requires: frozenset[str]
    ) -> RowAttentionRecorder:
        """Compute the maps of rows, whose keys are the prompt, padded on the left, and the earlier answer tokens."""
        lengths = [prompt.spans.length for prompt in prompts]
        longest, width = max(lengths), max(part.stop for parts in self.columns for part in parts)
        total = longest + count - 1
        offsets = [longest - length for length in lengths]
        calls, queries = self.recorder.calls, self.recorder.queries
        lowest = torch.finfo(queries[0].dtype).min
        mask = torch.full((count, total), lowest, dtype=queries[0].dtype).triu_(longest).repeat(len(prompts), 1, 1, 1)
        for row, offset in zip(mask, offsets, strict=True):
            row[..., :offset] = lowest
        spans = [prompt.spans.shifted(offset) for prompt, offset in zip(prompts, offsets, strict=True)]
        steps = torch.arange(count).expand(len(prompts), -1)
        attention = RowAttentionRecorder(steps, spans, total, None, offsets, longest - 1, requires)
        columns, picked = self._key_columns(indices, lengths, total), self._picked(indices)
        for layer, ((site, module, options), keys) in enumerate(zip(calls.values(), self.keys, strict=True)):
            query = torch.cat(queries[layer :: len(calls)][:count], 2)[picked]
            if columns is None:
                key = keys[picked][:, :, width - longest : width + count - 1]
            else:
                pairs = zip(indices, columns, strict=True)
                key = torch.stack([keys[answer].index_select(1, own.to(keys.device)) for answer, own in pairs])
            mask = mask.to(query.device)
            attention.on_weights(site, eager_attention(module, query, key, key[..., :0], mask, **options)[1])
        attention.finish()
        return attention

    def _key_columns(self, indices: Sequence[int], lengths: Sequence[int], total: int) -> Tensor | None:
        """Return the (answers, total) columns of the cache with the keys of rows; None where they are the last ones."""
        pieces = [[part for part in self.columns[answer] if part.start < part.stop] for answer in indices]
        if all(len(parts) == 1 for parts in pieces):
            return None
        longest, width = max(lengths), max(part.stop for parts in self.columns for part in parts)
        columns = torch.zeros(len(indices), total, dtype=torch.long)
        columns[:, longest:] = torch.arange(width, width + total - longest)
        for row, (parts, length) in enumerate(zip(pieces, lengths, strict=True)):
            own = [column for part in parts for column in range(part.start, part.stop)]
            columns[row, longest - length : longest] = torch.tensor(own)
        return columns
