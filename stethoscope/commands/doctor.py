"""Implement ``stethoscope doctor``: check the machine, and say what is missing and how to fix it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from stethoscope.core.errors import CapabilityError, ConfigError, StethoscopeError

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from packaging.requirements import Requirement

    from stethoscope.adapters.base import Adapter
    from stethoscope.core.types import Memory

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
    """One line of the report: what was checked, ``ok``, ``note`` or ``FAIL``, and the result."""

    what: str
    state: str
    text: str


def main(arguments: Sequence[str]) -> None:
    """Print every finding.

    Raises:
        ConfigError: a check failed.
    """
    if arguments:
        check_model(arguments)
        return
    failed = 0
    for check in (_installation, _device, _model, _network, _resources, _locks):
        for finding in check():
            print(f"{finding.state:<5} {finding.what:<16} {finding.text}", flush=True)
            failed += finding.state == "FAIL"
    if failed:
        raise ConfigError(f"{failed} of the checks failed; the lines above say what to do")


def _installation() -> Iterator[Finding]:
    """Check Python, every requirement of the installed distribution, and which extras are installed."""
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for requirement in _requirements(""):
        version, fits = _installed(requirement)
        remedy = f'pip install "{requirement.name}{requirement.specifier}"'
        text = version if fits else f"{version} does not fit; {remedy}" if version else f"missing; {remedy}"
        yield Finding(requirement.name, "ok" if fits else "FAIL", text)
    for extra in importlib.metadata.metadata("lvlm-stethoscope").get_all("Provides-Extra") or ():
        if extra == "dev":  # for developers of the package
            continue
        lacking = [requirement.name for requirement in _requirements(extra) if not _installed(requirement)[1]]
        text = f'without {", ".join(lacking)}; pip install "lvlm-stethoscope[{extra}]"' if lacking else "installed"
        yield Finding(f"extra {extra}", "note" if lacking else "ok", text)


def _requirements(extra: str) -> list[Requirement]:
    """List the requirements of the package, or the additional ones of an extra."""
    from packaging.requirements import Requirement

    def applies(requirement: Requirement, extra: str) -> bool:
        return requirement.marker is None or requirement.marker.evaluate({"extra": extra})

    requirements = [Requirement(line) for line in importlib.metadata.requires("lvlm-stethoscope") or ()]
    if not extra:
        return [requirement for requirement in requirements if applies(requirement, "")]
    return [requirement for requirement in requirements if applies(requirement, extra) and not applies(requirement, "")]


def _installed(requirement: Requirement) -> tuple[str, bool]:
    """Return the installed version of a package, and whether it satisfies the requirement.

    The version is empty if the package is not installed.
    """
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
    except Exception as error:  # every failure is reported as a line
        reason = re.sub(r"\s+", " ", str(error))[:200]
        return Finding(what, "FAIL", f"{type(error).__name__}: {reason}; {advice}")


def _model() -> Iterator[Finding]:
    def look() -> str:
        import stethoscope
        from stethoscope import testbed
        from stethoscope.core.types import Generation

        adapter, scene = stethoscope.load("testbed"), testbed.scenes(1)[0]
        encoded = adapter.encode(scene.image(), f"Is there a {scene.visible[0]} in the image?")
        return f"answers {adapter.generate([encoded], Generation(max_new_tokens=8))[0].text.strip()!r}"

    yield _attempt("embedded model", look, "reinstall the package: its weights are part of it")


def _network() -> Iterator[Finding]:
    """Check whether models may be downloaded, and whether W&B knows the user."""
    offline = os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")
    text = "offline (HF_HUB_OFFLINE); only models already in the cache load" if offline else "may download models"
    yield Finding("hub", "note", text)
    try:
        netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser().read_text("utf-8", errors="replace")
    except (OSError, RuntimeError):  # there is none, or no home
        netrc = ""
    signed_in = bool(os.environ.get("WANDB_API_KEY")) or "api.wandb.ai" in netrc
    text = "signed in" if signed_in else "not signed in: runs stay offline; `wandb login`, then logger.mode=online"
    yield Finding("wandb", "ok" if signed_in else "note", text)


def _resources() -> Iterator[Finding]:
    """Check free memory and disk space, and whether the terminal shows accents."""
    free = free_memory_by_device()[-1].free / 2**30
    text = f"{free:.0f} GiB free" if free > 2 else f"{free:.1f} GiB free; the embedded model takes up to 1"
    yield Finding("memory", "ok" if free > 2 else "note", text)
    free = shutil.disk_usage(os.getcwd()).free / 2**30
    yield Finding("disk", "ok" if free > 2 else "note", f"{free:.0f} GiB free here")
    if sys.flags.utf8_mode == 0 and (sys.stdout.encoding or "").lower().replace("-", "") != "utf8":
        yield Finding("terminal", "note", f"encoding {sys.stdout.encoding}; set PYTHONUTF8=1 for tables with accents")


def _locks() -> Iterator[Finding]:
    """Check whether a run directory can be created and locked here, and which ones in ``runs`` are in use."""
    from stethoscope.storage.lock import RunLock

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


# --- what a model needs -----------------------------------------------------------------------------------------------

_SLACK = 1.1
"""Factor for memory that is not counted: fragmentation, buffers, the driver's context."""

_SMALLER = (
    {"dtype": "bfloat16"},
    {"quantize": "8bit"},
    {"quantize": "4bit"},
    {"quantize": "4bit", "dtype": "bfloat16"},
)
"""Settings to suggest where the model does not fit."""

_FEWER = (8, 1)
"""Batch sizes to suggest."""


class DeviceMemory(NamedTuple):
    """Free bytes of a device."""

    name: str
    free: int


def check_model(arguments: Sequence[str]) -> None:
    """Print what the model of ``model=...`` needs, what is free, and whether it fits.

    Raises:
        ConfigError: a setting is wrong, or the model has no configuration to read.
        CapabilityError: the adapter cannot estimate its memory.
    """
    config = _compose(arguments)
    adapter, devices = _adapter(config), free_memory_by_device()
    try:
        need = adapter.memory(config.context, config.batch_size, config.new_tokens)
    except ConfigError as error:
        model_id = config.model.get("model_id")
        print(f"note  {adapter.name}: nothing to count. {error}")
        print(
            f"      The configuration of a model is all that is read. Fetch it once where there is a network "
            f"(`hf download {model_id} config.json`), or give the folder of the model as model.model_id."
        )
        return
    print(_table(adapter.name, need, config, devices))
    if need.shipped:
        print("from the sizes that come with this package: the model's own config.json is not in the cache")
    shares = adapter.can_share_prefixes()
    print(f"reads a picture {'once for all questions about it in a row' if shares else 'again for every question'}")
    print(f"relevancy {'goes back through generation and trace' if shares else 'runs prompt and answer again'}")
    print(verdict(need, devices, _alternatives(config, adapter)))


def _compose(arguments: Sequence[str]) -> DictConfig:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from stethoscope.commands.command_line import spell
    from stethoscope.commands.overrides import complete_choices
    from stethoscope.core.component import compose

    wrong = next((argument for argument in arguments if "=" not in argument or argument.startswith("-")), None)
    if wrong is not None:
        raise ConfigError(f"doctor takes settings as model=llava-1.5-7b, got {wrong!r}")
    overrides = list(filter(None, (spell(argument, "doctor") for argument in complete_choices(arguments))))
    try:
        config = compose(overrides, "doctor")
    except (HydraException, OmegaConfBaseException) as error:
        from stethoscope.commands.overrides import explain

        raise ConfigError(explain(error, "doctor", overrides)) from error
    for name in ("context", "batch_size", "new_tokens"):
        if not isinstance(config[name], int) or config[name] < 1:
            raise ConfigError(f"{name}={config[name]} should be a number of at least 1")
    return config


def _adapter(config: DictConfig, **settings: str) -> Adapter:
    from omegaconf import open_dict

    from stethoscope.adapters.base import Adapter
    from stethoscope.core.component import build

    node = config.model.copy()
    with open_dict(node):
        node.update(settings)
    return build(node, Adapter, "model", config.plugins)


def _alternatives(config: DictConfig, adapter: Adapter) -> Iterator[tuple[str, Memory]]:
    """Estimate the memory in smaller batches or precision, one after another, with the settings to add."""
    for size in _FEWER:
        if size < config.batch_size:
            yield f"batch_size={size}", adapter.memory(config.context, size, config.new_tokens)
    for settings in _SMALLER:
        if all(config.model.get(name) != value for name, value in settings.items()):
            try:
                need = _adapter(config, **settings).memory(config.context, config.batch_size, config.new_tokens)
            except (ConfigError, CapabilityError):  # an adapter without this setting
                continue
            yield " ".join(f"model.{name}={value}" for name, value in settings.items()), need


def free_memory_by_device() -> list[DeviceMemory]:
    """Measure the free memory of every GPU, then of the CPU."""
    import psutil
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [DeviceMemory(f"cuda:{index}", torch.cuda.mem_get_info(index)[0]) for index in range(count)]
    return [*devices, DeviceMemory("cpu", psutil.virtual_memory().available)]


def verdict(need: Memory, devices: Sequence[DeviceMemory], smaller: Iterable[tuple[str, Memory]]) -> str:
    """Say on which device the model fits, or which settings would make it fit.

    Args:
        need: of the model as it is.
        devices: the CPU last.
        smaller: settings to add, and the need with them; only read where the model does not fit.

    >>> from stethoscope.core.types import Memory
    >>> need = Memory(7 * 10**9, "bfloat16", weights=14 * 2**30, cache=2**30, relevancy=5 * 2**30)
    >>> verdict(need, [DeviceMemory("cuda:0", 24 * 2**30), DeviceMemory("cpu", 60 * 2**30)], [])
    'fits on cuda:0'
    >>> gpus = [DeviceMemory(f"cuda:{index}", 16 * 2**30) for index in range(2)]
    >>> verdict(need, [*gpus, DeviceMemory("cpu", 2**30)], [])
    'needs model.device_map=auto: spreads over cuda:0, cuda:1'
    """
    gpus, cpu = [device for device in devices if device.name != "cpu"], devices[-1]
    main = max(gpus or devices, key=lambda device: device.free)
    if _fits(need, main.free):
        return f"fits on {main.name}"
    options = [
        f"{settings} (about {_size(other.total)}, fits on {main.name})"
        for settings, other in smaller
        if _fits(other, main.free)
    ]
    spread = sum(device.free for device in gpus)
    if len(gpus) > 1 and _fits(need, spread):
        options.insert(0, f"model.device_map=auto: spreads over {', '.join(device.name for device in gpus)}")
    elif gpus and _fits(need, spread + cpu.free):
        options.append("model.device_map=auto: the rest is kept in CPU memory, which is slow")
    if not options:
        options.append(
            "model.device_map=auto model.offload_folder=<folder>: the rest is kept on disk, which is very slow"
        )
    return f"needs {'; or '.join(options)}"


def _fits(need: Memory, free: int) -> bool:
    return need.total * _SLACK <= free


def _table(name: str, need: Memory, config: DictConfig, devices: Sequence[DeviceMemory]) -> str:
    from stethoscope.report.tables import Table, text

    stored = f"{need.dtype}, {config.model.quantize}" if config.model.get("quantize") else need.dtype
    rows = [
        (f"{name}, weights", f"{need.parameters:,} in {stored}", _size(need.weights)),
        ("generation", f"{config.batch_size} x {config.context} tokens, cache and logits", _size(need.cache)),
        ("relevancy pass", "one answer, about", _size(need.relevancy)),
        ("together", "weights and the larger of the two", _size(need.total)),
        *((f"free on {device.name}", "", _size(device.free)) for device in devices),
    ]
    return text(Table("", ("memory", "of", "size"), tuple(rows)))


def _size(number: float) -> str:
    units = ["B", "KiB", "MiB", "GiB"]
    while number >= 1024 and len(units) > 1:
        number /= 1024
        units.pop(0)
    return f"{number:.1f} {units[0]}" if number < 100 and units[0] != "B" else f"{number:.0f} {units[0]}"
