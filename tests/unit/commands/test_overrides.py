import pytest

from stethoscope.cli import main
from stethoscope.commands import HYDRA_COMMANDS
from stethoscope.commands.overrides import INSTEAD, check_mappings, explain, name_loggers
from stethoscope.core.component import choices, compose, groups
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


def _chosen(command):
    choices_of = compose([], command, hydra=True).hydra.runtime.choices
    return {key for key in choices_of if "@" not in key} & set(groups())


@pytest.mark.parametrize("command", HYDRA_COMMANDS)
def test_a_group_that_a_command_does_not_choose_from(command):
    others, instead = set(groups()) - _chosen(command), INSTEAD.get(command, {})
    assert set(instead) <= others
    for group in [*instead, *sorted(others - set(instead))[:1]]:
        line = explain(Exception(f"Could not override '{group}'."), command, [f"{group}={next(iter(choices(group)))}"])
        assert line == instead.get(group, line)
        assert group in instead or line.startswith(f"{command} has no setting {group}, which ")
        assert f"'{group}'" not in line  # nothing is refused and offered


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["evaluate", "experiment=detectors"], "evaluate does not use features, which experiment=detectors chooses"),
        (["evaluate", "model.device.index=1"], "model.device has no settings: it is a single value, model.device=..."),
        (["benchmark", "pope=amber"], "pope=amber is no setting; the task is chosen as task@pope=amber"),
        (["mitigate", "mitigation.drop=x"], "the mitigation is chosen as mitigation@mitigation.drop=x"),
    ],
)
def test_a_value_for_what_holds_settings(words, line, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert line in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("command", HYDRA_COMMANDS)
def test_the_defaults_hold_what_they_should(command):
    check_mappings(compose([], command), command)


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
