import pytest

from stethoscope.cli import main
from stethoscope.commands.overrides import name_loggers
from stethoscope.core.errors import ConfigError


def test_a_setting_of_the_only_logger_needs_no_name():
    assert name_loggers(["logger.mode=online"], "evaluate") == ["logger.wandb.mode=online"]
    assert name_loggers(["logger=csv", "logger.folder='a b'"], "train") == ["logger=csv", "logger.csv.folder='a b'"]
    assert name_loggers(["+logger.mode=x", "~logger.name"], "train") == ["+logger.wandb.mode=x", "~logger.wandb.name"]


def test_of_several_loggers_the_one_that_has_it():
    words = ["logger=[wandb,tensorboard]", "logger.mode=online", "logger.wandb.pictures=3", "logger.folder=x"]
    named = ["logger=[wandb,tensorboard]", "logger.wandb.mode=online", "logger.wandb.pictures=3"]
    assert name_loggers(words, "evaluate") == [*named, "logger.tensorboard.folder=x"]
    swept = ["logger=none,wandb", "logger.mode=disabled"]
    assert name_loggers(swept, "evaluate") == ["logger=none,wandb", "logger.wandb.mode=disabled"]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["logger=[wandb,mlflow]", "logger.group=x"], "several loggers: say logger.wandb.group or logger.mlflow.group"),
        (["logger.mod=x"], "unknown setting of logger=wandb 'mod'; did you mean 'mode'"),
        (["logger=[csv,none]", "logger.mode=x"], "unknown setting of logger=[csv,none] 'mode'"),
        (["logger=csv", "logger.wandb.mode=x"], "logger.wandb is set but not chosen: add logger=[csv,wandb]"),
    ],
)
def test_what_is_no_setting_of_one_logger(words, error):
    with pytest.raises(ConfigError) as raised:
        name_loggers(words, "evaluate")
    assert error in str(raised.value)


def test_a_logger_of_ones_own(tmp_path):
    (tmp_path / "logger").mkdir()
    (tmp_path / "logger" / "bare.yaml").write_text("# Bare.\n_target_: mine.Logger\nfile: x\n")
    (tmp_path / "logger" / "named.yaml").write_text("# Named.\nnamed:\n  _target_: mine.Logger\n  file: x\n")
    for name, full in (("bare", "logger.file=y"), ("named", "logger.named.file=y")):
        words = [f"logger={name}", "logger.file=y"]
        assert name_loggers(words, "evaluate", str(tmp_path)) == [words[0], full]


def test_parts_of_an_estimator_need_its_class(capsys):
    with pytest.raises(SystemExit):
        main(["train", "run=nowhere", "detector.estimator.n_estimators=5"])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "detector.estimator.n_estimators is a setting of a class, which detector.estimator._target_=" in line


def test_other_words_stay_as_they_are():
    words = ["run=logger.mode=1", "logger=wandb", "task.logger=3"]
    assert name_loggers(words, "evaluate") == words
    assert name_loggers(["logger.mode=x"], "extract") == ["logger.mode=x"]
    assert name_loggers(["logger=[]", "logger.mode=x"], "evaluate") == ["logger=[]", "logger.mode=x"]
