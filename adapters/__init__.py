"""Load models: adapters, one file per family, which only configuration names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.core.component import build, choices, compose, is_located
from stethoscope.core.errors import ConfigError, unknown, wrong_type

if TYPE_CHECKING:
    from stethoscope.adapters.base import Adapter


def load(model: str | Path, **settings: Any) -> Adapter:
    """Load a model, ready to answer.

    Args:
        model: a name of ``conf/model`` (``stethoscope list model``), the hub id of any image-text-to-text model of
            transformers (``owner/name``), or the path of a folder that ``save_pretrained`` wrote.
        settings: keys of the model's configuration to change, such as ``dtype="bfloat16"``.

    Returns:
        The adapter, its weights loaded.

    Raises:
        ConfigError: an unknown name or setting, or neither text nor a path.
    """
    from omegaconf.errors import OmegaConfBaseException  # as late as ``compose`` needs the library

    from stethoscope.adapters.base import Adapter  # torch-free import of the package

    if not isinstance(model, (str, Path)):
        raise wrong_type("model", "a name of `stethoscope list model`, a hub id or a folder", model)
    known, model = choices("model"), str(model)
    if model not in known and not is_located(model):
        raise ConfigError(unknown("model", model, known))
    name = model if model in known else "hf"
    config = compose([f"+model={name}"]).model
    if name != model:
        config.model_id = model
    for key, value in settings.items():
        if key not in config:
            raise ConfigError(unknown("model setting", key, [key for key in config if key != "_target_"]))
        try:
            config[key] = value
        except OmegaConfBaseException as error:  # an object, such as torch.float16
            raise ConfigError(
                f"model.{key}={value!r} should be a plain value, such as 'float16' for a dtype"
            ) from error
    adapter = build(config, Adapter, "model")
    adapter.setup()
    return adapter
