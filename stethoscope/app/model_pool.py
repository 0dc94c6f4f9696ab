"""Share models and detectors between the users of one server; one user at a time has the model."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.adapters.base import Adapter
from stethoscope.core.cache import LRUCache
from stethoscope.core.component import build, choices, compose
from stethoscope.core.errors import CapabilityError, ConfigError, unknown
from stethoscope.core.files import files_state
from stethoscope.detection.artifact import MANIFEST
from stethoscope.detection.lookup import (
    AUTO,
    SWITCHED_OFF,
    TRAIN_ONE,
    bundled_detectors,
    check_model,
    describe_origin,
    detector_folder,
    detectors_for_model,
    parse_setting,
)
from stethoscope.diagnosis import diagnose
from stethoscope.mitigation.base import Mitigation
from stethoscope.testbed import DETECTOR_DIR

if TYPE_CHECKING:
    from torch import nn

    from stethoscope.detection.detector import Detector

BUNDLED = "the embedded model's"
"""Name of the detector that comes with the embedded model, among those to choose from."""
NO_DETECTOR = f"{TRAIN_ONE}; then start the app again. Tokens are coloured by how improbable they are."


@dataclass(frozen=True)
class Detectors:
    """Detectors for the answers of one model.

    Attributes:
        final: scores the complete answer; None for no warnings.
        live: scores tokens while the answer is generated; None if no detector can.
        delay: of ``live``, as in ``stethoscope.stream``.
        origin: where the detectors come from, or that they are switched off, to be shown to the user.
        folder: of ``final``; None without it.
    """

    final: Detector | None = None
    live: Detector | None = None
    delay: int = 0
    origin: str = ""
    folder: Path | None = None


@dataclass(frozen=True)
class Ready:
    """A loaded model with its detectors.

    Attributes:
        adapter: the model, set up.
        detectors: for its answers.
        image_features: cache of the features of earlier pictures.
        chosen: other detectors that users have chosen for it, by name, with the state of their files.
        squared: the model with other ways to bring pictures to a square, by the names of ``Adapter.with_square``.
    """

    adapter: Adapter
    detectors: Detectors
    image_features: ImageFeatureCache
    chosen: dict[str, tuple[str, Detectors]] = field(default_factory=dict)
    squared: dict[str, Adapter] = field(default_factory=dict)

    def with_square(self, square: str) -> Ready:
        """Return the model with another way to bring pictures to a square; ``own`` for its own.

        Raises:
            ConfigError, CapabilityError: see ``Adapter.with_square``.
        """
        if square in ("own", getattr(self.adapter, "square", "own")):
            return self
        if square not in self.squared:
            self.squared[square] = self.adapter.with_square(square)
        return replace(self, adapter=self.squared[square])


class ModelPool:
    """Models by name, loaded on first use; only one is in memory at a time, because models can be large.

    Args:
        adapter: the first model, not set up, or else its weights stay in memory beside those of other models.
        name: of the first model, one of ``conf/model`` or of the user's own configuration.
        detector: folder of a detector for the first model, or of a run that has one; ``auto`` for the newest in
            ``runs`` that was trained on exactly this model, or else the bundled one; None or ``none`` for no warnings.
        live: the same for a detector that scores while the answer is generated.
        runs: folder of run directories, in which detectors are searched for.
        run: a run directory to be searched first.
        plugins: packages from which models may be built.
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
        self._first, self._plugins = adapter, plugins
        self._first_folders: tuple[str | None, str | None] = (parse_setting(detector), live)
        self._lock = threading.Lock()
        self._loaded: tuple[str, Ready] | None = None

    @property
    def names(self) -> list[str]:
        """List the models to choose from; the first model comes first."""
        return list(dict.fromkeys([self.name, *(name for name in choices("model") if name not in ("hf", "none"))]))

    @property
    def detector_names(self) -> list[str]:
        """List the detectors to choose from: the automatic one, none, the bundled one, and those of runs."""
        files = self._runs.glob(f"*/detector/{MANIFEST}")
        return [AUTO, "none", BUNDLED, *sorted(file.parent.parent.name for file in files)]

    def detectors(self, ready: Ready, name: str) -> Detectors:
        """Load the detectors that a user has chosen for a model.

        Args:
            ready: the model.
            name: one of ``detector_names``.

        Raises:
            ConfigError: there is no such detector, or it reads states of another model.
            CapabilityError: it reads features that the model does not provide.
            ArtefactError: it is damaged.
        """
        if name == AUTO:
            return ready.detectors
        if name not in self.detector_names:  # a name, never a path
            raise ConfigError(unknown("detector", name, self.detector_names))
        folder = DETECTOR_DIR if name == BUNDLED else self._runs / name
        state = "" if name == "none" else files_state(sorted(detector_folder(str(folder)).iterdir()))
        if name not in ready.chosen or ready.chosen[name][0] != state:  # a run's detector may be replaced
            loaded = self._load_detectors(ready.adapter, None if name == "none" else str(folder), None)
            ready.chosen[name] = state, loaded
        return ready.chosen[name][1]

    def mitigation(self, name: str, detectors: Detectors) -> Mitigation | None:
        """Build a mitigation by its name; None for ``none``.

        Args:
            name: one of ``conf/mitigation``.
            detectors: whose final one judges, where the mitigation reads a detector.

        Raises:
            ConfigError: there is no such mitigation, or it needs a detector and there is none.
        """
        if name not in choices("mitigation"):
            raise ConfigError(unknown("mitigation", name, choices("mitigation")))
        if name == "none":
            return None
        overrides = [f"+mitigation={name}"]
        node = compose(overrides).mitigation
        if "detector" in node and detectors.folder is not None:
            node.detector = str(detectors.folder)
        return build(node, Mitigation, "mitigation", self._plugins)

    @property
    def busy(self) -> bool:
        """Tell whether a user has the model now."""
        return self._lock.locked()

    @contextmanager
    def use(self, name: str) -> Iterator[Ready]:
        """Wait for the model, load it if necessary, and lock it inside the ``with`` block.

        Raises:
            ConfigError: there is no such model.
            StethoscopeError: the model or its detectors cannot be loaded.
        """
        with self._lock:
            if self._loaded is None or self._loaded[0] != name:
                self._loaded = None  # frees the old model before the new one is loaded
                self._loaded = name, self._load(name)
            ready = self._loaded[1]
            model = getattr(ready.adapter, "model", None)
            if model is None:
                yield ready
                return
            with ready.image_features.attached_to(model):
                yield ready

    def _load(self, name: str) -> Ready:
        if name not in self.names:
            raise ConfigError(unknown("model", name, self.names))
        folder, live = self._first_folders
        if name == self.name:
            adapter = copy(self._first)  # whose weights go with the copy when another model is loaded
        else:
            folder, live = None if folder is None else AUTO, None
            adapter = build(compose([f"+model={name}"]).model, Adapter, "model", self._plugins)
        adapter.setup()
        return Ready(adapter, self._load_detectors(adapter, folder, live), ImageFeatureCache())

    def _load_detectors(self, adapter: Adapter, folder: str | None, live: str | None) -> Detectors:
        """Load the detector of complete answers, and the first one that can score during generation.

        Args:
            adapter: the model, set up.
            folder: of the former, or ``AUTO``; None for none.
            live: folder of the latter; None to search for one.
        """
        from stethoscope.detection.detector import Detector
        from stethoscope.streaming.scorer import smallest_delay

        if folder is None and live is None:
            return Detectors(origin=SWITCHED_OFF)
        folders = [*detectors_for_model(self._runs, adapter.fingerprint(), self._run), *bundled_detectors(adapter)]
        final = next(iter(folders), None)
        if folder != AUTO:
            final = None if folder is None else detector_folder(folder)
        if final is None:
            if live is None:
                return Detectors()
            raise ConfigError(
                f"detector.live={live} judges while an answer is written, before another detector judges all of it: "
                "name that one too, detector.folder=..."
            )
        detector = Detector.load(final)
        check_model(detector, adapter)
        if final not in folders:  # the others were trained on exactly this model
            _check_features(detector, adapter)
        candidates = [final, *folders] if live is None else [detector_folder(live)]
        for candidate in candidates:
            live_detector = detector if candidate == final else Detector.load(candidate)
            delay = smallest_delay(live_detector)
            if delay is not None:
                check_model(live_detector, adapter)
                if candidate not in (final, *folders):
                    _check_features(live_detector, adapter)
                origin = describe_origin(final)
                if candidate != final:
                    origin += f"; while the answer is written, {describe_origin(candidate)}"
                return Detectors(detector, live_detector, delay, origin, final)
        if live is not None:
            raise CapabilityError(f"detector.live={live} reads what is not known while an answer is written")
        return Detectors(detector, origin=describe_origin(final), folder=final)


def _check_features(detector: Detector, adapter: Adapter) -> None:
    """Diagnose a short text, so that a detector that does not fit fails before the first question.

    Raises:
        CapabilityError: the model does not provide the detector's features.
    """
    from PIL import Image

    diagnose(adapter, Image.new("RGB", (64, 64)), "What is this?", answer="a thing", detector=detector)


class ImageFeatureCache:
    """LRU cache of ``get_image_features``, so that follow-up questions skip the vision encoder.

    Passes with gradients always run the vision tower, because the relevancy of patches needs its attention maps.
    Models without this method encode the image every time.

    Args:
        images: number of images in the cache.

    Attributes:
        misses: number of passes without gradients that ran the vision tower.
        hits: number of passes that were answered from the cache.
    """

    def __init__(self, images: int = 4) -> None:
        self._features = LRUCache(images)
        self.misses = self.hits = 0

    @contextmanager
    def attached_to(self, model: nn.Module) -> Iterator[None]:
        """Cache the image features of a model inside the ``with`` block."""
        modules = [module for module in model.modules() if hasattr(type(module), "get_image_features")]
        if not modules:
            yield
            return
        module: Any = modules[-1]  # the innermost model's method is the one that the forward pass calls
        module.get_image_features = self._cached(module.get_image_features)
        try:
            yield
        finally:
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
            return copy(features)  # beam search changes the output in place

        return cached


def _key(value: Any) -> Hashable:
    """Make a hashable key that is equal for equal arguments."""
    import torch

    if isinstance(value, torch.Tensor):
        content = value.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()
        return tuple(value.shape), str(value.dtype), hashlib.sha256(content).digest()
    if isinstance(value, (list, tuple)):
        return tuple(_key(item) for item in value)
    return repr(value)
