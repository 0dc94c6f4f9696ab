"""``stethoscope doctor``: checks the machine and says what is missing and how to mend it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from stethoscope.errors import ConfigError

USAGE = """usage: stethoscope doctor
       stethoscope doctor model=NAME [model.dtype=bfloat16] [model.quantize=4bit] [context=2048] [batch_size=1]

Without settings: checks Python, the packages and their versions, the device, the embedded model (one answer), W&B,
offline settings and disk space. Every line says ok, note or FAIL; exits with 2 when something fails.

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
    for check in (_python, _packages, _device, _model, _hub, _wandb, _disk):
        for finding in check():
            print(f"{finding.state:<5} {finding.what:<16} {finding.text}", flush=True)
            failed += finding.state == "FAIL"
    if failed:
        raise ConfigError(f"{failed} of the checks failed; the lines above say what to do")


def _python() -> Iterator[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _packages() -> Iterator[Finding]:
    """Every requirement of the installed distribution against what is installed."""
    from packaging.requirements import Requirement

    for line in importlib.metadata.requires("lvlm-stethoscope") or ():
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(requirement.name, "FAIL", f'missing; pip install "{requirement}"')
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        text = version if fits else f'{version} does not fit; pip install "{requirement}"'
        yield Finding(requirement.name, "ok" if fits else "FAIL", text)


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


def _disk() -> Iterator[Finding]:
    free = shutil.disk_usage(os.getcwd()).free / 2**30
    yield Finding("disk", "ok" if free > 2 else "note", f"{free:.0f} GiB free here")
    if sys.flags.utf8_mode == 0 and (sys.stdout.encoding or "").lower().replace("-", "") != "utf8":
        yield Finding("terminal", "note", f"encoding {sys.stdout.encoding}; set PYTHONUTF8=1 for tables with accents")
