"""Create objects from configuration, only of classes of this package and of the user's plug-ins."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from stethoscope.core.errors import ConfigError, StethoscopeError, first_line

if TYPE_CHECKING:
    from omegaconf import DictConfig

T = TypeVar("T")

TARGET = "_target_"
"""The key of a configuration node that names its class."""

_SHORT = reprlib.Repr()  # of values in messages
_SHORT.maxstring = _SHORT.maxother = 100


def package_names(text: str) -> list[str]:
    """Split the package names of the setting ``plugins``, with or without brackets.

    >>> package_names("[mine,yours]"), package_names("mine"), package_names("")
    (['mine', 'yours'], ['mine'], [])
    """
    return [name.strip() for name in text.strip("[]").split(",") if name.strip()]


def _as_names(plugins: str | Sequence[str] | None) -> Sequence[str]:
    """Return the names of the setting ``plugins``; a single one may come without a list."""
    return [plugins] if isinstance(plugins, str) else plugins or ()


def import_plugins(plugins: str | Sequence[str] | None) -> None:
    """Import packages, whose features register themselves.

    Args:
        plugins: names of packages besides ``stethoscope``, as the present command line gives them.

    Raises:
        ConfigError: one is no name of a package, or cannot be imported.
    """
    for name in _as_names(plugins):
        if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
            raise ConfigError(f"plugins={_SHORT.repr(name)} should name Python packages, as in plugins=[my_package]")
        try:
            importlib.import_module(name)
        except Exception as error:  # a plug-in may raise anything: the message names it, the cause stays attached
            raise ConfigError(f"plugins={name} cannot be imported: {_reason(error)}{_where(error, name)}") from error


def import_name(path: Any, key: str, plugins: Sequence[str] = ()) -> Any:
    """Import the class or function of a dotted path, if an allowed package defines it.

    Nothing outside the allowed packages is imported for the check, and names that they import from elsewhere do not
    count: of ``stethoscope.core.token_table.pd.read_pickle`` not even ``...token_table.pd`` is looked up.

    Args:
        path: ``package.module.name``, where ``name`` may also be one that the package imports from its own modules.
        key: the setting that holds the path, for messages.
        plugins: names of packages besides ``stethoscope``, as the present command line or Python call gives them.

    Raises:
        ConfigError: the path is outside the allowed packages, cannot be imported or is not defined by them.
    """
    allowed = ("stethoscope", *_as_names(plugins))
    shown = _SHORT.repr(path)
    module, _, name = path.rpartition(".") if isinstance(path, str) else ("", "", "")
    package = module.split(".")[0]
    if not all(part.isidentifier() for part in (*module.split("."), name)):
        raise ConfigError(f"{key}={shown} should be a dotted name such as package.module.Name")
    if not _inside(module, allowed):  # the check before any import
        raise ConfigError(
            f"{key}={shown} is outside the packages that may be used ({', '.join(allowed)}); "
            f"add plugins=[{','.join([*allowed[1:], package[:80]])}] if you trust it"
        )
    try:
        value = getattr(importlib.import_module(module), name)
    except Exception as error:  # a plug-in may raise anything: the message names it, the cause stays attached
        raise ConfigError(f"{key}={shown} cannot be imported: {_reason(error)}{_where(error, package)}") from error
    defined_in = getattr(value, "__module__", None)
    if not callable(value) or not _inside(str(defined_in), allowed):
        raise ConfigError(f"{key}={shown} is no class or function that {' or '.join(allowed)} defines")
    return value


def _inside(module: str, packages: Sequence[str]) -> bool:
    """Return whether a module is one of some packages, or inside one.

    >>> _inside("mine.models", ["mine"]), _inside("mine.models", ["mine.data"]), _inside("mine_too", ["mine"])
    (True, False, False)
    """
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def import_class(path: Any, base: type[T], key: str, plugins: Sequence[str] = ()) -> type[T]:
    """Import a class of a contract; see ``import_name``.

    Args:
        path: ``package.module.Class``.
        base: what it must be a subclass of.
        key: the setting that holds the path, for messages.
        plugins: as for ``import_name``.

    Raises:
        ConfigError: as ``import_name``, or it is another kind of class.
    """
    cls = import_name(path, key, plugins)
    if not (inspect.isclass(cls) and issubclass(cls, base)):
        raise ConfigError(f"{key}={_SHORT.repr(path)} is no {base.__name__}; it should name a subclass of it")
    return cls


def build(config: DictConfig | Mapping[str, Any], base: type[T], key: str, plugins: Sequence[str] = ()) -> T:
    """Create the object that a configuration node describes.

    The node's other keys are the constructor's arguments, plain values at every depth: a class named inside them is
    rejected, as no contract says which base it must have. Only arguments among ``base.CLASS_SETTINGS`` may name one,
    which the constructor checks; that of a plug-in is imported for it.

    Args:
        config: node with a ``_target_``, composed from the command line or as plain data from a file.
        base: what the class must be a subclass of.
        key: path of the node in the configuration, for messages.
        plugins: names of packages outside ``stethoscope`` whose classes are allowed.

    Raises:
        ConfigError: the class is missing, not allowed, cannot be imported, is of another kind or rejects its settings.
    """
    from omegaconf import DictConfig, OmegaConf

    plain = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else config
    if not isinstance(plain, Mapping) or TARGET not in plain:
        raise ConfigError(f"{key} has no {TARGET}; it should name a class, for example by choosing {key}=<name>")
    settings = {str(name): value for name, value in plain.items() if name != TARGET}
    plain_values = dict(settings)  # without the classes that the constructor checks
    for name in getattr(base, "CLASS_SETTINGS", ()):
        node = settings.get(name)
        path = node.get(TARGET) if isinstance(node, Mapping) else node
        if isinstance(path, str) and _inside(path.rpartition(".")[0], _as_names(plugins)):
            import_name(path, f"{key}.{name}", plugins)
        if isinstance(node, Mapping):
            plain_values[name] = {inner: value for inner, value in node.items() if inner != TARGET}
    for path in _special_keys(plain_values, key):
        raise ConfigError(f"{path}: only {key} itself names a class, its settings are plain values given by name")
    cls = import_class(plain[TARGET], base, f"{key}.{TARGET}", plugins)
    check_kinds(inspect.signature(cls.__init__).parameters, settings, key, NUMBERS)
    try:
        return cls(**settings)
    except StethoscopeError:
        raise
    except Exception as error:  # wrong names and types make constructors raise anything
        raise ConfigError(f"{key}: {plain[TARGET]} cannot be made: {_reason(error)}") from error


NUMBERS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "int": (lambda value: type(value) is int, "a whole number"),
    "float": (lambda value: type(value) in (int, float), "a number"),
    "bool": (lambda value: type(value) is bool, "true or false"),
}
"""By the annotation of an argument what its setting may be: a test, and what is asked for."""
KINDS = {
    **NUMBERS,
    "str": (lambda value: isinstance(value, (str, os.PathLike)), "a text"),
    "Sequence": (lambda value: isinstance(value, Sequence) and not isinstance(value, (str, bytes)), "a list"),
}
"""``NUMBERS``, texts and lists."""


def check_kinds(
    parameters: Mapping[str, inspect.Parameter],
    settings: Mapping[str, Any],
    key: str,
    kinds: Mapping[str, tuple[Callable[[Any], bool], str]] = KINDS,
) -> None:
    """Check settings by the annotations of the arguments that they are for.

    Annotations are compared as text: they may name what is imported for type checkers alone. Those that name several
    kinds beside None, or another one, are left to the constructor.

    Args:
        parameters: arguments by name, as ``inspect.signature`` gives them.
        settings: values by name.
        key: path of the node that holds the settings, for messages.
        kinds: as ``NUMBERS``.

    Raises:
        ConfigError: a setting is of another kind.

    >>> def cut(text: str, limit: int | None = None): ...
    >>> check_kinds(inspect.signature(cut).parameters, {"text": "a dog", "limit": 2}, "task")
    """
    for name, value in settings.items():
        hint = parameters[name].annotation if name in parameters else ""
        text = hint if isinstance(hint, str) else inspect.formatannotation(hint)
        options = {option.strip().partition("[")[0] for option in text.split("|")}
        [kind, *others] = options - {"None"} or {""}
        if others or kind not in kinds or (value is None and "None" in options):
            continue
        matches, description = kinds[kind]
        if not matches(value):
            raise ConfigError(f"{key}.{name}={_SHORT.repr(value)} should be {description}")


def with_checked_kinds(init: Callable[..., None], key: str) -> Callable[..., None]:
    """Return a constructor that refuses arguments of other kinds than its annotations name, see ``check_kinds``."""
    parameters = inspect.signature(init).parameters

    @functools.wraps(init)
    def checked(*args: Any, **settings: Any) -> None:
        check_kinds(parameters, {**dict(zip(parameters, args, strict=False)), **settings}, key)
        init(*args, **settings)

    return checked


def _special_keys(node: Any, path: str) -> Iterator[str]:
    """Yield the dotted paths of keys below a node that Hydra would act on.

    These are ``_target_``, ``_args_`` and the like.
    """
    if isinstance(node, Mapping):
        for name, value in node.items():
            if isinstance(name, str) and name.startswith("_") and name.endswith("_") and name.strip("_"):
                yield f"{path}.{name}"
            yield from _special_keys(value, f"{path}.{name}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _special_keys(value, f"{path}[{index}]")


def _reason(error: BaseException) -> str:
    """Return the first line of the error that started a chain of errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _where(error: BaseException, name: str) -> str:
    """Explain how Python finds a package of the user's that it did not find; empty for other errors."""
    if isinstance(error, ModuleNotFoundError) and error.name == name.partition(".")[0]:
        return f"; PYTHONPATH=FOLDER before the command names the folder that {error.name} lies in"
    return ""


def conf_folder() -> Path:
    """Return the folder of configuration files.

    It lies beside the code in a checkout, and inside an installed package.
    """
    import stethoscope.conf

    return Path(stethoscope.conf.__file__).parent


def choices(group: str, conf: Path | None = None) -> dict[str, str]:
    """Map the names of a configuration group's files to their first comment lines.

    Args:
        group: such as ``model``.
        conf: folder of groups; None for the package's own.

    >>> "testbed" in choices("model")
    True
    """
    folder = (conf or conf_folder()) / group
    return {str(path.relative_to(folder).with_suffix("")): _title(path) for path in sorted(folder.rglob("*.yaml"))}


def _title(path: Path) -> str:
    """Return the first comment line of a configuration file that is not a directive to Hydra."""
    text = path.read_text(encoding="utf-8")
    lines = (line.lstrip("# ").strip() for line in text.splitlines() if line.startswith("#"))
    return next((line for line in lines if not line.startswith("@package")), "")


def is_located(model: str) -> bool:
    """Tell whether a model is given by its hub id or its folder, and not by a name of ``conf/model``.

    >>> is_located("owner/name"), is_located("testbed")
    (True, False)
    """
    return "/" in model or "\\" in model or Path(model).is_dir()


def groups() -> list[str]:
    """List the names of the configuration groups."""
    return sorted(path.name for path in conf_folder().iterdir() if path.is_dir() and any(path.glob("*.yaml")))


def compose(overrides: Sequence[str], root: str | None = None, hydra: bool = False) -> DictConfig:
    """Compose a configuration as the commands see it, from a file of ``conf`` and overrides.

    Hydra has one state per process, which is restored, so this also works inside a Hydra application.

    Args:
        overrides: such as ``+model=llava-1.5-7b``.
        root: name of the file to start from; None to start from nothing.
        hydra: include Hydra's own settings under ``hydra``, such as the chosen names and the text of the help.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module, version
    from hydra.core.global_hydra import GlobalHydra

    running, base = GlobalHydra.instance().hydra, version.getbase()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("stethoscope.conf", version_base="1.3"):
            return hydra_compose(root, overrides=list(overrides), return_hydra_config=hydra)
    finally:
        GlobalHydra.instance().hydra = running
        version.VersionBase.instance().version_base = base
