"""Implement ``stethoscope diagnose``: one picture, one question, and everything about the answer."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from stethoscope.adapters.base import Adapter, check_history
from stethoscope.commands.common import build_generation, require_model
from stethoscope.core.component import build
from stethoscope.core.errors import CapabilityError, ConfigError
from stethoscope.core.files import atomic_write, check_out, read_json, write_json, writing_out
from stethoscope.core.text import console, counted, percent, visible
from stethoscope.core.types import ImageRef
from stethoscope.diagnosis import diagnose
from stethoscope.diagnosis.render import VISUAL_EVIDENCE_NOTE, describe_reply, describe_visual_evidence
from stethoscope.diagnosis.viewer_parts import describe_edit

if TYPE_CHECKING:
    from rich.text import Text

    from stethoscope.diagnosis import Diagnosis
    from stethoscope.diagnosis.answer_verdicts import DiagnosedMention

HEAT_MAPS = "heatmaps"
MEANING = {
    "calibrated": "probability of hallucination {} or more",
    "shifted": "score {} or more; no probability, because the detector is not calibrated for this picture or question",
    "unknown": "score {} or more; the detector has no monitor to tell whether it is calibrated for this picture",
}
"""What a warning says, by ``Diagnosis.calibration``."""
OUTCOMES = ("caught", "missed", "false alarm", "hallucinated")  # the last without a detector
MOST = 5  # mentions that are explained in the terminal


def run(config: DictConfig) -> None:
    """Diagnose, print and write an answer.

    Errors of the configuration are raised before the model is loaded.
    """
    from hydra.core.hydra_config import HydraConfig

    from stethoscope.detection.detector import Detector
    from stethoscope.detection.lookup import AUTO, bundled_detectors, detector_folder, parse_setting
    from stethoscope.tasks.extraction import load_extraction

    if not str(config.question or "").strip():
        raise ConfigError("question is empty; the usual one is 'Please describe this image in detail.'")
    extraction = load_extraction(config.extraction, config.plugins)
    history = [] if config.history is None else read_history(Path(str(config.history)).expanduser())
    image, truth = _image(config)
    picture = image.load()
    setting = parse_setting(config.detector.folder)
    adapter = build(config.model, Adapter, "model", config.plugins)
    require_model(adapter, "diagnose")
    check_out(config.out)
    if setting == AUTO:
        adapter.setup()
        folders = bundled_detectors(adapter)
    else:  # checked before the model is loaded
        folders = [] if setting is None else [detector_folder(setting)]
    detector = Detector.load(folders[0]) if folders else None
    generation = build_generation(config, config.plugins)
    diagnosis = diagnose(
        adapter,
        picture,
        str(config.question),
        None if config.answer is None else str(config.answer),
        detector,
        scope=config.scope,
        generation=generation,
        extraction=extraction,
        asks=str(config.asks),
        truth=truth,
        history=history,
    )
    method = "" if generation.mitigation is None or config.answer is not None else generation.mitigation.name
    show(diagnosis, image.name, method)
    print(f"\n{_origin(setting, folders, str(HydraConfig.get().runtime.choices.model))}")
    for path in write(diagnosis, Path(config.out)):
        print(f"wrote {path}")


def _image(config: DictConfig) -> tuple[ImageRef, tuple[str, ...] | None]:
    """Return the picture to diagnose, and of a rendered scene the objects that it shows."""
    if config.image is not None:
        path = Path(str(config.image)).expanduser()
        return ImageRef(path.name, path), None
    from stethoscope import testbed

    scene = testbed.scenes(int(config.seed) + 1)[-1]
    return ImageRef(f"{scene.id}.png (rendered)", scene.image), scene.visible


def read_history(path: Path) -> list[Any]:
    """Read earlier turns of a conversation, the oldest first.

    Args:
        path: of a JSON file: a list of pairs, or of objects with ``question`` and ``answer``, or the ``diagnosis.json``
            of the last turn, with those before it.

    Raises:
        ArtefactError: the file is missing, or no JSON.
        ConfigError: it holds something else.
    """
    content = read_json(path, kind=object)
    turns = [*content.get("history", []), content] if isinstance(content, dict) else content
    if isinstance(turns, list):
        turns = [[turn.get("question"), turn.get("answer")] if isinstance(turn, dict) else turn for turn in turns]
    try:
        return [*check_history(turns)]
    except ConfigError as error:
        raise ConfigError(f"history={path}: {error}") from None


def _origin(setting: str | None, folders: list[Path], model: str) -> str:
    """Describe where the detector came from, or why there is none."""
    from stethoscope.detection.lookup import AUTO, SWITCHED_OFF, TRAIN_ONE, describe_origin

    if setting is None:
        return SWITCHED_OFF
    if not folders:
        return f"{TRAIN_ONE.format(model=model)}; then add detector=runs/benchmark-{model}"
    return f"detector: {describe_origin(folders[0])}" + (" (detector=none switches it off)" if setting == AUTO else "")


def show(diagnosis: Diagnosis, name: str, method: str = "") -> None:
    """Print the answer coloured by its warnings, and the reasons for every doubtful object.

    Args:
        diagnosis: of the answer.
        name: of the picture.
        method: name of the mitigation that the answer was written with; empty for none.
    """
    terminal = console()
    turn = f" (turn {len(diagnosis.history) + 1})" if diagnosis.history else ""
    title = f"{diagnosis.model} on {name}: {diagnosis.question}{turn}" + (f" (mitigation={method})" if method else "")
    lines: list[str | Text] = [title, "", answer_text(diagnosis), ""]
    warned = [mention for mention in diagnosis.mentions if mention.warned]
    if not diagnosis.mentions:
        lines.append(describe_reply(diagnosis))
    elif diagnosis.threshold is not None:
        lines.append(
            f"warned of {len(warned)} of {counted(len(diagnosis.mentions), 'mention')} "
            f"({MEANING[diagnosis.calibration].format(percent(diagnosis.threshold))})"
        )
    lines += [*_truth(diagnosis), *describe_edit(diagnosis.edit, diagnosis.answer.text, diagnosis.truth)]
    explained = warned if diagnosis.threshold is not None else diagnosis.mentions
    for mention in explained[:MOST]:
        lines += [f"  {line}" for line in _reasons(diagnosis, mention)]
    if len(explained) > MOST:
        lines.append(f"  and {len(explained) - MOST} more, all of them in report.html")
    lines += ["", diagnosis.shift] if diagnosis.shift else []
    lines += _visual_evidence(diagnosis)
    lines += [f"not shown: {note}" for note in diagnosis.notes]
    seconds = ", ".join(f"{stage} {value:.2f}" for stage, value in diagnosis.seconds.items() if value >= 0.005)
    lines += ["", f"{sum(diagnosis.seconds.values()):.2f} s ({seconds})"]
    for line in lines:
        terminal.print(line, markup=False, highlight=False, soft_wrap=isinstance(line, str))


def answer_text(diagnosis: Diagnosis) -> Text:
    """Colour the answer: the more doubtful an object, the redder.

    Without a detector, tokens are coloured by their improbability.

    Warned mentions are followed by their probability, so that they can be seen without colour.
    """
    from rich.text import Text

    text, result, position = diagnosis.answer.text, Text(), 0
    for start, end, style, note in _spans(diagnosis):
        if start >= position:
            result.append(visible(text[position:start])).append(visible(text[start:end]), style).append(
                note, "bold red"
            )
            position = end
    return result.append(visible(text[position:]))


def _spans(diagnosis: Diagnosis) -> Iterator[tuple[int, int, str, str]]:
    """Yield start, end and style of coloured spans, and the note behind each."""
    if diagnosis.threshold is None:
        for (start, end), probability in zip(diagnosis.answer.offsets, diagnosis.token_probability, strict=True):
            start += len(diagnosis.answer.text[start:end]) - len(diagnosis.answer.text[start:end].lstrip())
            shade = round(255 - 130 * (1 - probability))
            if probability < 0.9 and start < end:
                yield start, end, f"black on rgb({shade},{shade},255)", ""
        return
    for mention in diagnosis.mentions:
        if mention.verdict is not None:
            value = mention.verdict.probability
            shade, weight = round(255 - 200 * value), "bold " if mention.warned else ""
            note = f" [{percent(value)}]" if mention.warned else ""
            yield mention.start, mention.end, f"{weight}black on rgb(255,{shade},{shade})", note


def _truth(diagnosis: Diagnosis) -> Iterator[str]:
    """Yield lines about what the picture shows, and which mentions are hallucinated, where that is known."""
    if diagnosis.truth is None:
        return
    yield f"the truth: the picture shows {', '.join(sorted(diagnosis.truth)) or 'none of the objects'}"
    outcomes: dict[str, list[str]] = defaultdict(list)
    for mention in diagnosis.mentions:
        outcome = mention.outcome or ("hallucinated" if mention.label == 1 else "")
        if outcome not in ("", "right"):
            outcomes[outcome].append(mention.object)
    parts = [f"{name}: {', '.join(dict.fromkeys(outcomes[name]))}" for name in OUTCOMES if outcomes[name]]
    if diagnosis.mentions:
        yield f"  {'; '.join(parts) or 'nothing is hallucinated, and nothing is warned of'}"


def _reasons(diagnosis: Diagnosis, mention: DiagnosedMention) -> Iterator[str]:
    """Yield lines about one mention: how doubtful it is, why, and where in the picture it came from."""
    first = f"{mention.object}:"
    verdict = mention.verdict
    if verdict is not None:
        name = {"calibrated": "hallucinated", "shifted": "(not calibrated)", "unknown": "(score)"}[
            diagnosis.calibration
        ]
        first += f" {percent(verdict.probability)} {name}"
        first += f" ({mention.outcome})" if mention.outcome else ""
        if verdict.evidence is not None:
            first += f", evidence {verdict.evidence:+.2f} against prior {verdict.prior:+.2f} (log-odds)"
    elif mention.tokens:
        first += f" token probability {percent(diagnosis.token_probability[mention.tokens[0]])}"
    yield first
    if verdict is not None and verdict.top:
        yield "  features: " + ", ".join(f"{name} {push:+.2f}" for name, push in verdict.top[:3])
    if not mention.tokens:
        return
    try:
        regions = diagnosis.regions(mention.tokens[0])
    except CapabilityError:
        return
    share = diagnosis.shares["image"][mention.tokens[0], -1]
    boxes = ", ".join(f"{_describe_box(box, diagnosis.image.size)} ({percent(value)} of it)" for box, value in regions)
    yield f"  picture: {percent(share)} of the relevancy, strongest at {boxes}"


def _visual_evidence(diagnosis: Diagnosis) -> list[str]:
    """Write lines about what the image evidence of every mention resembles; none where no detector knows."""
    verdicts = [(mention.object, mention.verdict) for mention in diagnosis.mentions if mention.verdict is not None]
    lines = [
        f"  {name}: looks like {describe_visual_evidence(verdict.visual_evidence)}"
        for name, verdict in verdicts
        if verdict.visual_evidence
    ]
    return ["", *dict.fromkeys(lines), VISUAL_EVIDENCE_NOTE] if lines else []


def _describe_box(box: tuple[float, ...], size: tuple[int, int]) -> str:
    """Describe a box in words and pixels.

    >>> _describe_box((0, 0, 12, 12), (96, 96))
    'top left x 0-12 y 0-12'
    """
    left, top, right, bottom = box
    across, down = int(1.5 * (left + right) / size[0]), int(1.5 * (top + bottom) / size[1])
    terms = [("top", "", "bottom")[min(down, 2)], ("left", "", "right")[min(across, 2)]]
    name = " ".join(term for term in terms if term) or "middle"
    return f"{name} x {left:.0f}-{right:.0f} y {top:.0f}-{bottom:.0f}"


def write(diagnosis: Diagnosis, folder: Path) -> list[Path]:
    """Write ``diagnosis.json``, ``report.html`` and a heat map per mention; return the files.

    Raises:
        ConfigError: the folder cannot be written to.
    """
    maps = folder / HEAT_MAPS
    with writing_out(folder):
        maps.mkdir(parents=True, exist_ok=True)
        for old in maps.glob("token-*.png"):  # of an earlier diagnosis
            old.unlink()
        data, page = folder / "diagnosis.json", folder / "report.html"
        write_json(data, diagnosis.to_dict())
        atomic_write(page, diagnosis.to_html())
        written = [data, page]
        for mention in diagnosis.mentions if diagnosis.relevancy is not None else ():
            name = re.sub(r"[^a-z0-9]+", "-", mention.object.lower()).strip("-")[:60]
            for token in mention.tokens[:1]:
                path = maps / f"token-{token:03d}-{name}.png"
                diagnosis.picture(token).save(path)
                written.append(path)
    return written
