"""Files of runs, detectors, models and data sets with strings in them exchanged for hostile ones."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from fuzz.audit import CANARY

MARK = "executed"
"""File beside the cases that hostile code would make."""
KEYS = (
    "_target_", "_args_", "_partial_", "_recursive_", "__class__", "__module__", "__reduce__", "auto_map", "plugins",
    "trust_remote_code", "custom_generate", "_attn_implementation", "attn_implementation", "offload_folder", "spacy",
    "quantization_config", "adapter", "data_files", "path", "local_files_only", "class", "settings", "", "\ud800",
    "a.b",
)  # fmt: skip


def hostile_strings(work: Path, outside: Path) -> list[str]:
    """Strings that would do something if any reader resolved, opened, fetched, rendered or evaluated them."""
    mark, secret = work / MARK, outside / "secret.png"
    return [
        f"{CANARY}.Payload",
        f"{CANARY}",
        "os.system",
        "posix.system",
        "builtins.exec",
        "builtins.eval",
        "stethoscope.core.token_table.pd.read_pickle",
        "stethoscope.core.component.importlib.import_module",
        "stethoscope.__main__.main",
        "stethoscope.report.run_source.json.loads",
        "stethoscope.storage.lock.os.system",
        "subprocess.run",
        "antigravity.x",
        "idlelib.idle.x",
        "numpy.f2py.os.system",
        "torch.load",
        "pandas.read_pickle",
        "stethoscope.adapters.load",
        "stethoscope.adapters.testbed.TestbedAdapter",
        "stethoscope.adapters.hf.HfAdapter",
        "stethoscope.tasks.base.Task",
        "stethoscope.tasks.custom.Custom",
        "stethoscope.evaluation.evaluator.Evaluator",
        "stethoscope.detection.detector.Detector.load",
        f"__import__('os').system('touch {mark}')",
        f"exec(\"open('{mark}','w')\")",
        f"!!python/object/apply:os.system ['touch {mark}']",
        f"$(touch {mark})",
        f"`touch {mark}`",
        f"; touch {mark} #",
        f"| touch {mark}",
        f"{{{{ cycler.__init__.__globals__.os.popen('touch {mark}') }}}}",
        "{% for x in ''.__class__.__mro__[1].__subclasses__() %}{{ x }}{% endfor %}",
        "{{ 1/0 }}",
        "{{ raise_exception('no') }}",
        "${oc.env:HOME}",
        "${hydra:runtime.cwd}",
        "${oc.decode:${oc.env:HOME}}",
        "${run}",
        "${",
        "???",
        str(secret),
        f"../../../../../../../..{secret}",
        f"file://{secret}",
        str(outside / "pickled.bin"),
        str(outside / "model"),
        "http://127.0.0.1:9/x.png",
        "https://127.0.0.1:9/x.json",
        "ftp://127.0.0.1:9/x",
        "s3://bucket/key",
        "hf://datasets/owner/name",
        "owner/name",
        f"owner/name--{CANARY}.Payload",
        f"{CANARY}--x.Payload",
        "gs://bucket/x",
        "zip://x::http://127.0.0.1:9/x",
        "/",
        ".",
        "..",
        "~",
        "~root",
        "/etc/passwd",
        "/proc/self/environ",
        "/dev/null",
        "/dev/tty",
        str(outside / "fifo"),
        str(mark),
        "",
        " ",
        "\n",
        "a\nb",
        "\x00",
        "\x1b[31mred\x1b]0;title\x07",
        "\u202e",
        "\ud800",
        "\u2028",
        "İ",
        "x" * 20_000,
        "9" * 5000,
        "null",
        "true",
        "nan",
        "-inf",
        "1e999",
        "0x10",
        "-1",
        "2**9999",
        "%s%n",
        "{0.__class__}",
        "{question}",
        "<script>alert(1)</script>",
        "\\\\server\\share",
        "C:\\x",
        "con",
        "[" * 2000,
        "{" * 2000,
        "'",
        '"',
        "=",
        "a=b",
        "--help",
        "sha256:0",
    ]


VALUES = (None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 1e308, -1e308, 0.5, [], {}, [[]], [None], {"a": {"b": []}})


def places(data: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value inside nested lists and objects; of long lists only of the first eight items."""
    items = data.items() if isinstance(data, dict) else enumerate(data[:8]) if isinstance(data, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def change(data: Any, rng: random.Random, strings: list[str]) -> tuple[Any, str]:
    """Data with one value or key exchanged, and what was done. Works in place where it can."""
    paths = list(places(data))
    if not paths:
        return rng.choice(strings), "all of it"
    *path, last = rng.choice(paths)
    inside = data
    for key in path:
        inside = inside[key]
    dotted = ".".join(map(str, (*path, last)))
    kind = rng.choices(["string", "value", "key", "class", "remove"], [60, 15, 12, 6, 7])[0]
    if kind == "string":
        inside[last] = rng.choice(strings)
    elif kind == "value":
        inside[last] = rng.choice(VALUES)
    elif kind == "class":
        inside[last] = {"_target_": rng.choice(strings), rng.choice(KEYS): rng.choice(strings)}
    elif kind == "key" and isinstance(inside, dict):
        inside[rng.choice([*KEYS, *strings])] = inside.pop(last) if rng.random() < 0.5 else rng.choice(strings)
    else:
        del inside[last]
    return data, f"{kind} at {dotted}"


def mutate(path: Path, rng: random.Random, strings: list[str]) -> str:
    """Rewrite one file with one or two strings in it exchanged.

    Returns:
        What was done.
    """
    rewrite = {".json": _json, ".jsonl": _lines, ".yaml": _yaml, ".safetensors": _safetensors, ".parquet": _parquet}
    return rewrite.get(path.suffix, _text)(path, rng, strings)


def _json(path: Path, rng: random.Random, strings: list[str]) -> str:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # JSON lines under this name
        return _lines(path, rng, strings)
    data, done = change(data, rng, strings)
    if rng.random() < 0.3:
        data, more = change(data, rng, strings)
        done += f", {more}"
    path.write_text(json.dumps(data))
    return done


def _lines(path: Path, rng: random.Random, strings: list[str]) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    index = rng.randrange(len(lines))
    data, done = change(json.loads(lines[index]), rng, strings)
    lines[index] = json.dumps(data)
    path.write_text("\n".join(lines) + "\n")
    return f"line {index + 1}: {done}"


def _yaml(path: Path, rng: random.Random, strings: list[str]) -> str:
    data, done = change(yaml.safe_load(path.read_text(encoding="utf-8")), rng, strings)
    text = yaml.safe_dump(data)
    if rng.random() < 0.1:
        text, done = text.replace(": ", f": {rng.choice(strings[:40])}\n", 1), f"{done}, raw"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return done


def _text(path: Path, rng: random.Random, strings: list[str]) -> str:
    text = path.read_text(encoding="utf-8")
    start = rng.randrange(len(text) + 1)
    end = min(len(text), start + rng.choice([0, 1, 5, 40]))
    path.write_text(text[:start] + rng.choice(strings) + text[end:], encoding="utf-8", errors="surrogatepass")
    return f"characters {start} to {end}"


def _safetensors(path: Path, rng: random.Random, strings: list[str]) -> str:
    """Exchanges a string of the header, of the columns in it or a few bytes, and makes the manifest's digest fit."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    kind = rng.choice(["header", "columns", "numbers"])
    if kind == "header":
        header, done = change(header, rng, strings)
    elif kind == "columns":
        columns, done = change(json.loads(header["__metadata__"]["columns"]), rng, strings)
        header["__metadata__"]["columns"] = json.dumps(columns)
    else:
        index = rng.randrange(0, len(rest) - 8, 8)
        rest[index : index + 8] = rng.choice([rng.randbytes(8), b"\xff" * 8, bytes(8), b"\x00\x00\x00\x80" * 2])
        done = f"numbers at {index}"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + rest)
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest["sha256"] = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}
    (path.parent / "manifest.json").write_text(json.dumps(manifest))
    return done


def _parquet(path: Path, rng: random.Random, strings: list[str]) -> str:
    """Exchanges the text of a cell, a column's name or a note of the schema."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    text = [string for string in strings if string.isprintable()]
    texts = [
        field.name for field in table.schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
    ]
    kind = rng.choice(["cell", "cell", "name", "note"]) if texts else "name"
    if kind == "cell":
        column = rng.choice(texts)
        cells = table[column].to_pylist()
        index = rng.randrange(len(cells))
        cells[index] = rng.choice(text)
        table = table.set_column(table.schema.names.index(column), column, pa.array(cells, pa.string()))
        done = f"cell {index} of {column}"
    elif kind == "name":
        index = rng.randrange(len(table.schema.names))
        names = [rng.choice(text) if number == index else name for number, name in enumerate(table.schema.names)]
        table, done = table.rename_columns(names), f"name of {table.schema.names[index]}"
    else:
        notes = dict(table.schema.metadata or {b"none": b""})
        key = rng.choice(sorted(notes))
        table, done = table.replace_schema_metadata({**notes, key: rng.choice(text).encode()}), f"note {key!r}"
    pq.write_table(table, path)
    return done
