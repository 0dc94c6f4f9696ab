"""The help of commands: what their configuration files say of every setting, and the groups that they take."""

import re

import pytest
import yaml
from omegaconf import OmegaConf

from stethoscope.cli import main
from stethoscope.commands import HYDRA_COMMANDS
from stethoscope.commands.help import Comments, help_text, read_comments
from stethoscope.core.component import compose, conf_folder, groups

UNEXPLAINED = {"_target_", "defaults", "hydra"}


def made(tmp_path, text, name="one"):
    (tmp_path / "group").mkdir(exist_ok=True)
    (tmp_path / "group" / f"{name}.yaml").write_text(text)
    return read_comments(f"group/{name}", [tmp_path])


def test_comments_above_behind_and_below(tmp_path):
    lines = made(
        tmp_path,
        "# The title\n# in two lines\n_target_: a.B\n"
        "first: 1         # behind\n                 # and below\n# not below but above\nsecond: '# no comment'\n\n"
        "# far away\n\nthird: [1, '#']  # after a list\n"
        "deep:            # of the whole\n  inner: null    # of the part\n  # above\n  other: 3\nlast: x\n",
    )
    assert lines == {
        "first": Comments((), ("behind", "and below")),
        "second": Comments(("not below but above",)),
        "third": Comments((), ("after a list",)),
        "deep": Comments((), ("of the whole",)),
        "deep.inner": Comments((), ("of the part",)),
        "deep.other": Comments(("above",)),
    }


def test_a_file_has_the_words_of_the_one_that_it_starts_from(tmp_path):
    made(tmp_path, "a: 1  # theirs\nb: 2  # theirs\n", "base")
    assert made(tmp_path, "defaults:\n  - base\n  - _self_\nb: 3  # ours\n") == {
        "a": Comments((), ("theirs",)),
        "b": Comments((), ("ours",)),
    }


@pytest.mark.parametrize("command", HYDRA_COMMANDS)
def test_every_setting_of_a_command_is_explained(command):
    comments = read_comments(command, [conf_folder()])
    settings = yaml.safe_load((conf_folder() / f"{command}.yaml").read_text())
    assert set(settings) - UNEXPLAINED <= set(comments)


@pytest.mark.parametrize("command", HYDRA_COMMANDS)
def test_the_help_is_the_configuration_and_its_own_groups(command):
    text = help_text(command, [])
    config = compose([], command, hydra=True)
    taken = {key.partition("@")[0] for key in config.hydra.runtime.choices if not key.startswith("hydra/")}
    listed = text.partition("== Groups")[2].partition("== Settings")[0].splitlines()[1:]
    assert {line.partition(":")[0].partition("@")[0] for line in listed if line and line[0] != " "} == taken
    assert taken <= set(groups())
    shown = yaml.safe_load(text.partition("key=value) ==\n")[2])
    whole = OmegaConf.to_container(config, resolve=False)
    not_chosen = {group for group in taken if whole.get(group) is None}
    assert shown == {key: value for key, value in whole.items() if key not in {"hydra", *not_chosen}}


def test_choices_and_experiments_are_explained():
    text = help_text("evaluate", ["task=chair", "model=llava-1.5-7b"])
    assert "  # Judge an answer that was cut off at its token limit without its last, unfinished sentence." in text
    assert "revision: main            # branch, tag or commit of a hub model; null for main" in text
    assert "# model=llava-1.5-7b: LLaVA-1.5 7B" in text
    text = help_text("train", ["experiment=transfer_sampling"])
    assert "#     stethoscope evaluate task=chair generation=$how" in text
    assert text.count("First make the runs, once") == 1


def test_files_of_the_user_count_too(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    mine = "# My own model\ndefaults: [hf, _self_]\nmodel_id: here  # where it lies\n"
    (tmp_path / "model" / "mine.yaml").write_text(mine)
    for words in (["--config-dir", str(tmp_path)], [f"hydra.searchpath=[file://{tmp_path}]"]):
        with pytest.raises(SystemExit) as end:
            main(["evaluate", "model=mine", "--help", *words])
        assert end.value.code == 0
        text = capsys.readouterr().out
        assert "llava-onevision-7b, mine, minigpt4-llama2-7b" in " ".join(text.split())
        assert "# model=mine: My own model" in text
        assert re.search(r"model_id: here +# where it lies", text)
        assert re.search(r"device: auto +# auto \(a GPU when there is one\)", text)
    with pytest.raises(SystemExit):
        main(["evaluate", "model=min", "--config-dir", str(tmp_path)])
    assert "did you mean 'mine'" in capsys.readouterr().err


def test_several_choices_of_a_group_are_explained():
    text = help_text("evaluate", ["logger=[wandb,csv]"])
    assert re.search(r"^logger: csv, ", text, re.MULTILINE)
    for line in (
        r"  # Weights & Biases, offline by default\.\n  wandb:",
        r"    mode: offline +# offline: write runs/<name>/wandb/",
        r"  csv:\n    _target_: stethoscope.loggers.file_loggers.CsvLogger\n    folder: csv +# of the files",
    ):
        assert re.search(line, text), text
