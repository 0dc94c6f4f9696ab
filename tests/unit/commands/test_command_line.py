"""Words of the command line: what each setting is, W&B's spelling, the options of Hydra."""

from pathlib import Path

import pytest
import yaml

from stethoscope.commands.command_line import LISTS, PATHS, TEXTS, option, spell, split, unquoted
from stethoscope.commands.common import parse
from stethoscope.core.component import compose, conf_folder
from stethoscope.core.errors import ConfigError

PLAIN = {
    # one of a few words, or checked as a name
    "asks", "attention", "calibration", "device", "device_map", "dtype", "estimator", "family", "kind", "labels",
    "mentions", "format", "mode", "on_error", "parser", "quantize", "random_init", "relationship", "repeats",
    "scene_mode", "scope", "score", "source", "subtokens", "to", "trace", "version",
    # numbers and mappings that may be null, lists of names
    "hosts", "hidden", "external", "weight", "max_hallucinated", "image_count", "options", "methods", "modes",
    "origins",
    "C", "abstractor", "categories", "compare_with", "exclude", "features", "groups", "limit", "max_memory",
    "max_new_tokens", "max_pixels", "names", "notes", "parts", "phrases", "plugins", "scene_seed", "seed", "sets",
    "stop", "subsets", "tags", "tasks", "temperatures", "text", "threads", "threshold",
}  # fmt: skip


def settings():
    """(file, dotted key, value) of every setting of the configuration files."""

    def walk(node, path):
        for key, value in node.items():
            if isinstance(value, dict) and value:
                yield from walk(value, f"{path}{key}.")
            else:
                yield f"{path}{key}", value

    for file in sorted(conf_folder().rglob("*.yaml")):
        node = yaml.safe_load(file.read_text()) or {}
        for key, value in walk({name: node[name] for name in node if name not in ("hydra", "defaults")}, ""):
            yield file.relative_to(conf_folder()), key, value


def test_every_setting_is_declared_as_what_it_is():
    """A new setting of text, or one that may be null, belongs to TEXTS, PATHS, LISTS or, where it is no text, PLAIN."""
    known = TEXTS | PATHS | LISTS | PLAIN
    for file, key, value in settings():
        last, group = key.rpartition(".")[2], "" if len(file.parts) == 1 else f"{file.parts[0]}."
        if last != "_target_" and (value is None or isinstance(value, (str, list))):
            assert {last, key, group + key} & known, f"{file}: {key}"
    assert not TEXTS & PATHS
    assert not (TEXTS | PATHS | LISTS) & PLAIN


ODD = "it's a, [b] (c) {d}=é ${"


@pytest.mark.parametrize(
    ("command", "groups"),
    [
        ("evaluate", ["task=chair"]),
        ("evaluate", ["task=custom", "model=hf"]),
        ("evaluate", ["task=pope", "model=minigpt4-vicuna-7b"]),
        ("evaluate", ["task=amber", "model=convllava-768"]),
        ("evaluate", ["task=mme"]),
        ("evaluate", ["task=halloc"]),
        ("evaluate", ["task=hallusion_bench"]),
        *[
            ("evaluate", [f"task={name}"])
            for name in ("dash_b", "natural_bench", "mmvp", "beaf", "phd", "humble_bench")
        ],
        ("benchmark", []),
        ("train", []),
        ("extract", []),
        ("diagnose", ["model=hf"]),
        ("app", []),
        ("export", []),
        ("doctor", ["model=hf"]),
    ],
)
def test_all_texts_of_a_command_arrive(command, groups):
    """Composed, with all of them at once."""
    from omegaconf import OmegaConf

    def keys(node, path=""):
        for key, value in node.items():
            if isinstance(value, dict) and value:
                yield from keys(value, f"{path}{key}.")
            elif key in TEXTS | PATHS | LISTS and not isinstance(value, dict):
                yield f"{path}{key}"

    before = OmegaConf.to_container(compose(groups, command), resolve=False)
    chosen = sorted(keys(before))
    config = compose([*groups, *(spell(f"{key}={ODD}", command) for key in chosen)], command)
    assert chosen
    for key in chosen:
        assert OmegaConf.select(config, key) == ODD, key


@pytest.mark.parametrize(
    ("word", "spelled"),
    [
        ("detector.C=None", "detector.C=null"),
        ("detector.threshold={'max_false_alarms': 0.2}", "detector.threshold={max_false_alarms:0.2}"),
        ('detector.threshold={"max_missed": None}', "detector.threshold={max_missed:null}"),
        ("task.subsets=['random', 'popular']", "task.subsets=['random','popular']"),
        ("detector.features=[None, True]", "detector.features=[null,True]"),
        ("model.max_memory={0: 20GiB, 'cpu': '60GiB'}", "model.max_memory={0:20GiB,cpu:'60GiB'}"),
        ("task.image_ids=None", "task.image_ids=null"),
        ("question=None", "question=null"),
        ('question="None"', "question='None'"),
        ("features=None", ""),
        ("experiment=null", ""),
        ("logger=None", "logger=none"),
        ("callbacks=null", "callbacks=none"),
        ("detector.objects=False", "detector.objects=False"),
        ("generation.stop=['a, b', \"it's\"]", "generation.stop=['a, b','it\\'s']"),
        ("test=[{run: runs/a=1, mentions: pope}]", "test=[{run:'runs/a=1',mentions:pope}]"),
        ("name=${oc.env:USER}", "name='${oc.env:USER}'"),
        ("task.filename=coco_{subset}.json", "task.filename='coco_{subset}.json'"),
        ("model.name=2014", "model.name='2014'"),
        ("seed=int(3)", "seed=int(3)"),
        ("~logger", "~logger"),
    ],
)
def test_spelling(word, spelled):
    assert spell(word, "train") == spelled


@pytest.mark.parametrize(
    ("word", "spelled"),
    [
        ("run=runs/a=1,runs/b", "run='runs/a=1',runs/b"),
        ("run=choice(runs/a=1,runs/b)", "run='runs/a=1',runs/b"),
        ("task.images='photos (val), 2014',b", "task.images='photos (val), 2014',b"),
        ("task.images=photos (val, 2014),b", "task.images='photos (val, 2014)',b"),
        ("seed=range(0,3)", "seed=range(0,3)"),
        ("detector.C=None,0.1", "detector.C=null,0.1"),
        ("test=[a=1],[b]", "test=['a=1'],[b]"),
        ("question=Who?,What?", "question='Who?','What?'"),
    ],
)
def test_spelling_in_a_sweep(word, spelled):
    assert spell(word, "train", sweep=True) == spelled


@pytest.mark.parametrize("key", sorted(TEXTS | PATHS | LISTS))
def test_quotes_are_taken_off_around_a_whole_text_or_path(key):
    for value in ("'a=b'", '"a=b"'):
        for sweep in (False, True):
            assert spell(f"{key}={value}", "train", sweep) == f"{key}='a=b'"
    assert spell(f"{key}='a' or 'b'", "train") == f"{key}='\\'a\\' or \\'b\\''"


def test_quotes_that_belong_to_the_name_of_a_file_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("'a'").mkdir()
    assert spell("run='a'", "extract") == "run='\\'a\\''"
    assert parse("report", ["'a'", "'b=c'", 'out="d"'], {"out": ""}) == (["'a'", "b=c"], {"out": "d"})


@pytest.mark.parametrize(
    ("word", "sweep", "message"),
    [
        ("detector=null", False, "detector=null is not possible; there are: boosting"),
        ("features=null,fast", True, "features=null is not possible in a sweep; there are: default"),
        ("model.max_memory={'é': 3}", False, "the key 'é' of a mapping cannot be given on the command line"),
    ],
)
def test_words_that_cannot_be(word, sweep, message):
    with pytest.raises(ConfigError) as error:
        spell(word, "train", sweep)
    assert str(error.value).startswith(message)


def test_detector_of_a_page_is_a_folder():
    assert spell("detector=runs/a=1", "app") == "detector.folder='runs/a=1'"
    assert spell("detector=None", "diagnose") == "detector.folder=null"
    assert spell("detector=boosting", "train") == "detector=boosting"


def test_options_are_no_settings():
    options, words = split(["--config-dir", "a=b", "-m", "seed=0,1", "--cfg=job"])
    assert (options, words) == (["--config-dir", "a=b", "-m", "--cfg=job"], ["seed=0,1"])
    assert (option(options, "--config-dir", "-cd"), option(options, "--cfg"), option(options, "-p")) == (
        "a=b",
        "job",
        None,
    )
    with pytest.raises(ConfigError, match="--cfg needs a value"):
        split(["--cfg"])


def test_titles_of_jobs_have_no_quotes():
    assert unquoted(spell("run=runs/a=1 ${x", "train")) == "run=runs/a=1 ${x"
