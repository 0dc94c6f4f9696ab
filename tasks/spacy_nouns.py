"""Nouns and their likeness as AMBER's authors measure it: with a spaCy model, which has to be installed."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path

from stethoscope.core.errors import ConfigError, first_line
from stethoscope.tasks.nouns import Nouns
from stethoscope.tasks.objects import Mention

INSTALL = "pip install 'lvlm-stethoscope[amber]' && python -m spacy download en_core_web_lg"


class SpacyNouns:
    """Words of a vocabulary that a spaCy pipeline tags as nouns, and which words it takes for synonyms.

    The authors take NLTK's tagger and WordNet's lemmatiser for the first and spaCy's vectors for the second; here the
    pipeline does both. One without a tagger leaves the nouns to ``Nouns``.
    """

    def __init__(self, model: str, nouns: Nouns, threshold: float) -> None:
        """Loads the pipeline.

        Args:
            model: name of an installed spaCy model, or its folder.
            nouns: the vocabulary, and the reader that stands in for a tagger.
            threshold: words are synonyms if the cosine of their vectors is above it.

        Raises:
            ConfigError: spaCy or the model is not installed, or the model has no word vectors.
        """
        try:
            import spacy
        except ImportError:
            raise ConfigError(f"task.spacy={model!r} needs spaCy: {INSTALL}") from None
        if not Path(model).is_dir() and not entry_points(group="spacy_models", name=model):
            # spaCy would import any installed package of that name
            raise ConfigError(
                f"task.spacy={model!r} is no installed spaCy model and no folder; to install it: {INSTALL}"
            )
        try:
            self._pipeline = spacy.load(model)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"task.spacy={model!r} cannot be loaded: {first_line(error)}; to install it: {INSTALL}"
            ) from None
        if not self._pipeline.vocab.vectors_length:
            raise ConfigError(f"task.spacy={model!r} has no word vectors; a model that ends in _md or _lg has them")
        self._nouns, self._threshold = nouns, threshold
        self._tags = any(name in self._pipeline.pipe_names for name in ("tagger", "attribute_ruler"))
        self.similar: Callable[[str, str], bool] = lru_cache(maxsize=1 << 18)(self._similar)

    def __call__(self, text: str) -> list[Mention]:
        """The nouns of a text in reading order, named by the vocabulary's word."""
        if not self._tags:
            return self._nouns(text)
        found = []
        for token in self._pipeline(text):
            name = next((form for form in (token.text, token.lemma_) if form in self._nouns.vocabulary), None)
            if name is not None and token.tag_.startswith("NN"):
                found.append(Mention(name, token.idx, token.idx + len(token.text)))
        return found

    def _similar(self, one: str, other: str) -> bool:
        # the rest of the pipeline does not touch the vectors, so it need not run
        first, second = self._pipeline.make_doc(one), self._pipeline.make_doc(other)
        if not (first.vector_norm and second.vector_norm):  # spaCy warns of words without vector, and calls them unlike
            return one == other
        return first.similarity(second) > self._threshold
