"""The measuring scripts that are kept ready for another machine run here, on small models."""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest

from scripts.check import beaf_causal, few_labels, promises, shift, slow_tests

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"


def test_the_gpu_script_measures_the_passes_of_a_run(monkeypatch):
    """Relevancy goes on from the pass over the prompt, as in a run, and not from what generation alone has read."""
    monkeypatch.syspath_prepend(str(BENCH))
    gpu, shapes = __import__("gpu"), __import__("shapes")
    adapter = shapes.ShapedAdapter(replace(shapes.NARROW["llava"], image=9), "float32", "cpu")
    calls = []
    for name in ("prefill", "generate_with_cache", "trace_batch", "generate"):
        method = getattr(adapter, name)
        monkeypatch.setattr(
            adapter, name, lambda *words, method=method, name=name: calls.append((name, words[0])) or method(*words)
        )
    bench = gpu.Bench(adapter, gpu.Case(adapter.shape, 1), 3, 0, gpu.named_set("fast"))
    figures = bench.trace(["relevancy"])
    assert [name for name, _ in calls[-4:]] == ["generate", "prefill", "generate_with_cache", "trace_batch"]
    (read,), (traced,) = calls[-2][1], calls[-1][1]
    assert read.cache is not None  # with the pass that relevancy needs
    assert traced.cache is not None
    assert figures["beside_generation"] < figures["seconds"]
    for name in ("gpu", "shapes"):
        sys.modules.pop(name)


@pytest.fixture
def gpu(monkeypatch, tmp_path, capsys):
    """Runs ``gpu.py`` in this process on a narrow model; returns its lines and what it printed."""
    monkeypatch.syspath_prepend(str(BENCH))
    gpu = __import__("gpu")
    out = tmp_path / "gpu.jsonl"

    def run(*words):
        words = ("--image", "9", "--tokens", "3", "--batch", "1", "--budget", "0", "--families", "llava", *words)
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(out), *words])
        gpu.main()
        return [json.loads(line) for line in out.read_text().splitlines()], capsys.readouterr().out

    yield run
    for name in ("gpu", "shapes"):
        sys.modules.pop(name, None)


def test_the_gpu_script_resumes_and_keeps_errors(gpu):
    lines, _ = gpu("--parts", "generation", "relevancy")
    assert [line["key"] for line in lines] == [
        "machine", "llava 9 x1 build", "llava 9 x1 generation", "llava 9 x1 relevancy",
    ]  # fmt: skip
    assert lines[2]["tokens"] == 3
    assert all(line["seconds"] > 0 for line in lines[1:])
    again, printed = gpu("--parts", "generation", "relevancy", "stream", "precision", "--seconds", "1000")
    assert again[:4] == lines
    assert "| llava 9 x1 relevancy | " in printed
    added = {line["key"]: line for line in again[4:]}
    assert 0 < added["llava 9 x1 precision"]["image"] < 0.1
    assert added["llava 9 x1 stream"]["without_detector"] > 0
    assert gpu("--table")[0] == again
    assert gpu("--parts", "forward", "--seconds", "0")[0] == again  # no time is left
    more, _ = gpu("--parts", "forward", "--image", "16", "--tokens", "0")
    assert "max_new_tokens=0" in more[-1]["error"]  # an error is a figure, not the end


@pytest.mark.slow
def test_the_gpu_script_measures_everything_without_an_installation(tmp_path):
    bare = tmp_path / "python"
    site = [sysconfig.get_path("purelib"), *(path for path in sys.path if path.endswith("site-packages"))]
    bare.write_text(  # -S: no .pth file, so that the editable installation is not seen
        f'#!/bin/sh\nPYTHONPATH={os.pathsep.join(dict.fromkeys(site))} exec {sys.executable} -S "$@"\n'
    )
    bare.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(bare), "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    small = ["--image", "16", "36", "--tokens", "5", "--batch", "1", "2", "--budget", "0.2", "--seconds", "1000"]
    done = subprocess.run(
        ["bash", str(BENCH / "gpu.sh"), *small],
        env=environment | {"SECONDS_AT_MOST": "1000"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert not [line for line in lines if "error" in line]
    for family in ("llava", "qwen2_5_vl"):
        parts = {line["key"].removeprefix(f"{family} 16 x1 ") for line in lines if f"{family} 16 x1" in line["key"]}
        assert parts >= {
            "forward", "generation", "relevancy", "full", "diagnose", "stream", "precision", "compile",
        }  # fmt: skip
        assert f"| {family} 36 x2 full |" in done.stdout


def test_growth_fits_exponents_and_marks_what_grows_faster(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCH))
    growth = __import__("growth")
    slope, half, last = growth.exponent([1, 2, 4, 8], [3, 12, 48, 192])
    assert (slope, last) == pytest.approx((2, 2))
    assert half == pytest.approx(0, abs=1e-6)
    costs = {"forward": 1.2, "generation": 1.0, "relevancy": 1.25, "stream": 1.5}
    lines = [
        {"axis": "answer", "size": size, "way": way, "seconds": size**power}
        for way, power in costs.items()
        for size in (16, 32, 64)
    ]
    rows = {row.split(" | ")[1]: row for row in growth.table(lines).splitlines()[2:]}
    assert {way for way, row in rows.items() if row.endswith("above |")} == {"stream"}
    assert "| 1.25 [1.25, 1.25] | 1.25 | forward 1.20, generation 1.00 |" in rows["relevancy"]
    figures = growth.Figures(tmp_path / "growth.jsonl", 100)
    options = argparse.Namespace(axes=["batch"], folder=tmp_path, rounds=1, largest=2)
    ways = {"forward": lambda: sum(range(10_000))}
    monkeypatch.setattr(growth, "model_ways", lambda shape, batch, tokens: ways)
    growth.measure(options, figures)
    assert [line["key"] for line in figures.lines] == [
        "batch 1 forward",
        "batch 1 all",
        "batch 2 forward",
        "batch 2 all",
    ]
    resumed = growth.Figures(tmp_path / "growth.jsonl", 100)
    growth.measure(options, resumed)  # nothing is missing
    assert resumed.lines == figures.lines
    for name in ("growth", "shapes"):
        sys.modules.pop(name)


def test_the_table_of_two_checkouts_takes_ratios_pair_by_pair(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    against = __import__("against")
    seconds = [  # by pair, of the run without features and of `fast`, before and after; the machine slows down
        ((1.0, 1.2), (1.0, 1.1)),
        ((2.0, 2.6), (1.8, 2.16)),
        ((4.0, 4.4), (4.4, 4.4)),
    ]
    lines = [
        {"part": "features-8", "name": name, "threads": 1, "round": number, "values": {
            way: [value, 2 * value] for way, value in zip(("none", *against.SETS), (plain, fast, 9, 9, 9), strict=True)
        }}
        for number, pair in enumerate(seconds)
        for name, (plain, fast) in zip(against.CHECKOUTS, pair, strict=True)
    ]  # fmt: skip
    alone = {**lines[0], "round": 3}  # its pair is missing
    rows = {row.split(" | ")[0][2:]: row.split(" | ")[1:] for row in against.table([*lines, alone], 1).split("\n")}
    assert rows["run without features, batches of 8, s"][2] == "1.00 (0.90-1.10)"
    assert rows["`fast`, batches of 8, x plain"] == [
        "1.20 (1.10-1.30)", "1.10 (1.00-1.20)", "0.92 (0.91-0.92)", "1.10", "yes",
        "1.20 (1.10-1.30)", "1.10 (1.00-1.20) |",
    ]  # fmt: skip
    for name in ("against", "harness", "shapes"):
        sys.modules.pop(name)


def test_slow_tests_begin_with_what_failed_never_ran_or_ran_long_ago():
    records = {
        name: {"passed": passed, "failed": failed, "day": day}
        for name, passed, failed, day in [
            ("good", "now", None, "2026-11-30"),
            ("old", "before", None, "2026-11-02"),
            ("older", "before", None, "2026-11-01"),
            ("bad", "before", "now", "2026-11-30"),
        ]
    }
    files = ["good", "old", "older", "bad", "new"]
    assert slow_tests.order(files, records, "now") == ["bad", "new", "older", "old"]
    assert slow_tests.order(["good"], records, "now+") == ["good"]  # files differ from the commit


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (few_labels, ["runs/a", "--split", "1", "--test", "runs/b"]),
        (shift, ["runs", "--home", "runs/a", "--home-scenes", "9"]),
        (promises, ["runs/a", "--draws", "9"]),
        (beaf_causal, ["--file", "beaf_qna.json", "--scenes", "9"]),
    ],
    ids=["few_labels", "shift", "promises", "beaf_causal"],
)
def test_options_of_which_only_a_single_one_could_count_exclude_each_other(script, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script", *words])
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert "not allowed with" in capsys.readouterr().err
