"""From configuration to objects, with a guard: only classes of this package and of the user's plug-ins are made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from stethoscope.errors import ConfigError, StethoscopeError, unknown

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from stethoscope.adapter import Adapter

T = TypeVar("T")


def _targets(node: Any, path: str) -> Iterator[tuple[str, str]]:
    """(dotted key, target) of every ``_target_`` below a configuration node."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "_target_":
                yield path, str(value)
            else:
                yield from _targets(value, f"{path}.{key}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _targets(value, f"{path}[{index}]")


def build(config: DictConfig, base: type[T], key: str, plugins: Sequence[str] = (), **extra: Any) -> T:
    """Makes the object that a configuration node describes.

    Args:
        config: node with a ``_target_``.
        base: what the object must be an instance of.
        key: where the node stands in the configuration, for messages.
        plugins: names of packages outside ``stethoscope`` from which classes may be made.
        extra: further arguments of the constructor.

    Raises:
        ConfigError: the target is missing, not allowed, cannot be imported, rejects its arguments or is of another
            type.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate
    from omegaconf import DictConfig, ListConfig, OmegaConf

    plain = OmegaConf.to_container(config, resolve=True) if isinstance(config, (DictConfig, ListConfig)) else config
    if not isinstance(plain, dict) or "_target_" not in plain:
        raise ConfigError(f"{key} has no _target_; it should name a class, for example by choosing {key}=<name>")
    allowed = ("stethoscope", *plugins)
    for where, target in _targets(plain, key):
        if target.split(".")[0] not in allowed:
            raise ConfigError(
                f"{where}._target_={target!r} is outside the packages that may be instantiated "
                f"({', '.join(allowed)}); add plugins=[{target.split('.')[0]}] if you trust it"
            )
    try:
        made = instantiate(plain, **extra, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, StethoscopeError):
            raise error.__cause__ from None
        raise ConfigError(f"{key}: {plain['_target_']} cannot be made: {_reason(error)}") from error
    if not isinstance(made, base):
        raise ConfigError(f"{key}: {plain['_target_']} makes a {type(made).__name__}, not a {base.__name__}")
    return made


def _reason(error: BaseException) -> str:
    """The first line of the error that started a chain of errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def conf_folder() -> Path:
    """Where the configuration files lie (beside the code in a checkout, inside the package once installed)."""
    import stethoscope.conf

    return Path(stethoscope.conf.__file__).parent


def choices(group: str, conf: Path | None = None) -> dict[str, str]:
    """Names of a configuration group's files, each with its first comment line.

    Args:
        group: such as ``model``.
        conf: folder of groups; None for our own.

    >>> "testbed" in choices("model")
    True
    """
    folder = (conf or conf_folder()) / group
    return {str(path.relative_to(folder).with_suffix("")): _title(path) for path in sorted(folder.rglob("*.yaml"))}


def _title(path: Path) -> str:
    """The first comment line of a configuration file that is not a directive to Hydra."""
    lines = (line.lstrip("# ").strip() for line in path.read_text().splitlines() if line.startswith("#"))
    return next((line for line in lines if not line.startswith("@package")), "")


def groups() -> list[str]:
    """Names of the configuration groups."""
    return sorted(path.name for path in conf_folder().iterdir() if path.is_dir() and any(path.glob("*.yaml")))


def compose(overrides: Sequence[str], root: str | None = None, hydra: bool = False) -> DictConfig:
    """A configuration as the commands see it, from a file of ``conf`` and words like those of the command line.

    Hydra keeps one state for the whole process; it is the same before and after, also inside a Hydra application.

    Args:
        overrides: such as ``+model=llava-1.5-7b``.
        root: name of the file to start from; None for an empty one.
        hydra: with Hydra's own settings under ``hydra``, such as the chosen names and the text of the help.
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


def load(model: str | Path, **settings: Any) -> Adapter:
    """A model, ready to answer.

    Args:
        model: a name of ``conf/model`` (``stethoscope list model``), the hub id of any image-text-to-text model of
            transformers (``owner/name``), or the path of a folder that ``save_pretrained`` wrote.
        settings: keys of the model's configuration to change, such as ``dtype="bfloat16"``.

    Returns:
        The adapter, its weights loaded.

    Raises:
        ConfigError: an unknown name or setting.
    """
    from stethoscope.adapter import Adapter

    known, model = choices("model"), str(model)
    if model not in known and not ("/" in model or Path(model).is_dir()):
        raise ConfigError(unknown("model", model, known))
    name = model if model in known else "hf"
    config = compose([f"+model={name}"]).model
    if name != model:
        config.model_id = model
    for key, value in settings.items():
        if key not in config:
            raise ConfigError(unknown("model setting", key, [key for key in config if key != "_target_"]))
        config[key] = value
    adapter = build(config, Adapter, "model")
    adapter.setup()
    return adapter
