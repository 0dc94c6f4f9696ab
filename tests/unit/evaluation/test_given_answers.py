"""Answers of a log: whose they are, how they are read, what is said of them; and runs without a model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.tiny_world import WORDS, TinyAdapter, TinyFeatures, TinyTask

from stethoscope.adapters.base import ForeignTokens
from stethoscope.adapters.no_model import NoModel
from stethoscope.core.errors import ConfigError, DataError
from stethoscope.core.types import Answer, Generation, ImageRef, Sample
from stethoscope.evaluation.callbacks import Callback
from stethoscope.evaluation.evaluator import Evaluator
from stethoscope.evaluation.given_answers import (
    NOT_OWN,
    describe,
    find_reasoning,
    read_answer,
    summarise,
)
from stethoscope.evaluation.joined_answers import JoinedAnswers
from stethoscope.evaluation.results import TaskResults
from stethoscope.mitigation.decoding import NoiseContrast
from stethoscope.storage.log_values import LoggedAnswer
from stethoscope.storage.logged_answers import AnswerLog
from stethoscope.storage.run_dir import RunStore


class Reader(TinyAdapter):
    """Reads answers of known words, of which it would write all but "cat" itself; ids are indices of words."""

    def answer(self, encoded, text, token_ids=None):
        words = text.split()
        ids = tuple(map(WORDS.index, words))
        if token_ids is not None and tuple(token_ids) != ids:
            raise ForeignTokens(f"the token ids do not decode to {text!r}")
        ends = [len(" ".join(words[: n + 1])) for n in range(len(words))]
        offsets = tuple(zip([0, *ends[:-1]], ends, strict=True))[: len(words)]
        logprobs = tuple(-0.5 if word == "cat" else -0.1 for word in words)
        return Answer(" ".join(words), ids, offsets, logprobs, argmax=tuple(word != "cat" for word in words))


def sample(id_="s1", question="What is it?", subset="all", row=None, answer=None):
    return Sample(id_, ImageRef("a.png", Path("a.png"), row), question, "a", subset, answer=answer)


def log(*answers, **fields):
    numbered = [replace(answer, origin=f"log.jsonl, line {n}") for n, answer in enumerate(answers, 1)]
    settings = {"format": "jsonl", "sha256": "0" * 64, "engine": "vllm", "model": "m", "revision": "r", **fields}
    return AnswerLog(path=Path("log.jsonl"), answers=tuple(numbered), **settings)


def join(answers, samples):
    return JoinedAnswers.join(log(*answers), samples, "pope")


# --- whose answer is it ---------------------------------------------------------------------------------------------


def test_ids_are_joined_and_what_is_missing_is_counted():
    samples = [sample(f"s{n}") for n in range(4)]
    answers = [LoggedAnswer("A", "s2"), LoggedAnswer("B", "s0"), LoggedAnswer("C", "other")]
    joined = join([*answers, LoggedAnswer("", "s3", error="the server said no")], samples)
    assert {id_: answer.text for id_, answer in joined.answers.items()} == {"s2": "A", "s0": "B"}
    assert joined.counts == {"samples": 4, "missing": 2, "failed": 1, "unmatched": 1}


def test_captions_of_coco_are_joined_by_the_number_of_the_image():
    samples = [sample(f"COCO_val2014_{n:012d}", "Describe.") for n in (42, 1042)]
    joined = join([LoggedAnswer("A", "1042"), LoggedAnswer("B", "COCO_val2014_000000000042.jpg")], samples)
    assert {id_[-4:]: answer.text for id_, answer in joined.answers.items()} == {"1042": "A", "0042": "B"}


def test_notes_of_the_reader_are_told():
    given = JoinedAnswers.join(
        log(LoggedAnswer("A", "s1"), notes=("2 further answers are left out",)), [sample()], "pope"
    )
    assert given.to_dict()["notes"] == ["2 further answers are left out"]
    assert describe(given.to_dict())[-1] == "of this log: 2 further answers are left out"
    assert "notes" not in join([LoggedAnswer("A", "s1")], [sample()]).to_dict()


def test_ids_may_be_those_of_the_benchmark_without_the_subset():
    samples = [sample("random-1", "Is there a dog?", "random"), sample("popular-1", "Is there a cat?", "popular")]
    asked = LoggedAnswer("Yes", "1", question="Is there a cat?")
    assert list(join([asked], samples).answers) == ["popular-1"]
    assert list(join([replace(asked, question=None)], samples[:1]).answers) == ["random-1"]
    with pytest.raises(DataError, match=r"line 1: an id that may be that of sample random-1, but neither question"):
        join([replace(asked, question=None)], samples)
    with pytest.raises(DataError, match="line 1: it may belong to samples random-1 and popular-1 alike"):
        join([asked], [replace(item, question="Is there a cat?") for item in samples])


def test_rows_are_joined_with_their_question():
    samples = [sample("b", "Is there a cat?", row=1), sample("a", "Is there a dog?", row=0)]
    prompt = "<image>\nIs there  a DOG?\nAnswer with yes or no."
    answers = [LoggedAnswer("Yes", row=0, prompt=prompt), LoggedAnswer("No", row=1, question="Is there a cat?")]
    assert {id_: answer.text for id_, answer in join(answers, samples).answers.items()} == {"a": "Yes", "b": "No"}
    assert list(join([LoggedAnswer("Yes", "0", question="Is there a dog?")], samples).answers) == ["a"]
    with pytest.raises(DataError, match=r"line 1: a row that may be that of sample a, but neither question nor prompt"):
        join([LoggedAnswer("Yes", row=0)], samples)
    unnumbered = [replace(item, image=ImageRef("a.png", Path("a.png"))) for item in samples]
    assert list(join([LoggedAnswer("Yes", row=1, question="Is there a dog?")], unnumbered).answers) == ["a"]


@pytest.mark.parametrize("key", [{"id": "s1"}, {"row": 0}], ids=str)
def test_another_question_is_refused_with_both_texts(key):
    with pytest.raises(
        DataError, match=r"log asks 'Is it a dog\?', but sample s1 of pope asks 'What is it\?'; the task"
    ):
        join([LoggedAnswer("Yes", question="Is it a dog?", **key)], [sample()])


def test_a_log_of_other_samples_is_refused():
    with pytest.raises(
        DataError, match=r"none of the 1 answers in log.jsonl belongs to a sample: the first has id 'x'"
    ):
        join([LoggedAnswer("Yes", "x")], [sample()])
    with pytest.raises(DataError, match=r"holds no answer to pope, only failures; log.jsonl, line 1: timeout"):
        join([LoggedAnswer("", "s1", error="timeout")], [sample()])
    twice = [LoggedAnswer("Yes", "1", question="What is it?"), LoggedAnswer("No", "1", question="What is it?")]
    with pytest.raises(DataError, match=r"line 2: sample all-1 is answered before, in log.jsonl, line 1"):
        join(twice, [sample("all-1")])
    with pytest.raises(DataError, match="pope itself gives another answer to sample s1, 'No', than the log, 'Yes'"):
        join([LoggedAnswer("Yes", "s1")], [sample(answer="No")])
    assert join([LoggedAnswer("No ", "s1")], [sample(answer="No")]).answers


# --- how it is read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "spans", "answer", "visible"),
    [
        ("<think>a dog?</think> No.", [(0, 21)], "<think>a dog?</think> No.", "No."),
        ("<think>a dog?</think>\n\nNo.", [(0, 21)], "a dog? no.", "no."),  # tags are special tokens, letters small
        ("Yes. <think>no</think>Really.", [(5, 22)], "Yes. <think>no</think>Really.", "Yes. Really."),
        ("<think>never ends", [(0, 17)], "<think>never ends", ""),
    ],
)
def test_reasoning_is_what_is_not_visible(text, spans, answer, visible):
    given = Answer(answer, (), (), (), reasoning=find_reasoning(text, spans, answer))
    assert given.without_reasoning()[0].text == visible


def test_an_answer_that_is_lost_behind_its_reasoning_is_an_error():
    with pytest.raises(DataError, match="the answer behind the reasoning is lost"):
        find_reasoning("<think>a</think> Größe", [(0, 16)], "<think>a</think> Gr??e")


def test_tasks_do_not_see_reasoning_and_mentions_keep_their_place():
    text = "<think>a cat or a dog</think> a dog and a dog"
    answer = Answer(text, (1, 2), ((0, 29), (29, 45)), (-0.1, -0.2), reasoning=((0, 29),))
    score = TinyTask().score_answer(sample(), answer)
    assert score.detail == {"named": ["a", "dog", "and", "a", "dog"]}
    mentions = TinyTask().label_mentions(sample(), answer)
    assert [text[item.start : item.end] for item in mentions] == ["dog", "dog"]
    assert [item.start for item in mentions] == [32, 42]
    assert answer.owners(mentions) == [None, mentions[0]]
    assert TinyTask().evaluate_answer(sample(), answer) == (score, mentions)


def test_prompts_and_log_probabilities_are_compared():
    encoded = Reader().encode(TinyTask().samples()[0].image.load(), "What is it?")
    ours = replace(encoded, text="USER: <image>\nWhat is it? ASSISTANT:")

    def note(**fields):
        return read_answer(Reader(), ours, sample(), LoggedAnswer("a dog", **fields))[1]

    assert note() == {"tokens": "retokenised", "changed": False}
    for prompt in ("USER: <|image_pad|> What is it? ASSISTANT:", "What is it?"):
        assert note(prompt=prompt)["prompt"] == "same"
    assert note(prompt="What is it? Be brief.")["prompt"] == "other"
    numbered = replace(ours, inputs={"input_ids": torch.tensor([[9, 4, 5, 6]])})
    for ids, same in (((9, 9, 9, 4, 5, 6), "same"), ((5, 6), "same"), ((4, 5, 7), "other")):
        logged = LoggedAnswer("a dog", prompt_token_ids=ids)
        assert read_answer(Reader(), replace(numbered), sample(), logged)[1]["prompt"] == same
    exact = note(token_ids=(0, 1), logprobs=(-0.1, -0.3, -9.0))  # the last one is of an end token
    assert exact == {"tokens": "logged", "changed": False, "difference": [0.2, 2]}
    assert "difference" not in note(logprobs=(-0.1, -0.3, -9.0))  # whose tokens are they?
    assert read_answer(Reader(), ours, sample(), LoggedAnswer("a dog", finished=False))[0].finished is False


# --- what is said of it ---------------------------------------------------------------------------------------------


def counted(share, difference=None):
    gap = (
        {"difference": 0.0, "compared": 0} if difference is None else {"difference": difference * 100, "compared": 100}
    )
    counts = {"retokenised": 1, "changed": 1, "prompts": 1, "same_prompts": 0}
    return [{**counts, "tokens": 100, "argmax": share * 100, "logprob": -30.0, **gap}]


def test_answers_that_are_rarely_the_first_choice_were_not_written_by_this_model():
    assert not any(NOT_OWN in line for line in describe(summarise(counted(1.0))))
    assert not any(NOT_OWN in line for line in describe(summarise(counted(0.8, 0.01))))  # sampled
    for figures in (summarise(counted(0.8)), summarise(counted(0.8, 0.5))):
        assert figures["check"]["own"] is False
        text = "\n".join(describe(figures))
        assert "0.800 of 100 tokens are this model's first choice, log-probability -0.300 nats per token" in text
        assert NOT_OWN in text
        assert "tokenised again: 1 answers, which changes the text of 100.0%" in text
        assert "prompts: 1 of 1 in the log are not those that this model reads here" in text
    assert summarise([{}, {}]) == {} == summarise([])
    assert describe({}) == []


# --- runs -------------------------------------------------------------------------------------------------------------


def written(path, count=6, text="a dog and a cat", **fields):
    """A log of answers to the tiny task."""
    lines = [{"id": f"s{n:02d}", "answer": text, "model": "m", **fields} for n in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_run_reads_the_log_and_generates_nothing(tmp_path):
    file, adapter = written(tmp_path / "log.jsonl", count=8, answer_token_ids=[0, 1, 3, 0, 2]), Reader()
    results = Evaluator(run_dir=tmp_path / "run", answers=file, features=TinyFeatures()).run(adapter, TinyTask())
    assert adapter.generated == []
    assert results.counts["samples"] == 8
    assert results.answers["missing"] == 2
    assert results.answers["logged"] == 8
    check = {"tokens": 40, "argmax_share": 0.8, "logprob_difference": None, "own": False}
    assert results.answers["check"] == {**check, "mean_logprob": pytest.approx(-0.18)}
    assert NOT_OWN in str(results)
    assert results.flat()["tiny/answers/argmax_share"] == 0.8
    stored = RunStore(tmp_path / "run")
    assert TaskResults.from_dict("tiny", stored.metrics()["tiny"]).answers == results.answers
    record = stored.find("tiny", "s00")
    assert record.answer.argmax == (True, True, True, True, False)
    assert record.given == {"tokens": "logged", "changed": False}
    assert stored.fingerprints()["tiny"]["answers"]["model"] == "m"
    assert len(stored.tokens("tiny")) == 40


def test_limit_is_taken_from_the_samples_with_an_answer(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text("".join(json.dumps({"id": f"s0{n}", "answer": "a dog"}) + "\n" for n in (3, 7, 8)))
    results = Evaluator(answers=file, limit=2).run(Reader(), TinyTask())
    assert results.counts["samples"] == 2
    assert results.answers["missing"] == 7


class StopAfterOneBatch(Callback):
    def on_batch_end(self, run, records):
        raise KeyboardInterrupt


def test_a_run_goes_on_with_the_same_file_only(tmp_path):
    file = written(tmp_path / "log.jsonl")
    settings = {"run_dir": tmp_path / "run", "batch_size": 2}
    with pytest.raises(KeyboardInterrupt):
        Evaluator([StopAfterOneBatch()], answers=file, **settings).run(Reader(), TinyTask(count=6))
    with (tmp_path / "run" / "samples.jsonl").open("a") as half:
        half.write('{"task": "tiny", "sample_id": "s03"')
    moved = file.rename(tmp_path / "moved.jsonl")
    results = Evaluator(answers=moved, **settings).run(Reader(), TinyTask(count=6))
    whole = Evaluator(answers=moved).run(Reader(), TinyTask(count=6))
    assert (results.metrics, results.answers) == (whole.metrics, whole.answers)
    written(moved, text="a dog")
    with pytest.raises(ConfigError, match=r"answers.sha256: '\w+'... before"):
        Evaluator(answers=moved, **settings).run(Reader(), TinyTask(count=6))
    with pytest.raises(ConfigError, match=r"answers: {.* before, None now"):
        Evaluator(**settings).run(Reader(), TinyTask(count=6))
    before = (tmp_path / "run" / "samples.jsonl").read_text()
    extract = Evaluator(features=TinyFeatures(), overwrite="features", **settings)
    extract.run(Reader(), TinyTask(count=6))  # needs no log
    assert len(RunStore(tmp_path / "run").tokens("tiny")) == 30
    assert before.count('"given"') == 6
    with pytest.raises(ConfigError, match="it takes no others"):
        Evaluator(answers=moved, overwrite="features", **settings)
    mitigated = Generation(mitigation=NoiseContrast())
    with pytest.raises(ConfigError, match="mitigation=vcd changes how answers are written, but a log gives them"):
        Evaluator(answers=moved, generation=mitigated)


def test_ids_of_another_tokenizer_stop_the_run_and_a_single_odd_answer_does_not(tmp_path):
    file = written(tmp_path / "log.jsonl", answer_token_ids=[0, 1, 3, 0, 5])
    with pytest.raises(ConfigError, match=r"log.jsonl, line 1: .* do not decode .*; choose the model that wrote the"):
        Evaluator(answers=file).run(Reader(), TinyTask(count=6))
    results = Evaluator(answers=file, answer_ids=False).run(Reader(), TinyTask(count=6))
    assert results.answers["retokenised"] == 6
    lines = file.read_text().replace("0, 5]", "0, 2]").splitlines()
    file.write_text("\n".join([*lines[:5], lines[5].replace("0, 2]", "0, 5]")]) + "\n")
    results = Evaluator(answers=file).run(Reader(), TinyTask(count=6))
    assert results.counts["failed"] == 1


def test_without_a_model_texts_are_scored_and_pictures_stay_closed(tmp_path):
    file = written(tmp_path / "log.jsonl")
    closed = TinyTask(count=6, broken=dict.fromkeys(range(6), tmp_path / "gone.png"))
    results = Evaluator(answers=file, run_dir=tmp_path / "run").run(NoModel(), closed)
    assert results.metrics == Evaluator(answers=file).run(Reader(), TinyTask(count=6)).metrics
    assert "check" not in results.answers
    again = Evaluator(answers=file, run_dir=tmp_path / "run").run(NoModel(), closed)
    assert again.metrics == results.metrics


def test_what_needs_a_model_is_refused_before_any_work(tmp_path):
    file, task = written(tmp_path / "log.jsonl"), TinyTask()
    task.setup = lambda: pytest.fail("read its data")
    with pytest.raises(ConfigError, match="model=none only scores texts, but features are read from a model"):
        Evaluator(answers=file, features=TinyFeatures()).run(NoModel(), task)
    task.reads_tokens = True
    with pytest.raises(ConfigError, match="model=none only scores texts, but tiny reads tokens"):
        Evaluator(answers=file).run(NoModel(), task)
    with pytest.raises(ConfigError, match="model=none writes no answers: name a file of them"):
        Evaluator().run(NoModel(), TinyTask())
    for call in (lambda: NoModel().encode(None, ""), lambda: NoModel().generate([], None)):
        with pytest.raises(Exception, match=r"model=none .*: it only scores the answers of a file"):
            call()
