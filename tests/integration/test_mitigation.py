"""A mitigation as a choice of a run: in its identity, with sampling and features, refused before a model is loaded."""

import json

import pytest
from helpers.tiny_world import TinyAdapter, TinyTask

import stethoscope as package
from stethoscope.core.errors import CapabilityError, ConfigError
from stethoscope.core.json_rows import violation
from stethoscope.core.types import Generation
from stethoscope.evaluation.evaluator import Evaluator
from stethoscope.mitigation.answers import Ask, Drop, Rerank
from stethoscope.mitigation.decoding import Cut, FirstLogitBoosting, NoImageContrast, NoiseContrast
from stethoscope.testbed import DETECTOR_DIR

THRESHOLD = json.loads((DETECTOR_DIR / "manifest.json").read_text())["threshold"]["value"]
RUN = ["task=chair", "task.scenes=12", "callbacks=none", "logger=none"]


def records(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_a_run_has_its_mitigation(stethoscope, tmp_path):
    stethoscope("evaluate", *RUN, "mitigation=vcd", "generation=sample", "name=vcd", code=0)
    stethoscope("evaluate", *RUN, "generation=sample", "name=none", code=0)
    fingerprint = json.loads((tmp_path / "runs/vcd/fingerprint.json").read_text())["chair"]
    method = fingerprint["generation"]["mitigation"]
    assert method["name"] == "vcd"
    assert method["settings"] == {"alpha": 1.0, "beta": 0.1, "step": 500, "seed": 0}
    changed, plain = records(tmp_path / "runs/vcd"), records(tmp_path / "runs/none")
    assert sum(a["answer"]["text"] != b["answer"]["text"] for a, b in zip(changed, plain, strict=True)) >= 6
    assert "mitigation" not in json.loads((tmp_path / "runs/none/fingerprint.json").read_text())["chair"]["generation"]
    stethoscope("extract", "run=runs/vcd", "features=fast", code=0)  # the answers are still those of the run
    assert "other settings (generation.mitigation" in stethoscope(
        "evaluate", *RUN, "mitigation=cut", "generation=sample", "name=vcd"
    )
    stethoscope("export", "run=runs/vcd", "to=custom_generate", "out=decoder", code=0)
    assert "'step': 500" in (tmp_path / "decoder/custom_generate/generate.py").read_text()
    assert "written with mitigation=none" in stethoscope("export", "run=runs/none", "to=custom_generate", "out=other")


def test_answers_are_those_of_the_adapter(stethoscope, tmp_path):
    stethoscope("evaluate", *RUN, "mitigation=flb", "mitigation.gamma=0.5", "name=flb", "batch_size=5", code=0)
    adapter = package.load("testbed")
    method = FirstLogitBoosting(gamma=0.5)
    from stethoscope import testbed

    prompts = [adapter.encode(scene.image(), "Please describe this image in detail.") for scene in testbed.scenes(12)]
    answers = adapter.generate(prompts, Generation(max_new_tokens=512, mitigation=method))
    by_id = {record["sample_id"]: record["answer"]["text"] for record in records(tmp_path / "runs/flb")}
    assert sorted(by_id.values()) == sorted(answer.text for answer in answers)


def metrics(folder):
    rows = json.loads((folder / "metrics.json").read_text())["chair"]["metrics"]
    return {row["metric"]: row["value"] for row in rows}


@pytest.mark.parametrize(
    ("method", "scenes", "fewest", "share"),
    [("drop", 20, 4, 0.6), pytest.param("ask", 40, 4, 0.9, marks=pytest.mark.slow)],
)
def test_finished_answers_are_edited(stethoscope, tmp_path, method, scenes, fewest, share):
    stethoscope("evaluate", *RUN, f"task.scenes={scenes}", f"mitigation={method}", "name=edited", code=0)
    stethoscope("evaluate", *RUN, f"task.scenes={scenes}", "name=plain", code=0)
    plain = {record["sample_id"]: record for record in records(tmp_path / "runs/plain")}
    edited = records(tmp_path / "runs/edited")
    changed = [record for record in edited if "edit" in record]
    assert fewest <= len(changed) < scenes
    for record in edited:
        written = plain[record["sample_id"]]["answer"]["text"]
        if "edit" not in record:
            assert record["answer"]["text"] == written
            continue
        edit = record["edit"]
        assert edit["text"] == written
        gone = {index for part in edit["removed"] for index in part["mentions"]}
        doubted = {index for index, item in enumerate(edit["mentions"]) if item["probability"] >= THRESHOLD}
        if method == "drop" or edit["removed"]:  # ``ask`` keeps what the model says yes to
            assert gone & doubted
        else:
            assert doubted
            assert record["answer"]["text"] == written
        kept = [mention["object"] for index, mention in enumerate(edit["mentions"]) if index not in gone]
        assert [mention["object"] for mention in record["mentions"]] == kept
    plain_figures, figures = (metrics(tmp_path / "runs" / name) for name in ("plain", "edited"))
    assert figures["chair_i"] < share * plain_figures["chair_i"]
    assert figures["recall"] > plain_figures["recall"] - 0.06
    assert not any(violation("samples", record) for record in edited)
    stethoscope("extract", "run=runs/edited", "features=fast", code=0)
    assert "other settings" in stethoscope("evaluate", *RUN, f"task.scenes={scenes}", "name=edited")


@pytest.mark.slow
def test_the_best_of_several_samples_is_taken(stethoscope, tmp_path):
    words = [*RUN, "task.scenes=40", "mitigation=rerank"]
    stethoscope("evaluate", *words, "name=best", "limit=10", code=0)
    stethoscope("evaluate", *words, "name=best", "batch_size=5", code=0)  # resumed
    stethoscope("evaluate", *words, "name=again", "limit=12", code=0)
    stethoscope("evaluate", *RUN, "task.scenes=40", "name=plain", code=0)
    plain, best, again = (
        {record["sample_id"]: record for record in records(tmp_path / "runs" / name)}
        for name in ("plain", "best", "again")
    )
    assert (len(again), len(best)) == (12, 40)
    for sample_id, record in again.items():
        assert (record["answer"]["text"], record["edit"]) == (
            best[sample_id]["answer"]["text"],
            best[sample_id]["edit"],
        )
    for sample_id, record in best.items():
        edit = record["edit"]
        texts = [candidate["text"] for candidate in edit["candidates"]]
        scores = [candidate["score"] for candidate in edit["candidates"]]
        assert violation("samples", record) is None
        assert texts[0] == edit["text"] == plain[sample_id]["answer"]["text"]
        assert len(texts) == 5
        assert edit["chosen"] == scores.index(min(scores))
        assert record["answer"]["text"] == texts[edit["chosen"]]
        assert len(record["mentions"]) == edit["candidates"][edit["chosen"]]["mentions"]
        own = [mention["probability"] for mention in edit["mentions"]]
        assert scores[0] == pytest.approx(Rerank().score(own), abs=1e-4)
    assert len({record["edit"]["chosen"] for record in best.values()}) == 5
    plain_figures, figures = (metrics(tmp_path / "runs" / name) for name in ("plain", "best"))
    assert figures["chair_i"] < 0.9 * plain_figures["chair_i"]
    assert figures["recall"] > plain_figures["recall"] - 0.06
    stethoscope("extract", "run=runs/best", "features=fast", code=0)
    for changed in ("mitigation.gain=1", "mitigation.candidates=3", "+generation.seed=1"):
        assert "other settings" in stethoscope("evaluate", *words, changed, "name=best")


@pytest.mark.parametrize("method", ["drop", "rerank", "backtrack"])
def test_a_yes_or_no_is_not_edited(stethoscope, tmp_path, method):
    words = ["task=pope", "task.scenes=4", "callbacks=none", "logger=none", "limit=24"]
    stethoscope("evaluate", *words, f"mitigation={method}", "name=edited", code=0)
    assert not any("edit" in record for record in records(tmp_path / "runs/edited"))


def test_a_detector_is_needed(stethoscope):
    tiny = ["model=hf", "model.random_init=tiny", "mitigation=drop"]
    assert "mitigation=drop needs a detector of tiny-llava" in stethoscope("evaluate", *RUN, *tiny)
    assert "nowhere is no directory" in stethoscope("evaluate", *RUN, *tiny, "mitigation.detector=nowhere")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mitigation=vcd", "generation=beam"], "mitigation=vcd goes with greedy decoding and sampling"),
        (["mitigation=cut", "mitigation.beta=3"], "mitigation.beta=3 should be a number from 0 to 1"),
        (
            ["mitigation=rerank", "mitigation.candidates=1"],
            "mitigation.candidates=1 should be a whole number of at least 2",
        ),
        (["mitigation=rerank", "mitigation.candidates=2.5"], "mitigation.candidates=2.5 should be a whole number"),
        (["mitigation=rerank", "mitigation.detector=nowhere"], "nowhere is no directory"),
        (["mitigation=opera"], "opera"),
        (["mitigation._target_=stethoscope.tasks.pope.Pope"], "is no Mitigation"),
    ],
)
def test_wrong_choices_end_before_the_model_is_loaded(stethoscope, words, message):
    assert message in stethoscope("evaluate", *RUN, "model=hf", "model.model_id=nowhere", *words)


class NeverLoaded(TinyAdapter):
    """An adapter that gives no access to its decoding, and that no refused run may load."""

    def setup(self):
        raise AssertionError("loaded")


METHODS = [Cut(), FirstLogitBoosting(), NoImageContrast(), NoiseContrast(), Drop(), Ask(), Rerank()]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_what_a_model_cannot_do_is_refused_in_a_line_before_it_is_loaded(method):
    message = "changes how tiny writes its answers" if method.changes_scores else "needs a detector of tiny"
    with pytest.raises((CapabilityError, ConfigError), match=f"^mitigation={method.name} {message}") as refusal:
        Evaluator(generation=Generation(mitigation=method)).run(NeverLoaded(), TinyTask())
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("method", METHODS[:4], ids=lambda method: method.name)
def test_a_decoder_that_does_not_go_with_beams_is_refused(method):
    with pytest.raises(ConfigError, match=f"^mitigation={method.name} goes with greedy decoding and sampling"):
        Generation(num_beams=2, mitigation=method)


def test_a_score_weighs_expected_hallucinations_against_right_mentions():
    assert Rerank(gain=0).score([0.1, 0.9]) == pytest.approx(1.0)
    assert Rerank(gain=0.5).score([0.1, 0.9]) == pytest.approx(1.0 - 0.5)
    assert Rerank(gain=0.5).score([]) == 0
    break_even = 0.25 / 1.25
    assert Rerank(gain=0.25).score([break_even]) == pytest.approx(0)
    seeds = [settings.seed for settings in Rerank(candidates=3).settings(Generation(seed=7, num_beams=4))]
    assert seeds == [8, 9]
    assert [method.passes_per_token for method in (Rerank(), Drop(), NoiseContrast())] == [5, 1, 2]
