"""``stethoscope doctor``: checks the machine and says what is missing and how to mend it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stethoscope.errors import ConfigError

if TYPE_CHECKING:
    from packaging.requirements import Requirement

USAGE = """usage: stethoscope doctor
       stethoscope doctor model=NAME [model.dtype=bfloat16] [model.quantize=4bit] [context=2048] [batch_size=1]

Without settings: checks Python, packages, extras, the device, the embedded model (one answer), W&B, offline settings,
memory, disk space, whether run directories can be made and locked here, and which runs are under way.
Every line says ok, note or FAIL; exits with 2 when something fails.

With model=... (a name of `stethoscope list model`, or model=hf model.model_id=<hub id or folder>): what that model
needs, told from its configuration alone, against what is free here, and which settings would make it fit.
context: prompt and answer in tokens, image tokens too; batch_size: prompts that generate together."""


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, ``ok``, ``note`` or ``FAIL``, and what was seen."""

    what: str
    state: str
    text: str


def main(arguments: Sequence[str]) -> None:
    """Prints every finding; raises ``ConfigError`` when one failed."""
    if any(word in ("-h", "--help") for word in arguments):
        print(USAGE)
        return
    if arguments:
        from stethoscope.commands import memory

        memory.main(arguments)
        return
    failed = 0
    for check in (_python, _packages, _extras, _device, _model, _hub, _wandb, _memory, _disk, _locks):
        for finding in check():
            print(f"{finding.state:<5} {finding.what:<16} {finding.text}", flush=True)
            failed += finding.state == "FAIL"
    if failed:
        raise ConfigError(f"{failed} of the checks failed; the lines above say what to do")


def _python() -> Iterator[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _packages() -> Iterator[Finding]:
    """Every requirement of the installed distribution against what is installed."""
    for requirement in _requirements(""):
        version, fits = _installed(requirement)
        wanted = f'pip install "{requirement.name}{requirement.specifier}"'
        text = version if fits else f"{version} does not fit; {wanted}" if version else f"missing; {wanted}"
        yield Finding(requirement.name, "ok" if fits else "FAIL", text)


def _extras() -> Iterator[Finding]:
    """What is installed only where it is wanted: which of it is there, and how to get the rest."""
    for extra in importlib.metadata.metadata("lvlm-stethoscope").get_all("Provides-Extra") or ():
        own = _requirements(extra)
        lacking = [one.name for one in own if not _installed(one)[1]]
        if extra == "dev":  # for those who work on the package
            continue
        text = f'without {", ".join(lacking)}; pip install "lvlm-stethoscope[{extra}]"' if lacking else "installed"
        yield Finding(f"extra {extra}", "note" if lacking else "ok", text)


def _requirements(extra: str) -> list[Requirement]:
    """What the package needs, or what one of its extras needs besides."""
    from packaging.requirements import Requirement

    found = map(Requirement, importlib.metadata.requires("lvlm-stethoscope") or ())
    always = {"extra": ""}
    return [
        one
        for one in found
        if (one.marker is None or one.marker.evaluate(always)) != bool(extra)
        and (not extra or one.marker.evaluate({"extra": extra}))
    ]


def _installed(requirement: Requirement) -> tuple[str, bool]:
    """Version of a package that is installed, empty if none is, and whether it is one that is wanted."""
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return "", False
    return version, requirement.specifier.contains(version, prereleases=True)


def _device() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            memory = torch.cuda.get_device_properties(index).total_memory / 2**30
            yield Finding(f"cuda:{index}", "ok", f"{torch.cuda.get_device_name(index)}, {memory:.0f} GiB")
    else:
        yield Finding("device", "note", f"no GPU; {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads")


def _attempt(what: str, look: Callable[[], str], advice: str) -> Finding:
    """``ok`` with what ``look`` returns, or ``FAIL`` with its error and the advice."""
    try:
        return Finding(what, "ok", look())
    except Exception as error:  # the doctor reports every kind of failure as a line instead of dying of it
        reason = re.sub(r"\s+", " ", str(error))[:200]
        return Finding(what, "FAIL", f"{type(error).__name__}: {reason}; {advice}")


def _model() -> Iterator[Finding]:
    def look() -> str:
        import stethoscope
        from stethoscope import testbed
        from stethoscope.records import Generation

        adapter, scene = stethoscope.load("testbed"), testbed.scenes(1)[0]
        encoded = adapter.encode(scene.image(), f"Is there a {scene.visible[0]} in the image?")
        return f"answers {adapter.generate([encoded], Generation(max_new_tokens=8))[0].text.strip()!r}"

    yield _attempt("embedded model", look, "reinstall the package: its weights are part of it")


def _hub() -> Iterator[Finding]:
    offline = os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")
    text = "offline (HF_HUB_OFFLINE); only models already in the cache load" if offline else "may download models"
    yield Finding("hub", "note", text)


def _wandb() -> Iterator[Finding]:
    signed_in = bool(os.environ.get("WANDB_API_KEY")) or "api.wandb.ai" in _netrc()
    text = "signed in" if signed_in else "not signed in: runs stay offline; `wandb login`, then logger.mode=online"
    yield Finding("wandb", "ok" if signed_in else "note", text)


def _netrc() -> str:
    path = os.path.expanduser(os.environ.get("NETRC", "~/.netrc"))
    if not os.path.exists(path):
        return ""
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def _memory() -> Iterator[Finding]:
    from stethoscope.commands import memory

    free = memory.free()[-1].free / 2**30
    text = f"{free:.0f} GiB free" if free > 2 else f"{free:.1f} GiB free; the embedded model takes up to 1"
    yield Finding("memory", "ok" if free > 2 else "note", text)


def _disk() -> Iterator[Finding]:
    free = shutil.disk_usage(os.getcwd()).free / 2**30
    yield Finding("disk", "ok" if free > 2 else "note", f"{free:.0f} GiB free here")
    if sys.flags.utf8_mode == 0 and (sys.stdout.encoding or "").lower().replace("-", "") != "utf8":
        yield Finding("terminal", "note", f"encoding {sys.stdout.encoding}; set PYTHONUTF8=1 for tables with accents")


def _locks() -> Iterator[Finding]:
    """Whether a run directory can be made and locked here, and which of those in ``runs`` are in use."""
    from stethoscope.errors import StethoscopeError
    from stethoscope.runs.lock import RunLock

    def look() -> str:
        with tempfile.TemporaryDirectory(dir=os.getcwd(), prefix=".doctor-") as folder, RunLock(Path(folder) / "run"):
            return "run directories can be made and locked here"

    yield _attempt("run directory", look, "work in a folder that can be written to, on a disk that knows locks")
    for file in sorted(Path("runs").glob("*/.lock")):
        try:
            with RunLock(file.parent):
                pass
        except StethoscopeError as error:
            yield Finding(file.parent.name, "note", str(error))
