"""Complete overrides of loggers, and translate Hydra's errors about overrides into one line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

from omegaconf import DictConfig, OmegaConf

from stethoscope.commands import HYDRA_COMMANDS
from stethoscope.commands.command_line import search_path
from stethoscope.core.component import TARGET, choices, compose, conf_folder, groups, is_located
from stethoscope.core.errors import ConfigError, first_line, unknown
from stethoscope.core.text import one_line

LAUNCHERS = ("joblib", "submitit_local", "submitit_slurm")
"""Hydra's launchers that one of our extras installs."""
_AS_THEY_ARE = "extract traces the answers of run=... as they are, and generates none; leave {}= out"
INSTEAD = {
    "benchmark": {
        "task": "benchmark runs POPE and CHAIR, and trains on CHAIR; `stethoscope evaluate task=...` runs others",
    },
    "mitigate": {
        "task": "mitigate asks CHAIR and POPE; `stethoscope evaluate task=... mitigation=...` runs one method "
        "on others",
        "mitigation": "mitigate compares methods=[none,drop,...]; mitigation.drop.threshold=0.3 is a setting of one",
    },
    "evaluate": {
        "features": "evaluate computes no features; `stethoscope extract run=... features=...` adds them to its run",
        "detector": "evaluate fits no detector; `stethoscope extract run=...` and then `stethoscope train run=... "
        "detector=...` do",
    },
    "answer": {"model": "answer asks a server for answers; engine.model=... is the name of its model"},
    "extract": {
        "task": "extract takes the task of run=...; leave task= out, and name new locations of its data as in "
        "task.images=...",
        "model": "extract takes the model of run=...; leave model= out, and name its new location as in "
        "model.model_id=...",
        "generation": _AS_THEY_ARE.format("generation"),
        "mitigation": _AS_THEY_ARE.format("mitigation"),
        "detector": "extract fits no detector; `stethoscope train run=... detector=...` does, and warn=... applies one",
    },
    "diagnose": {
        "task": "diagnose asks one question about one picture (image=... question=...); `stethoscope evaluate "
        "task=...` runs a task",
    },
    "train": {
        "task": "train reads the token table of run=...; mentions=chair, for example, is a task of that run",
        "model": "train reads the token table of run=... and loads no model; leave model= out",
    },
    "export": {"task": "export writes all tasks of run=..., or those of tasks=[pope], for example"},
}
"""By command, what to say for a group that it does not choose from, where another setting or command does it."""


EXAMPLES = {"run": "runs/first", "engine.base_url": "http://127.0.0.1:8000/v1"}
"""A value of each setting that has no default."""


_LOGGER_SETTING = re.compile(r"(?P<sign>\+\+?|~)?logger\.(?P<name>[^.=]+)")


def name_loggers(words: Sequence[str], command: str, folder: str | None = None) -> list[str]:
    """Complete the short form of loggers' settings.

    ``logger.mode=online`` stands for ``logger.wandb.mode=online``.

    Args:
        words: overrides in Hydra's grammar; those about ``logger`` say which are chosen.
        command: whose default counts without a choice.
        folder: of the user's configuration files, ``--config-dir``.

    Returns:
        The overrides with full names; one that adds or removes what no chosen logger has is left to Hydra.

    Raises:
        ConfigError: a logger is named that is not chosen, or not exactly one of the chosen ones has such a setting.

    >>> name_loggers(["logger=[wandb,csv]", "logger.mode=online", "logger.csv.folder=x"], "evaluate")
    ['logger=[wandb,csv]', 'logger.wandb.mode=online', 'logger.csv.folder=x']
    """
    if not any(_LOGGER_SETTING.match(word) for word in words):
        return list(words)
    folders = [*([Path(folder)] if folder else []), conf_folder()]
    chosen = [word.partition("=")[2] for word in words if word.startswith("logger=")]
    if not chosen:
        in_file = command_file(command, tuple(folders[:-1])).choices
        chosen = [choice.name for choice in in_file if choice.group == "logger" and choice.name]
    names = list(dict.fromkeys(re.findall(r"[^\[\]',\s]+", ",".join(chosen))))
    nodes = {name: _yaml(folders, f"logger/{name}") for name in names}
    settings = {
        key: node for file in nodes.values() if TARGET not in file for key, node in file.items() if node is not None
    }

    def complete(word: str) -> str:
        match = _LOGGER_SETTING.match(word)
        if match is None or match["name"] in settings:
            return word
        name = match["name"]
        owners = [key for key, node in settings.items() if name in node]
        if len(owners) == 1:
            return f"{match['sign'] or ''}logger.{owners[0]}.{word[match.start('name') :]}"
        if owners:
            full = " or ".join(f"logger.{key}.{name}" for key in owners)
            raise ConfigError(f"logger.{name} is a setting of several loggers: say {full}")
        if any(name in choices("logger", path) for path in folders):
            raise ConfigError(f"logger.{name} is set but not chosen: add logger=[{','.join([*names, name])}]")
        if match["sign"] or len(nodes) != len(settings) or not nodes:
            return word
        keys = sorted({key for node in settings.values() for key in node if key != TARGET})
        what = f"setting of logger={names[0] if len(names) == 1 else '[' + ','.join(names) + ']'}"
        raise ConfigError(unknown(what, name, keys))

    return [complete(word) for word in words]


def complete_choices(words: Sequence[str], folder: str | None = None) -> list[str]:
    """Write out choices that stand for more than one file.

    These are a model by its hub id or folder, and several feature sets.

    Args:
        words: overrides as typed.
        folder: of the user's configuration files, ``--config-dir``.

    >>> complete_choices(["model=owner/name", "features=[fast,blank]", "model=testbed"])
    ['model=hf', 'model.model_id=owner/name', 'features=union', 'features.sets=[fast,blank]', 'model=testbed']
    """
    folders = [*([Path(folder)] if folder else []), conf_folder()]
    completed: list[str] = []
    for word in words:
        key, _, value = word.partition("=")
        if key == "model" and is_located(value) and not any(value in choices("model", path) for path in folders):
            completed += ["model=hf", f"model.model_id={value}"]
        elif key == "features" and value[:1] == "[" and value[-1:] == "]" and "," in value:
            completed += ["features=union", f"features.sets={value}"]
        else:
            completed.append(word)
    return completed


ESTIMATOR = "detector.estimator"


def name_estimator(words: Sequence[str]) -> list[str]:
    """Let parts of a detector's estimator replace the name that stands there by default.

    Args:
        words: overrides in Hydra's grammar.

    >>> name_estimator(["detector.estimator.k=5", "detector.estimator._target_=mine.Near", "seed=1"])
    ['detector.estimator={_target_:mine.Near}', '++detector.estimator.k=5', 'seed=1']
    """
    target = f"{ESTIMATOR}.{TARGET}="
    classes = [word for word in words if word.lstrip("+").startswith(target)]
    if not classes:
        return list(words)
    values = classes[-1].partition("=")[2].split(",")
    named = f"{ESTIMATOR}={','.join(f'{{{TARGET}:{value}}}' for value in values)}"
    others = [word for word in words if word not in classes]
    own = [word for word in others if word.lstrip("+").startswith(f"{ESTIMATOR}.")]
    return [named, *(f"++{word.lstrip('+')}" for word in own), *(word for word in others if word not in own)]


def _yaml(folders: Sequence[Path], name: str) -> dict[str, Any]:
    """Read the first configuration file of a name; empty without one, or where it is no mapping."""
    import yaml

    file = next((path for folder in folders if (path := folder / f"{name}.yaml").is_file()), None)
    content = None if file is None else yaml.safe_load(file.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


class Choice(NamedTuple):
    """An entry of a list of defaults that chooses a file of a group.

    Attributes:
        group: such as ``detector``.
        package: key that the file's settings are put under.
        name: of the file, or of several in brackets; None where none is chosen.
    """

    group: str
    package: str
    name: str | None


class CommandFile(NamedTuple):
    """The configuration file of a command.

    Attributes:
        settings: those of the file, and of each that it includes, without Hydra's own.
        choices: the files of groups that it chooses.
    """

    settings: tuple[Mapping[str, Any], ...]
    choices: tuple[Choice, ...]


@cache
def command_file(command: str, folders: tuple[Path, ...] = ()) -> CommandFile:
    """Read the configuration file of a command, and its list of defaults.

    Args:
        command: its root.
        folders: of the user's configuration files, which come before the package's.
    """
    searched = (*folders, conf_folder())
    own, choices = _yaml(searched, command), list[Choice]()
    files = [own]
    for entry in own.get("defaults", []):
        if isinstance(entry, str) and entry != "_self_":
            files.append(_yaml(searched, entry))
        elif isinstance(entry, dict) and not next(iter(entry)).startswith("override "):
            [(key, name)] = entry.items()
            group, _, package = key.partition("@")
            choices.append(Choice(group, package or group, None if name is None else str(name)))
    settings = ({key: value for key, value in file.items() if key not in ("defaults", "hydra")} for file in files)
    return CommandFile(tuple(settings), tuple(choices))


def explain(error: Exception, command: str, overrides: Sequence[str], folder: str | None = None) -> str:
    """Explain an exception of Hydra or OmegaConf in one line.

    Args:
        error: raised while composing or reading the configuration.
        command: name of the root configuration.
        overrides: of the user, ``key=value``.
        folder: of the user's configuration files, ``--config-dir``.
    """
    from hydra.errors import MissingConfigException
    from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MissingConfigException):
            file = cause.missing_cfg_file or ""
            if file.partition("/")[0] in groups():  # a name may contain a folder, as paper/svar
                group, _, name = file.partition("/")
                shipped, options = choices(group), set(cause.options or ())  # none for a list of names
                plugged = any(word.startswith("plugins=") for word in overrides) and options <= shipped.keys()
                hint = "; --config-dir FOLDER adds those of your own" if plugged else ""
                return unknown(group, name, {*shipped, *options}) + hint
            group, _, name = file.rpartition("/")
            if group == "hydra/launcher" and name in LAUNCHERS:
                return f'{group}={name} is not installed: pip install "lvlm-stethoscope[sweeps]"'
            if cause.options is not None:
                return unknown(group or "configuration", name, cause.options)
        cause = cause.__cause__
    text = str(error)
    if isinstance(error, MissingMandatoryValue):
        match = re.search(r"full_key: (\S+)|mandatory value: (\S+)", text)
        return _missing(next(filter(None, match.groups())) if match else "a setting")
    if isinstance(error, InterpolationResolutionError):
        return one_line(first_line(error))
    missing = re.search(r"Could not (?:override|append[^']*) '([^']+)'|Key '([^']+)' is not in struct", text)
    if missing and overrides:
        key = _offending(next(filter(None, missing.groups())), overrides)
        if key in groups():
            return _other_group(key, command, overrides)
        if key.startswith(f"{ESTIMATOR}."):
            return f"{key} is a setting of a class, which {ESTIMATOR}.{TARGET}=sklearn.svm.SVC, for example, chooses"
        return _unknown_setting(key, _known_keys(command, [*overrides, *search_path(folder)], key))
    return one_line(re.sub(r"\s*See https://hydra.cc\S*.*", "", text, flags=re.DOTALL))


def _missing(key: str) -> str:
    """Write the message for a setting that has no default."""
    return f"{key} must be given: add it as {key}={EXAMPLES.get(key, '...')}"


def _other_group(group: str, command: str, overrides: Sequence[str]) -> str:
    """Write the message for a group that a command does not choose from."""
    able = [
        other for other in HYDRA_COMMANDS if any(choice[:2] == (group, group) for choice in command_file(other).choices)
    ]
    keys = [word.lstrip("+~").partition("=") for word in overrides]
    experiment = next((f"experiment={name}" for key, _, name in keys if key == "experiment"), None)
    if experiment and group not in [key for key, _, _ in keys]:
        return f"{command} does not use {group}, which {experiment} chooses; `stethoscope {able[0]}` does"
    if group in INSTEAD.get(command, {}):
        return INSTEAD[command][group]
    known = [key for key in _known_keys(command, overrides, group) if "." not in key]
    return f"{command} has no setting {group}, which {', '.join(able)} have. There are: {', '.join(known)}"


def _offending(key: str, overrides: Sequence[str]) -> str:
    """Find the override's full key when the error names only its last part."""
    keys = [override.split("=", 1)[0].lstrip("+~") for override in overrides]
    return next((full for full in keys if full == key or full.endswith("." + key)), key)


def _known_keys(command: str, overrides: Sequence[str], offending: str) -> list[str]:
    """List the dotted keys and groups of a command's configuration.

    It is composed without the offending override.
    """
    from hydra.errors import HydraException

    valid = [item for item in overrides if not item.lstrip("+~").startswith(offending + "=") and "," not in item]
    try:
        config = compose(valid, command, hydra=True)
    except HydraException:  # another override is wrong too: use the command's own keys
        config = compose([], command, hydra=True)
    chosen = [name for name in config.hydra.runtime.choices if "/" not in name]
    keys: list[str] = []

    def walk(node: object, path: str) -> None:
        if isinstance(node, dict):
            for name, value in node.items():
                keys.append(f"{path}{name}")
                walk(value, f"{path}{name}.")

    plain = cast("dict[str, Any]", OmegaConf.to_container(config, resolve=False))  # the root is a mapping
    walk({name: value for name, value in plain.items() if name != "hydra"}, "")
    return sorted({*keys, *chosen})


def _unknown_setting(key: str, known: Sequence[str]) -> str:
    """Write the message for an unknown key, with its siblings or, without a parent, the top-level keys."""
    parent, _, last = key.rpartition(".")
    siblings = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == parent]
    if parent and siblings:
        return unknown(f"setting of {parent}", last, [name for name in siblings if name != "_target_"])
    if parent in groups() and parent in known:
        return f"{key} is set, but no {parent} is chosen: add {parent}={next(iter(choices(parent)))}, for example"
    if parent in known:
        return f"{parent} has no settings: it is a single value, {parent}=..."
    return unknown("setting", key, [name for name in known if "." not in name])


def check_config(config: Mapping[str, Any], command: str, words: Sequence[str]) -> None:
    """Check a composed configuration before anything is loaded.

    Args:
        config: the composed configuration.
        command: its root.
        words: the overrides.

    Raises:
        ConfigError: see ``check_settings``, ``check_values`` and ``check_mappings``.
    """
    for key in sorted(OmegaConf.missing_keys(config)) if isinstance(config, DictConfig) else ():
        raise ConfigError(_missing(key))
    check_settings(config, command, words)
    check_values(config)
    check_mappings(config, command)


def check_settings(config: Mapping[str, Any], command: str, words: Sequence[str]) -> None:
    """Check that a configuration has no setting that the command cannot use.

    Experiments of other commands bring such settings.

    Args:
        config: the composed configuration.
        command: its root.
        words: overrides; a setting that they add with + is one on purpose.

    Raises:
        ConfigError: it has; the message names a command that can use them.
    """
    added = {word.lstrip("+").partition("=")[0].partition(".")[0] for word in words if word.startswith("+")}
    unused = sorted({str(name) for name in config} - settings_of(command) - added)
    if not unused:
        return
    able = [other for other in HYDRA_COMMANDS if set(unused) <= settings_of(other)]
    used_by = f"`stethoscope {able[0]}` does; " if able else ""
    raise ConfigError(
        f"{command} does not use {', '.join(unused)}; {used_by}an experiment brought "
        f"{'it' if len(unused) == 1 else 'them'}"
    )


def settings_of(command: str) -> set[str]:
    """Return the names at the top of a command's configuration.

    These are its own, those of files that it includes, and its groups.
    """
    settings, choices = command_file(command)
    return {str(name) for file in settings for name in file} | {choice.package.partition(".")[0] for choice in choices}


def check_mappings(config: Mapping[str, Any], command: str) -> None:
    """Check that settings which hold others still do.

    ``split=0.5`` would replace ``split.train`` and the rest.

    Args:
        config: the composed configuration.
        command: its root.

    Raises:
        ConfigError: one has a single value.
    """
    settings, choices = command_file(command)
    for group, package, _ in choices:
        parent, _, name = package.rpartition(".")
        holder = config.get(parent) if parent else config
        value = holder.get(name) if isinstance(holder, Mapping) else None
        if value is not None and not isinstance(value, Mapping):
            choice = group if package == group else f"{group}@{package}"
            raise ConfigError(f"{package}={value} is no setting; the {group} is chosen as {choice}={value}")
    for file in settings:
        _check_mapping(file, config, "")


def _check_mapping(own: Mapping[str, Any], config: Mapping[str, Any], path: str) -> None:
    for key, node in own.items():
        if not isinstance(node, Mapping) or not node or key not in config:
            continue
        if not isinstance(config[key], Mapping):
            raise ConfigError(
                f"{path}{key}={config[key]} names none of the settings of {path}{key}, as in "
                f"{path}{key}.{next(iter(node))}=...; there are: {', '.join(node)}"
            )
        _check_mapping(node, config[key], f"{path}{key}.")


def check_values(config: Mapping[str, Any]) -> None:
    """Check plain numbers and booleans of a command before anything is loaded.

    Raises:
        ConfigError: a value is invalid.

    >>> check_values({"seed": 3, "share": False})
    """
    for key, least, most in (
        ("seed", 0, None),
        ("port", 0, 65535),
        ("examples", 0, None),
        ("limit", 1, None),
        ("batch_size", 1, None),
    ):
        value = config.get(key)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and not (whole and least <= value <= (most or value)):
            limit = f"from {least} to {most}" if most else f"{least} or more"
            raise ConfigError(f"{key}={value} should be a whole number, {limit}")
    if "name" in config:
        parts = Path(str(config["name"] or "")).parts
        if not parts or ".." in parts or Path(str(config["name"])).is_absolute():
            raise ConfigError(f"name={config['name']} should name a folder for this run inside runs={config['runs']}")
    given = config.get("answers")
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(
            f"answers={given} names no setting: a log is answers.file={given}, a folder of runs answers.runs"
        )
    for key in ("ablation", "judged", "published", "share"):
        if not isinstance(config.get(key, False), bool):
            raise ConfigError(f"{key}={config[key]} should be true or false")
