"""Share models and detectors between the users of one server: one user has a model at a time, the others wait."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.core.cache import LRUCache
from stethoscope.core.component import build, choices, compose
from stethoscope.core.errors import CapabilityError, ConfigError, unknown
from stethoscope.detection.lookup import (
    AUTO,
    SWITCHED_OFF,
    bundled_detectors,
    check_model,
    describe_origin,
    detector_folder,
    detectors_for_model,
    parse_setting,
)
from stethoscope.diagnosis import diagnose

if TYPE_CHECKING:
    from torch import nn

    from stethoscope.adapters.base import Adapter
    from stethoscope.detection.detector import Detector

TRAIN_ONE = (
    "No detector of this model was found, so there are no warnings: tokens are coloured by how improbable they are. "
    "`stethoscope benchmark model={model}` trains one; then start the app again."
)


@dataclass(frozen=True)
class Detectors:
    """Detectors for the answers of one model.

    Attributes:
        final: scores the finished answer; None for no warnings.
        live: scores tokens while the answer is written; None where none can. ``delay`` of ``stethoscope.stream``.
        names: where they come from, for people, or that they are switched off.
    """

    final: Detector | None = None
    live: Detector | None = None
    delay: int = 0
    names: str = ""


@dataclass(frozen=True)
class Ready:
    """A model that is this user's until the end of the block.

    Attributes:
        adapter: loaded. ``detectors``: its own. ``eyes``: what it saw of earlier pictures.
    """

    adapter: Adapter
    detectors: Detectors
    image_features: ImageFeatureCache


class ModelPool:
    """Models by name, loaded when they are first asked; one is kept in memory, for models can be large.

    Args:
        adapter: the model to begin with. ``name``: of it, one of ``conf/model`` or of the user's own.
        detector: folder of a detector for that model, or of a run that has one; ``auto`` for the newest in ``runs``
            that was trained on this very model, or the one that comes with it; None or ``none`` for no warnings.
        live: the same for a detector that judges while the answer is written.
        runs: folder of run directories, in which detectors are looked for. ``run``: one to be looked at first.
        plugins: packages from which models may be made.

    Attributes:
        busy: somebody has the model now.
    """

    def __init__(
        self,
        adapter: Adapter,
        name: str,
        detector: str | None = AUTO,
        live: str | None = None,
        runs: Path = Path("runs"),
        run: Path | None = None,
        plugins: Sequence[str] = (),
    ) -> None:
        self.name = name
        self._runs, self._run = runs, run
        self._first, self._given, self._plugins = adapter, (parse_setting(detector), live), plugins
        self._lock = threading.Lock()
        self._loaded: tuple[str, Ready] | None = None

    @property
    def names(self) -> list[str]:
        """List the models to choose from, the one to begin with first."""
        return list(dict.fromkeys([self.name, *(name for name in choices("model") if name != "hf")]))

    @property
    def busy(self) -> bool:
        """Tell whether somebody has the model now."""
        return self._lock.locked()

    @contextmanager
    def use(self, name: str) -> Iterator[Ready]:
        """Wait for the model, load it if need be, and hold it for the length of the block.

        Raises:
            ConfigError: there is no such model. Others as the model's ``setup`` raises them.
        """
        with self._lock:
            if self._loaded is None or self._loaded[0] != name:
                self._loaded = None  # before the next is loaded, so that two are never in memory
                self._loaded = name, self._ready(name)
            ready = self._loaded[1]
            model = getattr(ready.adapter, "model", None)
            if model is None:
                yield ready
                return
            with ready.image_features.on(model):
                yield ready

    def _ready(self, name: str) -> Ready:
        from stethoscope.adapters.base import Adapter

        if name not in self.names:
            raise ConfigError(unknown("model", name, self.names))
        given = (None if self._given[0] is None else AUTO, None)
        if name == self.name:
            adapter, given = self._first, self._given
        else:
            adapter = build(compose([f"+model={name}"]).model, Adapter, "model", self._plugins)
        adapter.setup()
        return Ready(adapter, self._detectors(adapter, *given), ImageFeatureCache())

    def _detectors(self, adapter: Adapter, folder: str | None, live: str | None) -> Detectors:
        from stethoscope.detection.detector import Detector

        if folder is None and live is None:
            return Detectors(names=SWITCHED_OFF)
        folders = [*detectors_for_model(self._runs, adapter.fingerprint(), self._run), *bundled_detectors(adapter)]
        final = next(iter(folders), None) if folder == AUTO else folder and detector_folder(folder)
        if final is None:
            if live is None:
                return Detectors()
            raise ConfigError(
                f"detector.live={live} judges while an answer is written, before another detector judges all of it: "
                "name that one too, detector.folder=..."
            )
        detector = Detector.load(final)
        check_model(detector, adapter)
        if final not in folders:  # those were trained on this very model
            _check_features(detector, adapter)
        candidates = [final, *folders] if live is None else [detector_folder(live)]
        for candidate in candidates:
            quick = detector if candidate == final else Detector.load(candidate)
            delay = streaming_delay(quick)
            if delay is not None:
                check_model(quick, adapter)
                if candidate not in (final, *folders):
                    _check_features(quick, adapter)
                names = (
                    describe_origin(final)
                    if candidate == final
                    else f"{describe_origin(final)}, while writing {describe_origin(candidate)}"
                )
                return Detectors(detector, quick, delay, names)
        if live is not None:
            raise CapabilityError(f"detector.live={live} reads what is not known while an answer is written")
        return Detectors(detector, names=describe_origin(final))


def _check_features(detector: Detector, adapter: Adapter) -> None:
    """Score a word, so that a model without the detector's features is refused before the first question.

    Raises:
        CapabilityError: the model does not give them.
    """
    from PIL import Image

    diagnose(adapter, Image.new("RGB", (64, 64)), "What is this?", answer="a thing", detector=detector)


def streaming_delay(detector: Detector) -> int | None:
    """Find the ``delay`` at which a detector can score while the answer is written; None if it cannot."""
    from stethoscope.streaming.scorer import Scorer

    for delay in (0, 1):
        try:
            Scorer(detector, delay)
        except CapabilityError:
            continue
        return delay
    return None


class ImageFeatureCache:
    """LRU cache of ``get_image_features``, so that follow-up questions skip the vision encoder.

    Passes with gradients go through the vision tower all the same: relevancy of patches is read from its own maps.
    Models without such a method encode the image every time.

    Args:
        images: how many are kept.

    Attributes:
        misses: how often the vision tower ran without gradients. ``hits``: how often it did not have to.
    """

    def __init__(self, images: int = 4) -> None:
        self._features = LRUCache(images)
        self.misses = self.hits = 0

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Cache the image features of a model for the length of a block."""
        modules = [module for module in model.modules() if hasattr(type(module), "get_image_features")]
        # that of a model calls that of the model inside it, which alone is called in the forward pass
        modules = modules[-1:]
        for module in modules:
            module.get_image_features = self._cached(module.get_image_features)
        try:
            yield
        finally:
            for module in modules:
                del module.get_image_features

    def _cached(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        import torch

        @wraps(encode)  # transformers reads its signature
        def cached(*arguments: Any, **options: Any) -> Any:
            if torch.is_grad_enabled():
                return encode(*arguments, **options)
            pairs = [(name, value) for name, value in sorted(options.items()) if value is not None]
            key = _key((arguments, [pair for pair in pairs if pair[0] != "return_dict"]))
            if key in self._features:
                self.hits += 1
                features = self._features.get(key)
            else:
                self.misses += 1
                features = self._features.put(key, encode(*arguments, **options))
            return copy(features)  # beam search writes into what it is given

        return cached


def _key(value: Any) -> Hashable:
    """Make a key that equal arguments share."""
    import torch

    if isinstance(value, torch.Tensor):
        content = value.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()
        return tuple(value.shape), str(value.dtype), hashlib.sha256(content).digest()
    if isinstance(value, (list, tuple)):
        return tuple(_key(item) for item in value)
    return repr(value)
