"""A server's answers to a task: those of our own run, whatever happens to the server or to us on the way."""

import asyncio
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers.chat_server import ModelServer, Scripted, free_port, made_up, serving
from helpers.tiny_world import TinyTask
from PIL import Image

import stethoscope
from stethoscope.cli import main
from stethoscope.core.errors import CapabilityError, DataError
from stethoscope.core.images import portable_bytes
from stethoscope.core.types import Generation
from stethoscope.evaluation.chat_client import Engine
from stethoscope.evaluation.evaluator import Evaluator
from stethoscope.evaluation.server_answers import ask_task, run_coroutine
from stethoscope.storage.answer_file import AnswerFile
from stethoscope.storage.logged_answers import read_answers
from stethoscope.storage.run_dir import RunStore
from stethoscope.tasks.chair import Chair
from stethoscope.testbed import MODEL_DIR

SERVER = Path(__file__).parents[2] / "helpers/chat_server.py"
GREEDY = Generation()
TEMPLATE = """USER: {% for part in messages[0]['content'] %}\
{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %} ASSISTANT:"""


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def ask(url, path, task, limit=None, **settings):
    with AnswerFile(path) as file:
        return ask_task(Engine(base_url=url, **settings), GREEDY, task, file, limit)


def command(*words):
    with pytest.raises(SystemExit) as end:
        main(["answer", *words])
    return end.value.code


def test_it_runs_where_an_event_loop_runs_already(tmp_path):
    """As in notebooks: on a thread of its own, whose errors come back; an interrupt ends it."""
    task = TinyTask(4)

    async def cell(url, path):
        return ask(url, path, task)

    with serving(Scripted()) as url:
        assert asyncio.run(cell(url, tmp_path / "answers.jsonl")).answered == 4
    check_made_up(tmp_path / "answers.jsonl", task)
    with pytest.raises(CapabilityError):
        asyncio.run(cell(f"http://127.0.0.1:{free_port()}", tmp_path / "other.jsonl"))

    ended = threading.Event()

    async def waiting():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(60)
        finally:
            ended.set()

    async def interrupted():
        with pytest.raises(KeyboardInterrupt):
            run_coroutine(waiting())

    runner = asyncio.new_event_loop()  # asyncio.run would take the signal for itself
    try:
        runner.run_until_complete(interrupted())
    finally:
        runner.close()
    assert ended.is_set()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_made_up(path, task):
    """Every sample is there once, with the answer to its own question and image."""
    rows = {row["id"]: row for row in lines(path)}
    assert len(rows) == len(lines(path)) == len(task.samples())
    for sample in task.samples():
        image = portable_bytes(sample.image.load())[0]
        expected = "Yes" if hashlib.sha256(sample.question.encode() + image).digest()[0] % 2 else "No"
        row = rows[sample.id]
        assert (row["answer"], row["image_sha256"]) == (expected, sample.image.sha256)


def test_greedy_answers_are_those_of_our_own_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    adapter = stethoscope.load("testbed")
    Evaluator(run_dir=tmp_path / "run").run(adapter, Chair(scenes=4))
    records = {record.sample_id: record for record in RunStore(tmp_path / "run").records("chair")}
    with serving(ModelServer(adapter)) as url:
        words = ["task=chair", "task.scenes=4", f"engine.base_url={url}", "engine.revision=abc", "out=log/chair.jsonl"]
        assert command(*words) == 0
        assert command(*words) == 0  # nothing is left to ask
    output = capsys.readouterr()
    assert "4 of 4 samples answered: log/chair.jsonl\nwith token ids: 4 of 4" in output.out
    assert "4 of 4 samples answered, 0 of them new" in output.out
    assert "stethoscope evaluate task=chair task.scenes=4 answers.file=log/chair.jsonl" in output.out
    assert "chair: 4 samples, 4 of them need nothing more" in output.err
    log = read_answers(Path("log/chair.jsonl"))
    assert (log.format, log.engine, log.model, log.revision) == ("jsonl", "vllm", "stethoscope/testbed", "abc")
    assert len(log.answers) == len(records) == 4
    for logged in log.answers:
        own = records[logged.id].answer
        assert logged.text.strip() == own.text
        ends = [2] if own.finished else []
        assert logged.token_ids == (*own.token_ids, *ends)
        assert logged.logprobs[: len(own.logprobs)] == pytest.approx(own.logprobs, abs=1e-5)
        assert logged.question == records[logged.id].question
        assert logged.finished is own.finished
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "task=chair", "task.scenes=4", "answers.file=log/chair.jsonl", "name=read", "logger=none"])
    assert end.value.code == 0
    assert "off-policy check: 1.000 of " in capsys.readouterr().out
    read, own = (RunStore(Path(folder)).metrics()["chair"]["metrics"] for folder in ("runs/read", "run"))
    assert read == own


def test_files_are_sent_as_they_are_and_everything_else_as_png(tmp_path):
    Image.new("RGB", (8, 6), (200, 30, 40)).save(tmp_path / "plain.jpg", quality=80)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (8, 6)).save(tmp_path / "turned.jpg", exif=turned)
    Image.new("RGBA", (8, 6), (0, 0, 0, 90)).save(tmp_path / "clear.png")
    Image.new("RGB", (8, 6)).save(tmp_path / "other.bmp")
    kinds = {}

    def note(body, headers):
        url = body["messages"][0]["content"][0]["image_url"]["url"]
        kinds[body["messages"][0]["content"][1]["text"]] = url.partition(";")[0].removeprefix("data:image/")
        return (200, made_up(body))

    names = ["plain.jpg", "turned.jpg", "clear.png", "other.bmp"]
    scripted = Scripted(note)
    with serving(scripted) as url:
        ask(url, tmp_path / "a.jsonl", TinyTask(5, broken={k: tmp_path / name for k, name in enumerate(names)}))
    assert list(dict(sorted(kinds.items())).values()) == ["jpeg", "png", "png", "png", "png"]


def test_a_failing_sample_is_counted_and_tried_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for index in range(3):
        Image.new("RGB", (4, 4), (index, 0, 0)).save(f"{index}.png")
    rows = [{"id": f"q{index}", "image": f"{index}.png", "question": f"{index}?"} for index in range(3)]
    Path("q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    down = {"1?"}

    def some_fail(body, headers):
        question = body["messages"][0]["content"][1]["text"]
        return (418, {"error": {"message": "not now"}}) if question in down else None

    words = ["task=custom", "task.kind=free", "task.file=q.jsonl", "out=a.jsonl"]
    with serving(Scripted(some_fail)) as url:
        words.append(f"engine.base_url={url}")
        assert command(*words) == 2
        output = capsys.readouterr()
        assert "2 of 3 samples answered: a.jsonl" in output.out
        assert (
            "1 of 3 samples failed, the first is sample q1: the server refuses the request: 418 not now" in output.err
        )
        log = read_answers(Path("a.jsonl"))
        assert [answer.id for answer in log.answers if answer.error] == ["q1"]
        down.clear()
        assert command(*words) == 0
        assert "3 of 3 samples answered, 1 of them new" in capsys.readouterr().out
        assert sorted(answer.id for answer in read_answers(Path("a.jsonl")).answers) == ["q0", "q1", "q2"]
        Image.new("RGB", (4, 4), (99, 0, 0)).save("2.png")
        assert command(*words) == 0
        assert "changed since they were asked, so asked again: 1 samples" in capsys.readouterr().err


def test_when_all_fail_the_command_stops_early(tmp_path):
    scripted = Scripted((400, {"error": {"message": "this model reads no images"}}))
    with serving(scripted) as url, pytest.raises(DataError) as error:
        ask(url, tmp_path / "a.jsonl", TinyTask(100), concurrency=4)
    assert str(error.value).startswith("all of the first 16 samples failed; sample s")
    assert str(error.value).endswith("400 this model reads no images")
    assert 16 <= len(lines(tmp_path / "a.jsonl")) < 20  # those under way are noted too


def test_a_missing_image_costs_its_sample_only(tmp_path):
    with serving(Scripted()) as url:
        state = ask(url, tmp_path / "a.jsonl", TinyTask(4, broken={2: tmp_path / "none.png"}))
    assert (state.done, state.failed) == (4, 1)
    assert "sample s02: image '2.png' is missing" in state.first_failure


def test_samples_that_come_with_an_answer_are_not_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4, 4)).save("a.png")
    Path("q.jsonl").write_text('{"image": "a.png", "question": "?", "answer": "Yes"}\n')
    with serving(Scripted()) as url:
        assert command("task=custom", "task.file=q.jsonl", f"engine.base_url={url}") == 2
    assert "comes with an answer; there is nothing to ask" in capsys.readouterr().err


def test_settings_are_checked_before_anything_else(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    nobody = "engine.base_url=http://127.0.0.1:1/v1"
    for words in (["limit=0", nobody], ["limit=2"], ["generation=beam", nobody], ["limit=2", nobody]):
        assert command(*words) == 2
    printed = capsys.readouterr().err
    assert "limit=0 should be a whole number, 1 or more" in printed
    assert "engine.base_url must be given" in printed
    assert "have no beam search" in printed
    assert f"{nobody} cannot be reached" in printed
    assert not list(tmp_path.glob("*.jsonl"))


def test_asking_takes_no_torch():
    modules = "stethoscope.commands.answer, stethoscope.evaluation.server_answers, stethoscope.tasks.pope"
    script = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


# --- killed on the way ------------------------------------------------------------------------------------------------


def start_server(port, seconds=0.1):
    return subprocess.Popen([sys.executable, SERVER, str(port), str(seconds)])


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.02)


@pytest.mark.slow
def test_a_hundred_requests_survive_a_server_killed_twice(tmp_path):
    """About ten seconds."""
    path, port, task, states = tmp_path / "a.jsonl", free_port(), TinyTask(100), []
    servers = [start_server(port)]
    wait_for(lambda: answers_at(port))
    client = threading.Thread(
        target=lambda: states.append(ask(f"http://127.0.0.1:{port}/v1", path, task, concurrency=8))
    )
    client.start()
    try:
        for answered in (20, 60):
            wait_for(lambda count=answered: path.exists() and path.read_bytes().count(b"\n") >= count)
            servers[-1].kill()  # SIGKILL, with eight requests on their way
            servers[-1].wait()
            servers.append(start_server(port))
        client.join(120)
    finally:
        for server in servers:
            server.kill()
    (state,) = states
    assert (state.done, state.failed, state.resumed) == (100, 0, 0)
    check_made_up(path, task)


@pytest.mark.slow
def test_a_server_that_stays_away_ends_the_command_which_then_goes_on(tmp_path):
    """About ten seconds."""
    path, port, task = tmp_path / "a.jsonl", free_port(), TinyTask(60)
    url = f"http://127.0.0.1:{port}/v1"
    server = start_server(port)
    wait_for(lambda: answers_at(port))
    killer = threading.Thread(target=lambda: (wait_for(lambda: path.exists() and len(lines(path)) > 10), server.kill()))
    killer.start()
    with pytest.raises(
        CapabilityError, match=rf"base_url={url} cannot be reached \(.*, 2 times\); once its server runs"
    ):
        ask(url, path, task, concurrency=4, retries=1)
    killer.join()
    assert 10 < len(lines(path)) < 60
    assert not any("error" in row for row in lines(path))
    server = start_server(port, 0)
    wait_for(lambda: answers_at(port))
    try:
        state = ask(url, path, task)
    finally:
        server.kill()
    assert (state.done, state.failed) == (60, 0)
    check_made_up(path, task)


def answers_at(port):
    import httpx2

    try:
        return httpx2.get(f"http://127.0.0.1:{port}/v1/models").status_code == 200
    except httpx2.TransportError:
        return False


@pytest.mark.slow
def test_a_client_killed_twice_goes_on(tmp_path):
    """About fifteen seconds; with a half line, as a power cut leaves it."""
    path = tmp_path / "a.jsonl"
    with serving(Scripted(delay=0.05)) as url:
        words = [sys.executable, "-m", "stethoscope", "answer", "task=pope", "task.scenes=20", "limit=100",
                 "engine.concurrency=2", f"engine.base_url={url}", f"out={path}"]  # fmt: skip
        before = 0
        for _ in range(2):
            process = subprocess.Popen(words, cwd=tmp_path)
            wait_for(lambda count=before: path.exists() and path.read_bytes().count(b"\n") >= count + 20)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            before = path.read_bytes().count(b"\n")
            assert before < 100
        path.write_bytes(path.read_bytes() + b'{"id": "random-')
        process = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        wait_for(lambda: path.read_bytes().count(b"\n") >= before + 10)
        process.send_signal(signal.SIGINT)
        assert "interrupted; the same command goes on from here" in process.communicate()[1]
        assert process.returncode == 130
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "100 of 100 samples answered" in done.stdout
    ids = [row["id"] for row in lines(path)]
    assert len(ids) == len(set(ids)) == 100


@pytest.mark.slow
def test_transformers_serves_the_embedded_model(tmp_path, monkeypatch, recwarn):
    """About twenty seconds: the server of somebody else, which gives no token ids."""
    pytest.importorskip("openai")  # `transformers serve` needs it
    adapter = stethoscope.load("testbed")
    cached = tmp_path / "hub" / "models--stethoscope--testbed"
    snapshot = cached / "snapshots" / ("0" * 40)
    shutil.copytree(MODEL_DIR, snapshot)
    (snapshot / "chat_template.jinja").write_text(TEMPLATE)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    port = free_port()
    words = ["serve", "--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    script = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    log = (tmp_path / "server.log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-c", script, *words], env=environment, cwd=tmp_path, stdout=log, stderr=log
    )
    try:
        wait_for(lambda: server.poll() is not None or answers_at(port), 180)
        state = ask(f"http://127.0.0.1:{port}/v1", tmp_path / "a.jsonl", Chair(scenes=3), concurrency=2, retries=1)
    finally:
        server.kill()
    assert (state.done, state.failed, state.with_ids) == (3, 0, 0)
    assert [str(warning.message) for warning in recwarn if "refuses return_token_ids" in str(warning.message)]
    Evaluator(run_dir=tmp_path / "run").run(adapter, Chair(scenes=3))
    own = {record.sample_id: record.answer.text for record in RunStore(tmp_path / "run").records("chair")}
    assert {answer.id: answer.text.strip() for answer in read_answers(tmp_path / "a.jsonl").answers} == own
