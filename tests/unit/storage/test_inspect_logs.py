"""Logs of inspect_ai: epochs, attachments, reasoning; archives that are odd, damaged or too large."""

import io
import json
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import pyarrow
import pytest

from stethoscope.core.errors import DataError
from stethoscope.storage import inspect_logs
from stethoscope.storage.logged_answers import read_answers

LOGS = Path(__file__).parent / "logs"
HEADER = {"version": 2, "status": "success", "eval": {"model": "m", "packages": {"inspect_ai": "0.3"}}}


def sample(id_=1, epoch=1, content="Yes", **values):
    choice = {"message": {"role": "assistant", "content": content}, "stop_reason": "stop"}
    return {"id": id_, "epoch": epoch, "input": "Is it?", "output": {"choices": [choice]}, **values}


def archive(*samples, header="header.json", method=zipfile.ZIP_DEFLATED, names=None):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", method) as file:
        if header:
            values = HEADER if header == "header.json" else {"version": 2, "eval": HEADER["eval"]}
            file.writestr(header, json.dumps(values))
        for index, values in enumerate(samples):
            name = names[index] if names else f"samples/{values['id']}_epoch_{values['epoch']}.json"
            file.writestr(name, json.dumps(values))
    return data.getvalue()


def test_inspect_epochs_attachments_and_reasoning(write):
    parts = [{"type": "reasoning", "reasoning": "attachment://h"}, {"type": "text", "text": "Yes"}]
    secret = [{"type": "reasoning", "reasoning": "gAAA", "redacted": True}, {"type": "text", "text": "No"}]
    messages = [
        {"role": "user", "content": [{"type": "image", "image": "attachment://i"}, {"type": "text", "text": "Q"}]}
    ]
    samples = [
        sample(1, 2, "other"),
        sample(1, 1, parts, attachments={"h": "a dog", "i": "data:"}, messages=messages),
        sample(2, 1, secret),
        sample(3, 1, "", error={"message": "out of\nmemory", "traceback": "..."}),
    ]
    log = read_answers(write(archive(*samples), "a.eval"))
    assert log.notes == (
        "1 further answers (epochs, choices) are left out", "1 answers have encrypted reasoning, which is left out",
    )  # fmt: skip
    thought, hidden, failed = sorted(log.answers, key=lambda answer: answer.id)
    assert thought.text == "<think>\na dog\n</think>\n\nYes"
    assert (thought.question, thought.id, thought.row) == ("Q", "1", 0)
    assert (hidden.text, hidden.question) == ("No", "Is it?")
    assert (failed.text, failed.error) == ("", "out of memory")


def test_inspect_unfinished_and_odd_names(write):
    names = ["samples/../../etc/a_epoch_1.json", "samples/C:\\b/c_epoch_1.json"]
    path = write(archive(sample("a"), sample("b"), header="_journal/start.json", names=names), "a.eval")
    log = read_answers(path)
    assert [answer.id for answer in log.answers] == ["a", "b"]
    assert log.notes == ("the log's status is started: it may not have all samples",)
    assert sorted(path.parent.iterdir()) == [path]


def raw_archive(entries):
    """An archive of (name, method, packed bytes, declared size, checksum), written by hand."""
    body, listing = b"", b""
    for name, method, packed, size, crc in entries:
        fields = b"".join(
            value.to_bytes(width, "little")
            for value, width in (
                (20, 2), (0, 2), (method, 2), (0, 4), (crc, 4), (len(packed), 4), (size, 4), (len(name), 2), (0, 2),
            )
        )  # fmt: skip
        offset = len(body)
        body += b"PK\3\4" + fields + name.encode() + packed
        listing += b"PK\1\2" + (20).to_bytes(2, "little") + fields + bytes(10) + offset.to_bytes(4, "little")
        listing += name.encode()
    count = len(entries).to_bytes(2, "little")
    sizes = len(listing).to_bytes(4, "little") + len(body).to_bytes(4, "little")
    return body + listing + b"PK\5\6" + bytes(4) + count + count + sizes + bytes(2)


def entry(name, values, method=93, declared=None):
    data = json.dumps(values).encode() if not isinstance(values, bytes) else values
    packed = pyarrow.compress(data, codec="zstd", asbytes=True) if method == 93 else data
    return (name, method, packed, len(data) if declared is None else declared, zlib.crc32(data))


def test_inspect_bombs(write, monkeypatch):
    header = entry("header.json", HEADER)
    bomb = b'{"id": "' + b"a" * 2**24 + b'"}'
    name = "samples/a_epoch_1.json"
    for content, message in (
        ([header, entry(name, bomb)], "bytes that unpack to 16,777,226, "),
        ([header, entry(name, bomb, declared=100)], "not JSON that can be read"),  # the size is a lie
        ([header, entry(name, sample("a"), 12)], "packed by method 12; stored, deflate and zstandard are read"),
        ([header, entry(name, b"[" * 10**5)], "not JSON that can be read"),
        ([header, entry(name, b'{"id": NaN, "epoch": 1}')], "id nan should be text or a whole number"),
        ([header, entry(name, [1])], "a sample of inspect_ai has an 'id', this is [1]"),
        ([header], "samples/..._epoch_1.json is missing, there are: header.json"),
        ([header, entry("samples/a_epoch_1/sample.json", {})], "its samples are in parts (convert-chunked)"),
        ([header, entry(name, sample("a")), entry("samples/b_epoch_1.json", sample("a"))], "id a of epoch 1 is used"),
        (
            [header, entry(name, sample("a", content=[{"type": "text", "text": "attachment://x"}]))],
            "attachment x is miss",
        ),
    ):
        with pytest.raises(DataError) as error:
            read_answers(write(raw_archive(content), "a.eval"))
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    assert read_answers(write(raw_archive([header, entry(name, sample("a"))]), "a.eval")).answers[0].text == "Yes"
    deflated = io.BytesIO()
    with zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("header.json", json.dumps(HEADER))
        file.writestr(name, bomb)
    with pytest.raises(DataError, match=r"times as many; at most 200 times is read"):
        read_answers(write(deflated.getvalue(), "a.eval"))
    monkeypatch.setattr(inspect_logs, "LARGEST_ENTRY", 100)
    with pytest.raises(DataError, match=r"it unpacks to [\d,]+ bytes; at most 100 are read"):
        read_answers(LOGS / "inspect_chair.eval")
    monkeypatch.setattr(inspect_logs, "LARGEST_ENTRY", 10**6)
    monkeypatch.setattr(inspect_logs, "LARGEST_LOG", 1000)
    with pytest.raises(DataError, match=r"unpacks to [\d,]+ bytes; at most 1,000 are read"):
        read_answers(LOGS / "inspect_chair.eval")


def test_an_archive_never_unpacks_to_more_than_it_declares(write):
    packer = zlib.compressobj(wbits=-15)
    packed = packer.compress(b" " * 2**26) + packer.flush()
    lie = ("samples/a_epoch_1.json", zipfile.ZIP_DEFLATED, packed, 1000, zlib.crc32(b" " * 1000))
    path = write(raw_archive([entry("header.json", HEADER), lie]), "a.eval")
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="not JSON that can be read"):
            read_answers(path)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_inspect_logs_probabilities_and_the_end():
    log = read_answers(LOGS / "inspect_pope.eval")
    assert (log.engine, log.model, log.notes) == ("inspect_ai 0.3.285", "embedded/testbed", ())
    assert len(log.answers[0].logprobs) == 2  # " Yes" and the end of the sequence
    assert log.answers[0].finished is True


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (archive(header="readme.txt"), "is a zip archive of readme.txt, which is no log that is known"),
        (archive(sample())[:-40], "is no zip archive that can be read"),
        (archive(sample()).replace(b"PK\3\4", b"PK\3\5", 1), "not JSON that can be read"),
        (json.dumps({**HEADER, "samples": None}), "a log of inspect_ai has a list 'samples'; this one does not"),
        (json.dumps({**HEADER, "samples": [sample("a"), sample("a")]}), "samples[1]: id a of epoch 1 is used before"),
        (json.dumps({**HEADER, "samples": []}), "holds no answer"),
    ],
)  # fmt: skip
def test_bad_archives_give_one_clear_line(refused, content, message):
    refused(content, message)
