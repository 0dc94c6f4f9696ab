"""Whatever a model writes is read without an error, and whatever is shown of it stays text."""

import html.parser
import json

from fuzz.broken import VALUES, answers
from hydra.errors import HydraException
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf.errors import OmegaConfBaseException

from stethoscope.adapters.answer_tokens import trim_ids
from stethoscope.commands.overrides import explain
from stethoscope.core.component import compose
from stethoscope.core.errors import ConfigError
from stethoscope.core.files import jsonable
from stethoscope.core.html import document, escape, json_block
from stethoscope.core.redaction import redact
from stethoscope.storage.run_fingerprint import describe, differences, digest
from stethoscope.tasks import object_extraction, yes_no
from stethoscope.tasks.counts import complete_sentences
from stethoscope.tasks.halloc import move_spans
from stethoscope.tasks.noun_extraction import Vocabulary
from stethoscope.tasks.questions import asked_object
from stethoscope.tracing.token_spans import decode_with_offsets

WORDS = st.sampled_from(
    ["dog", "dogs", "stop", "sign", "toilet", "seat", "hot", "yes", "Yes,", "no", "No.", "not", "'s", "n't", "``",
     "...", "İ", "\u2028", "</script>", "<b>", "\x00", "\ud800", "\n", " ", "-", '"']
)  # fmt: skip
TEXTS = st.one_of(
    st.text(max_size=60), st.lists(WORDS, max_size=12).map(" ".join), st.lists(WORDS, max_size=12).map("".join)
)


NAMES = TEXTS.filter(str.strip)


@given(text=TEXTS, label=st.sampled_from(["yes", "no"]))
def test_yes_no(text, label):
    for parse in yes_no.PARSERS.values():
        reply = parse(text)
        assert reply in ("yes", "no", None)
        for mention in yes_no.claim(text, reply, label, "dog"):
            assert 0 <= mention.start < mention.end <= len(text)


@given(text=TEXTS, words=st.dictionaries(NAMES, st.lists(NAMES, max_size=3), max_size=3))
def test_mentions(text, words):
    for find in (object_extraction.mentions, Vocabulary({k: tuple(v) for k, v in words.items()}).mentions):
        last = 0
        for name, start, end in find(text):
            assert name
            assert last <= start < end <= len(text)
            last = start
    complete_sentences(text)
    asked_object(text)


@given(text=TEXTS, more=TEXTS)
def test_given_answers(text, more):
    spans = [(0, len(text))] if text.strip() else []
    moved = move_spans(text, spans, more)
    assert moved is None or all(0 <= start <= end <= len(more) for start, end in moved)


@given(
    tokens=st.lists(st.binary(min_size=0, max_size=4), max_size=10),
    stops=st.lists(st.text(min_size=1, max_size=3), max_size=2),
)
def test_offsets(tokens, stops):
    """Tokens of any bytes, half characters too: spans follow each other and cover the text."""

    def decode(ids):
        return b"".join(tokens[index] for index in ids).decode(errors="replace")

    ids = list(range(len(tokens)))
    text, offsets = decode_with_offsets(ids, decode)
    assert text == decode(ids).lstrip()
    assert len(offsets) == len(ids)
    ends = [0, *(end for _, end in offsets)]
    assert [start for start, _ in offsets] == ends[:-1] if offsets else True
    assert ends == sorted(ends)
    assert not offsets or ends[-1] == len(text)
    trimmed = trim_ids(ids, end_ids=(3,), stops=tuple(stops), decode=decode)
    assert trimmed.ids == ids[: len(trimmed.ids)]


class Reader(html.parser.HTMLParser):
    """Collects tags and text of a page."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.tags, self.text = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text.append(data)


@given(text=TEXTS, name=TEXTS)
def test_markup(text, name):
    reader = Reader()
    reader.feed(f'<p title="{escape(text)}">{escape(text)}</p>')
    reader.close()
    assert reader.tags == ["p"]
    assert "".join(reader.text) == text
    block = json_block({"text": text})
    reader = Reader()
    reader.feed(block)
    reader.close()
    assert reader.tags == ["script"]
    assert json.loads("".join(reader.text)) == {"text": text}
    document(name, f"<p>{escape(text)}</p>")


@given(old=VALUES, new=VALUES)
def test_fingerprints(old, new):
    changes = differences(jsonable(old), jsonable(new))
    assert not changes or jsonable(old) != jsonable(new)
    describe(changes)
    digest({"value": old})
    json.dumps(redact(jsonable({"value": old, "api_key": new})), allow_nan=False)


@settings(max_examples=max(settings().max_examples // 8, 1))  # composing takes a tenth of a second
@given(
    text=TEXTS,
    key=st.sampled_from(["model", "task", "task.parser", "limit", "batch_size", "+x", "~task", "generation"]),
)
def test_overrides(text, key):
    """As the command line reads them: composed, or refused in one line."""

    def call():
        try:
            compose([f"{key}={text}"], root="evaluate")
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(explain(error, "evaluate", [f"{key}={text}"])) from error

    answers(call)
