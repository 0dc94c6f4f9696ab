"""Read answers from logs of inspect_ai, zip archives or JSON; unpack archives within limits."""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from stethoscope.core.errors import DataError, first_line
from stethoscope.core.json_rows import clipped, read_json, shown
from stethoscope.storage.log_values import (
    Contents,
    LoggedAnswer,
    as_object,
    error_line,
    is_finished,
    last_user_message,
    logged_answer,
    logprob_list,
    objects,
    sample_id,
    with_reasoning,
)

LARGEST_ENTRY, LARGEST_LOG = 2**28, 2**31
"""Most bytes that one file of an archive, and all that are read of it together, may unpack to."""
HIGHEST_RATIO = 200
"""How many times its packed size a file of an archive may unpack to, if that is above ``_SMALL``; logs have 5 to 50."""

_SMALL = 2**20
_ZSTANDARD = 93  # what inspect_ai packs with; zipfile reads it from Python 3.14 on
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, _ZSTANDARD)  # the others unpack without bounds in zipfile
_SAMPLE = re.compile(r"samples/.+_epoch_\d+\.json", re.DOTALL)
_IN_PARTS = re.compile(r"samples/.+_epoch_\d+/sample\.json", re.DOTALL)
_ATTACHMENT = "attachment://"


# --- archives ---------------------------------------------------------------------------------------------------------


def open_archive(path: Path) -> zipfile.ZipFile:
    """Open a zip archive.

    Raises:
        DataError: it is damaged or cut off.
    """
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"{path} is no zip archive that can be read: {clipped(first_line(error))}") from None


def check_sizes(path: Path, entries: Iterable[zipfile.ZipInfo]) -> None:
    """Check that files of an archive unpack to no more than the limits of this module.

    Raises:
        DataError: they would, or a file is encrypted or packed in a way that is not read.
    """
    total = 0
    for entry in entries:
        origin, size = f"{path}, {clipped(entry.filename)}", entry.file_size
        if entry.flag_bits & 1 or entry.compress_type not in _METHODS:
            reason = "encrypted" if entry.flag_bits & 1 else f"packed by method {entry.compress_type}"
            raise DataError(f"{origin}: it is {reason}; stored, deflate and zstandard are read")
        if size > _SMALL and size > HIGHEST_RATIO * entry.compress_size:
            ratio = f"{size / max(entry.compress_size, 1):,.0f}"
            raise DataError(
                f"{origin}: {entry.compress_size:,} bytes that unpack to {size:,}, {ratio} times as many; "
                f"at most {HIGHEST_RATIO} times is read"
            )
        if size > LARGEST_ENTRY:
            raise DataError(f"{origin}: it unpacks to {size:,} bytes; at most {LARGEST_ENTRY:,} are read")
        total += size
    if total > LARGEST_LOG:
        raise DataError(f"{path} unpacks to {total:,} bytes; at most {LARGEST_LOG:,} are read")


def read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> Any:
    """Unpack one JSON file of an archive, never beyond the size that it declares.

    ``check_sizes`` goes before.

    Raises:
        DataError: it is damaged, or not JSON.
    """
    origin = f"{path}, {clipped(entry.filename)}"
    try:
        if entry.compress_type == _ZSTANDARD:
            data = _zstandard(archive, entry)
        else:
            with archive.open(entry) as file:
                data = file.read(entry.file_size)  # read() without a size unpacks all before it cuts
        value = json.loads(data)
        if b"\\u" in data:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError(f"{origin}: half of a surrogate pair, which is no text") from None
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, RecursionError, RuntimeError) as error:
        raise DataError(f"{origin}: not JSON that can be read ({clipped(first_line(error))})") from None
    return value


def _zstandard(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """Unpack a file with pyarrow, which unlike the standard library before Python 3.14 knows zstandard."""
    import pyarrow  # half a second

    file = archive.fp
    if file is None:
        raise OSError("the archive is closed")
    file.seek(entry.header_offset)
    header = file.read(30)
    if header[:4] != b"PK\3\4":
        raise zipfile.BadZipFile("no file header where the archive's list has one")
    file.seek(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"), 1)
    data = bytes(pyarrow.decompress(file.read(entry.compress_size), decompressed_size=entry.file_size, codec="zstd"))
    if zlib.crc32(data) != entry.CRC:
        raise zipfile.BadZipFile("bad checksum")
    return data


# --- logs -------------------------------------------------------------------------------------------------------------


def read_inspect(path: Path) -> Contents:
    """Read a log of inspect_ai: of each sample the answer of its first epoch.

    ``docs/answers.md`` has the fields.

    Raises:
        DataError: it is broken, unpacks beyond the limits, or holds no samples.
    """
    samples: Iterable[tuple[str, Any]]
    if zipfile.is_zipfile(path):
        with open_archive(path) as archive:
            header, samples = _read_archive(archive, path)
            return _contents(header, samples)
    header = read_json(path)
    if not isinstance(header, dict) or not isinstance(header.get("samples"), list):
        raise DataError(f"{path}: a log of inspect_ai has a list 'samples'; this one does not (log_samples=false?)")
    samples = ((f"{path}, samples[{index}]", sample) for index, sample in enumerate(header["samples"]))
    return _contents(header, samples)


def _read_archive(archive: zipfile.ZipFile, path: Path) -> tuple[Mapping[str, Any], Iterator[tuple[str, Any]]]:
    """Read the header of an archive, or of one that is still being written, and open its samples."""
    entries = {entry.filename: entry for entry in archive.infolist()}  # of two with one name the later counts
    head = next((entries[name] for name in ("header.json", "_journal/start.json") if name in entries), None)
    samples = [entry for name, entry in entries.items() if _SAMPLE.fullmatch(name)]
    if head is None or not samples:
        if any(map(_IN_PARTS.fullmatch, entries)):
            raise DataError(
                f"{path}: its samples are in parts (convert-chunked); the log that it was made from is read"
            )
        missing = "header.json" if head is None else "samples/..._epoch_1.json"
        names = clipped(", ".join(entries)) or "nothing"
        raise DataError(f"{path} is no log of inspect_ai with samples: {missing} is missing, there are: {names}")
    check_sizes(path, [head, *samples])
    header = read_entry(archive, head, path)
    if not isinstance(header, dict):
        raise DataError(f"{path}, {head.filename}: a JSON object was expected, not {shown(header)}")
    if head.filename != "header.json":
        header = {"status": "started", **header}
    origin = (f"{path}, {clipped(entry.filename)}" for entry in samples)
    return header, zip(origin, (read_entry(archive, entry, path) for entry in samples), strict=True)


def _contents(header: Mapping[str, Any], samples: Iterable[tuple[str, Any]]) -> Contents:
    """Build answers of samples, each with its origin, and take names from the header."""
    first: dict[str, tuple[int, LoggedAnswer]] = {}
    further = redacted = 0
    for origin, sample in samples:
        answer, epoch, choices, hidden = _answer(origin, sample)
        id_ = str(answer.id)
        if id_ in first and first[id_][0] == epoch:
            before = first[id_][1].origin
            raise DataError(f"{origin}: id {clipped(id_)} of epoch {epoch} is used before, in {before}")
        further += choices - 1 + (id_ in first)
        redacted += hidden
        if id_ not in first or epoch < first[id_][0]:
            first[id_] = (epoch, answer)
    evaluation = as_object(header.get("eval"))
    version = as_object(evaluation.get("packages")).get("inspect_ai", "")
    notes = [f"{further} further answers (epochs, choices) are left out"] if further else []
    notes += [f"{redacted} answers have encrypted reasoning, which is left out"] if redacted else []
    status = header.get("status")
    notes += [f"the log's status is {clipped(status)}: it may not have all samples"] if status != "success" else []
    return Contents(
        [answer for _, answer in first.values()],
        engine=clipped(f"inspect_ai {version}".strip()),
        model=clipped(evaluation.get("model") or ""),
        notes=tuple(notes),
    )


def _answer(origin: str, sample: Any) -> tuple[LoggedAnswer, int, int, bool]:
    """Return a sample's answer, its epoch, its number of choices, and whether reasoning is hidden."""
    if not isinstance(sample, dict) or "id" not in sample:
        raise DataError(f"{origin}: a sample of inspect_ai has an 'id', this is {shown(sample)}")
    id_, epoch = sample_id(sample["id"], origin), sample.get("epoch", 1)
    if type(epoch) is not int:
        raise DataError(f"{origin}: epoch {shown(epoch)} should be a whole number")
    attachments, output = as_object(sample.get("attachments")), as_object(sample.get("output"))
    choices = objects(output.get("choices"))
    choice = choices[0] if choices else {}
    message = choice.get("message")
    content = message.get("content", "") if isinstance(message, dict) else output.get("completion") or ""
    parts = _parts(content, attachments, origin)
    text, spans = with_reasoning("\n".join(parts["reasoning"]), "\n".join(parts["text"]))
    tokens = as_object(choice.get("logprobs")).get("content")
    tokens = tokens if isinstance(tokens, list) else []
    values = [token.get("logprob") if isinstance(token, dict) else token for token in tokens]
    number = sample["id"]  # inspect_ai numbers samples without id from 1
    answer = logged_answer(
        text,
        origin,
        error=error_line(sample.get("error") or output.get("error")),
        id=id_,
        row=number - 1 if type(number) is int and 0 < number < 2**31 else None,
        question=_question(sample, attachments, origin),
        logprobs=logprob_list(values, "logprobs", origin) if values else None,
        reasoning=spans,
        finished=is_finished(choice.get("stop_reason")),
    )
    return answer, epoch, max(len(choices), 1), bool(parts["redacted"])


def _question(sample: Mapping[str, Any], attachments: Mapping[str, Any], origin: str) -> str | None:
    """Return the text of the last message of the user: as it was sent, or as the data set has it."""
    for messages in (sample.get("messages"), sample.get("input")):
        if isinstance(messages, str):
            return _resolved(messages, attachments, origin)
        message = last_user_message(messages)
        if message is not None:
            return "\n".join(_parts(message.get("content"), attachments, origin)["text"])
    return None


def _parts(content: Any, attachments: Mapping[str, Any], origin: str) -> dict[str, list[str]]:
    """Sort the parts of a message: its texts, its readable reasoning, and reasoning that is encrypted."""
    parts: dict[str, list[str]] = {"text": [], "reasoning": [], "redacted": []}
    for part in [content] if isinstance(content, str) else content if isinstance(content, list) else ():
        part = {"type": "text", "text": part} if isinstance(part, str) else part if isinstance(part, dict) else {}
        kind = part.get("type")
        if kind in ("text", "reasoning"):
            value = part.get(kind)
            if not isinstance(value, str):
                raise DataError(f"{origin}: {kind} {shown(value)} is no text")
            parts["redacted" if part.get("redacted") else kind].append(_resolved(value, attachments, origin))
    return parts


def _resolved(text: str, attachments: Mapping[str, Any], origin: str) -> str:
    """Replace a reference to an attachment by the attachment."""
    if not text.startswith(_ATTACHMENT):
        return text
    value = attachments.get(text.removeprefix(_ATTACHMENT))
    if not isinstance(value, str):
        raise DataError(f"{origin}: attachment {clipped(text.removeprefix(_ATTACHMENT))} is missing in the sample")
    return value
