"""Word embeddings that leave room for image tokens."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel


class WordEmbedding(nn.Embedding):
    """Takes ids behind those of its words too: image tokens, whose embeddings the model puts in afterwards.

    So a model gets an id for image tokens while embedding and head keep the size that the checkpoint has, its
    probabilities stay what they were, and it can never say an image token.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) of ids (...) int64; those behind the last word give the last word's."""
        return super().forward(input.clamp(max=self.num_embeddings - 1))


def make_room(model: PreTrainedModel) -> None:
    """Lets a model that was just made embed image tokens. Call it at the end of ``__init__``."""
    words = model.get_input_embeddings()
    model.set_input_embeddings(WordEmbedding(words.num_embeddings, words.embedding_dim, words.padding_idx))
