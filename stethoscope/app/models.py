"""Models and detectors that the users of one server share: one user has a model at a time, the others wait."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stethoscope.app.eyes import Eyes
from stethoscope.core.component import build, choices, compose
from stethoscope.core.errors import CapabilityError, ConfigError, unknown
from stethoscope.detection.finding import (
    AUTO,
    SWITCHED_OFF,
    called,
    check_model,
    detector_folder,
    shipped,
    trained,
    wanted,
)
from stethoscope.diagnosis import diagnose

if TYPE_CHECKING:
    from stethoscope.adapters.base import Adapter
    from stethoscope.detector import Detector

TRAIN_ONE = (
    "No detector of this model was found, so there are no warnings: tokens are coloured by how improbable they are. "
    "`stethoscope benchmark model={model}` trains one; then start the app again."
)


@dataclass(frozen=True)
class Detectors:
    """What judges the answers of one model.

    Attributes:
        final: judges the finished answer; None for no warnings.
        live: judges tokens while the answer is written; None where none can. ``delay`` of ``stethoscope.stream``.
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
    eyes: Eyes


class Pool:
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
        self._first, self._given, self._plugins = adapter, (wanted(detector), live), plugins
        self._lock = threading.Lock()
        self._loaded: tuple[str, Ready] | None = None

    @property
    def names(self) -> list[str]:
        """Models to choose from, the one to begin with first."""
        return list(dict.fromkeys([self.name, *(name for name in choices("model") if name != "hf")]))

    @property
    def busy(self) -> bool:
        return self._lock.locked()

    @contextmanager
    def use(self, name: str) -> Iterator[Ready]:
        """Waits for the model, loads it if need be, and has it for the length of the block.

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
            with ready.eyes.on(model):
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
        return Ready(adapter, self._detectors(adapter, *given), Eyes())

    def _detectors(self, adapter: Adapter, folder: str | None, live: str | None) -> Detectors:
        from stethoscope.detector import Detector

        if folder is None and live is None:
            return Detectors(names=SWITCHED_OFF)
        found = [*trained(self._runs, adapter.fingerprint(), self._run), *shipped(adapter)]
        final = next(iter(found), None) if folder == AUTO else folder and detector_folder(folder)
        if final is None:
            if live is None:
                return Detectors()
            raise ConfigError(
                f"detector.live={live} judges while an answer is written, before another detector judges all of it: "
                "name that one too, detector.folder=..."
            )
        detector = Detector.load(final)
        check_model(detector, adapter)
        if final not in found:  # those were trained on this very model
            _try(detector, adapter)
        candidates = [final, *found] if live is None else [detector_folder(live)]
        for one in candidates:
            quick = detector if one == final else Detector.load(one)
            delay = streaming_delay(quick)
            if delay is not None:
                check_model(quick, adapter)
                if one not in (final, *found):
                    _try(quick, adapter)
                names = called(final) if one == final else f"{called(final)}, while writing {called(one)}"
                return Detectors(detector, quick, delay, names)
        if live is not None:
            raise CapabilityError(f"detector.live={live} reads what is not known while an answer is written")
        return Detectors(detector, names=called(final))


def _try(detector: Detector, adapter: Adapter) -> None:
    """Judges a word, so that a model without the detector's features is told before the first question.

    Raises:
        CapabilityError: the model does not give them.
    """
    from PIL import Image

    diagnose(adapter, Image.new("RGB", (64, 64)), "What is this?", answer="a thing", detector=detector)


def streaming_delay(detector: Detector) -> int | None:
    """The ``delay`` at which a detector can judge while the answer is written; None if it cannot."""
    from stethoscope.streaming.scorer import Scorer

    for delay in (0, 1):
        try:
            Scorer(detector, delay)
        except CapabilityError:
            continue
        return delay
    return None
