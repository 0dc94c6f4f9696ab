"""What is typed for a path or a text arrives in the setting unchanged, alone and in sweeps."""

import re

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import assume, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from stethoscope.commands.command_line import INTERPOLATION, spell
from stethoscope.core.errors import ConfigError

PIECES = [*"=\"' \\[](){},$:+~@#.?*%&|;\n\t", "${", "b/c", "é", "日本", "choice(", "null", "None", "true", "1e5", "a"]
ODD = st.lists(st.sampled_from(PIECES), min_size=1, max_size=10).map("".join)
ANY = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=30)
TYPED = st.one_of(ODD, ANY).filter(lambda text: text not in ("???", "null", "None"))  # they stand for no value
BYTES = st.binary(min_size=1, max_size=20).map(lambda raw: raw.replace(b"\0", b"a").decode(errors="surrogateescape"))
NAMES = st.one_of(TYPED, BYTES).filter(lambda text: not INTERPOLATION.search(text))


def read(word):
    """The value that Hydra and OmegaConf make of a word."""
    override = OverridesParser.create().parse_overrides([word])[0]
    assert not override.is_sweep_override()
    return OmegaConf.to_container(OmegaConf.create({"value": override.value()}), resolve=True)["value"]


def in_quotes(text):
    """Text in quotes of its own; backslashes before a quote count double."""
    return "'" + re.sub(r"(\\*)('|\Z)", lambda match: match[1] * 2 + (match[2] and "\\'"), text) + "'"


@given(text=TYPED)
def test_free_text(text):
    assume(text[1:-1] not in ("null", "None"))
    assert read(spell(f"question={text}", "diagnose")) == text


@given(text=NAMES)
def test_paths(text):
    assume(text[1:-1] not in ("null", "None"))
    assert read(spell(f"task.images={text}", "evaluate")) == text
    if text.strip()[:1] not in ("[", "{"):
        assert read(spell(f"test={text}", "train")) == text


@given(texts=st.lists(NAMES, min_size=1, max_size=4))
def test_lists_of_paths(texts):
    assert read(spell(f"test=[{', '.join(map(in_quotes, texts))}]", "train")) == texts


@given(texts=st.lists(NAMES, min_size=2, max_size=4, unique=True))
def test_sweeps(texts):
    for key in ("run", "question"):
        assume(key == "run" or all(text.isascii() for text in texts))
        word = spell(f"{key}={','.join(map(in_quotes, texts))}", "extract", sweep=True)
        jobs = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides([word]), None)[0]
        assert [read(job[0]) for job in jobs] == texts


@given(text=TYPED, key=st.sampled_from(["limit", "detector.threshold", "features.names", "+x", "model.dtype"]))
def test_other_settings_never_meet_the_grammar(text, key):
    for sweep in (False, True):
        try:
            word = spell(f"{key}={text}", "evaluate", sweep)
        except ConfigError:
            continue
        OverridesParser.create().parse_overrides([word])
