import pytest

from stethoscope.commands.common import logger_settings
from stethoscope.core.component import compose

WANDB, CSV = "stethoscope.loggers.wandb.WandbLogger", "stethoscope.loggers.file_loggers.CsvLogger"


@pytest.mark.parametrize(
    ("words", "targets"),
    [
        ([], {"logger.wandb": WANDB}),
        (["logger=csv"], {"logger.csv": CSV}),
        (["logger=[csv,wandb]"], {"logger.csv": CSV, "logger.wandb": WANDB}),
        (["logger=[]"], {}),
        (["logger=none"], {"logger.none": "stethoscope.loggers.file_loggers.JsonLogger"}),
        (["~logger"], {}),
        (["+logger._target_=mine.Bare", "+logger.file=x"], {"logger": "mine.Bare", "logger.wandb": WANDB}),
    ],
)
def test_any_number_of_loggers(words, targets):
    settings = logger_settings(compose(words, "evaluate"))
    assert {key: node["_target_"] for key, node in settings.items()} == targets
    if "logger" in settings:
        assert settings["logger"] == {"_target_": "mine.Bare", "file": "x"}
