"""A diagnosis of the embedded model's answers, against the passes, tables and warnings that runs make of the same."""

import base64
import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

import stethoscope
from stethoscope import testbed
from stethoscope.core.errors import ArtefactError, CapabilityError, ConfigError, DataError
from stethoscope.core.text import percent
from stethoscope.core.token_table import FeatureSchema
from stethoscope.core.types import Generation
from stethoscope.detection.design_matrix import Design
from stethoscope.detection.lookup import mention_warnings
from stethoscope.diagnosis.render import describe_reply, payload
from stethoscope.diagnosis.run_diagnosis import diagnose
from stethoscope.features import GROUPS, FeatureSet
from stethoscope.features.columns import feature_of
from stethoscope.storage.run_dir import RunStore
from stethoscope.tasks.chair import Chair
from stethoscope.tasks.extraction import Extraction
from stethoscope.tasks.noun_extraction import Vocabulary
from stethoscope.tracing.mention_passes import trace_answers

QUESTION = "Please describe this image in detail."


@pytest.fixture(scope="module")
def adapter():
    return stethoscope.load("testbed")


@pytest.fixture(scope="module")
def run(adapter, tmp_path_factory):
    """Make a run of captions, its token table and a detector fitted on it."""
    folder = tmp_path_factory.mktemp("run")
    features = FeatureSet(groups=["uncertainty", "position", "attention"])
    stethoscope.Evaluator(features=features, run_dir=folder, batch_size=32).run(adapter, Chair(scenes=36))
    table = RunStore(folder).tokens("chair")
    return RunStore(folder), table, stethoscope.Detector(C=0.1).fit(table)


@pytest.fixture(scope="module")
def scene():
    return testbed.scenes(2)[1].image()


@pytest.fixture(scope="module")
def plain(adapter, scene):
    return diagnose(adapter, scene, QUESTION)


@pytest.fixture(scope="module")
def judged(adapter, scene, run):
    return diagnose(adapter, scene, QUESTION, detector=run[2])


def test_the_answer_is_the_models_own_and_every_token_is_told(adapter, scene, plain):
    encoded = adapter.encode(scene, QUESTION)
    answer = adapter.generate([encoded], Generation(max_new_tokens=128))[0]
    assert plain.answer == answer
    logits = adapter.trace(encoded, answer, ()).logits.double()
    assert np.allclose(
        plain.token_probability, logits.softmax(-1).gather(-1, torch.tensor([answer.token_ids]).T)[:, 0], atol=1e-4
    )
    assert np.allclose(plain.entropy, torch.distributions.Categorical(logits=logits).entropy(), atol=1e-4)
    assert plain.question_tokens[0] == "Please"
    assert plain.warning is None
    assert plain.warned == ()


def test_mentions_are_those_of_the_task_in_its_order(adapter, scene):
    text = "The image shows a kitchen with a knife and a fork. The knife is on the left side. There is also a clock."
    diagnosis = diagnose(adapter, scene, QUESTION, answer=text)
    assert [(named.object, text[named.start : named.end]) for named in diagnosis.mentions] == [
        ("knife", "knife"), ("fork", "fork"), ("knife", "knife"), ("clock", "clock"),
    ]  # fmt: skip
    for named in diagnosis.mentions:
        assert "".join(diagnosis.answer.tokens[token] for token in named.tokens).strip() == named.object


def test_evolution_agrees_with_the_trace_and_ends_in_the_answer(adapter, scene, plain):
    trace = adapter.trace(adapter.encode(scene, QUESTION), plain.answer, {"lens"})
    evolution = plain.evolution
    assert np.allclose(evolution.logprob, trace.lens_logprob, atol=1e-4)
    assert (evolution.rank == trace.lens_rank.numpy()).all()
    assert (evolution.rank[:, -1] == 0).all()  # greedy
    assert np.allclose(evolution.probabilities[:, -1, 0], plain.token_probability, atol=1e-4)
    assert tuple(texts[-1][0] for texts in evolution.top_tokens) == evolution.answer_tokens
    assert (np.diff(evolution.probabilities, axis=-1) <= 0).all()


def test_contributions_end_in_the_features_of_the_same_name(adapter, scene, plain):
    trace = adapter.trace(adapter.encode(scene, QUESTION), plain.answer, {"relevancy"})
    names = [f"visual_contribution_{kind}" for kind in plain.contributions]
    columns = FeatureSet(groups=(), names=names).compute(trace)
    for name, values in zip(names, plain.contributions.values(), strict=True):
        assert np.allclose(values[:, -1], columns[name], atol=1e-4)
    assert np.allclose(sum(plain.shares.values()), 1, atol=1e-5)


def test_heat_maps_keep_the_relevancy_and_show_the_object(adapter, scene, plain):
    for raw, whole in ((True, plain.relevancy.image), (False, plain.relevancy.patches.flatten(2))):
        for token, layer in ((0, 0), (7, -1), (10, 2)):
            heat_map = plain.heat_map(token, layer, raw)
            assert heat_map.shape == (96, 96)
            assert heat_map.sum() == pytest.approx(float(whole[token, layer].sum()), rel=1e-2)
    maps = plain.heat_maps((8, 8), [1, 3], raw=True)
    assert np.allclose(maps[7, 1], plain.relevancy.image[7, 3].reshape(8, 8), atol=2e-3)
    (best, share), *_ = plain.regions(7, count=64)
    assert sum(value for _, value in plain.regions(7, count=64)) == pytest.approx(1, abs=1e-6)
    assert share == pytest.approx(float(plain.relevancy.image[7, -1].max() / plain.relevancy.image[7, -1].sum()))
    knife = next(thing for thing in testbed.scenes(2)[1].objects if thing.category == "knife")
    for middle, start in (((best[0] + best[2]) / 2, knife.x), ((best[1] + best[3]) / 2, knife.y)):
        assert start <= middle <= start + knife.size


def test_warnings_are_those_of_a_run(adapter, run):
    store, table, detector = run
    expected = mention_warnings(table, detector)
    scenes = {scene.id: scene.image() for scene in testbed.scenes(6)}
    compared = 0
    for name, image in scenes.items():
        answer = store.find("chair", name).answer
        diagnosis = diagnose(adapter, image, QUESTION, answer=answer, detector=detector)
        rows = expected[expected["sample_id"] == name]
        assert [named.object for named in diagnosis.mentions] == rows["object"].tolist()
        for named, (_, row) in zip(diagnosis.mentions, rows.iterrows(), strict=True):
            assert named.verdict.probability == pytest.approx(row["probability"], abs=1e-3)
            assert named.verdict.evidence == pytest.approx(row["evidence"], abs=1e-2)
            assert named.verdict.prior == pytest.approx(row["prior"], abs=1e-6)
            assert named.warned == row["warned"]
            compared += 1
    assert compared > 12


def test_evidence_and_prior_add_up_and_the_features_are_told(judged, run):
    for verdict in judged.verdicts:
        odds = np.log(verdict.probability / (1 - verdict.probability))
        assert verdict.evidence + verdict.prior == pytest.approx(odds, abs=1e-6)
        assert {name for name, _ in verdict.top} <= set(run[2].features)
        strengths = [abs(push) for _, push in verdict.top]
        assert strengths == sorted(strengths, reverse=True)
        assert len(strengths) == 5
    assert np.isnan(judged.warning[0])
    assert judged.warning[7] == judged.mentions[0].verdict.probability
    assert judged.threshold == run[2].threshold


def test_the_whole_is_json_and_a_table(judged):
    data = json.loads(json.dumps(judged.to_dict(), allow_nan=False))
    assert data["answer"] == judged.answer.text
    assert len(data["tokens"]) == len(judged)
    assert data["tokens"][7]["warning"] == pytest.approx(judged.mentions[0].verdict.probability, abs=1e-5)
    assert data["tokens"][0]["warning"] is None
    assert data["mentions"][0]["object"] == "knife"
    assert len(data["tokens"][7]["relevancy"]["image"]) == 64
    assert len(data["tokens"][7]["relevancy"]["answer"]) == 7
    frame = judged.to_frame()
    assert len(frame) == len(judged)
    assert frame["object"][7] == "knife"
    shares = frame[[name for name in frame if name.startswith("share_")]].sum(axis=1)
    assert np.allclose(shares, 1, atol=1e-5)


def test_another_ones_answer_and_the_other_scope(adapter, scene):
    text = "A dog sits on the couch."
    rows = diagnose(adapter, scene, QUESTION, answer=text)
    tokens = diagnose(adapter, scene, QUESTION, answer=text, scope="token")
    assert rows.answer.text.strip() == text
    assert [named.object for named in rows.mentions] == ["dog", "couch"]
    assert np.allclose(
        rows.relevancy.image[0], tokens.relevancy.image[0], rtol=1e-3, atol=1e-6
    )  # prompt rows are its own
    assert not np.allclose(rows.relevancy.image[4], tokens.relevancy.image[4], rtol=1e-3, atol=1e-6)


def test_plot_needs_matplotlib_and_draws_the_token(judged, tmp_path):
    pytest.importorskip("matplotlib")
    figure = judged.plot(7)
    assert "knife" in figure.axes[0].get_title()
    figure.savefig(tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").width > 500


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"question": "  "}, ConfigError, "question is empty"),
        ({"image": "nowhere.png"}, DataError, "nowhere.png"),
        ({"scope": "rows"}, ConfigError, "scope='rows' should be row or token"),
        ({"answer": ""}, DataError, "answer is empty"),
        ({"detector": "nowhere"}, ArtefactError, "nowhere"),
    ],
    ids=str,
)
def test_errors_say_what_is_wrong(adapter, scene, arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        diagnose(adapter, **{"image": scene, "question": QUESTION, **arguments})
    assert "\n" not in str(caught.value)


def test_tokens_and_layers_that_are_not_there(plain):
    with pytest.raises(ConfigError, match=f"token=99 is not one of the answer's {len(plain)} tokens"):
        plain.heat_map(99)
    with pytest.raises(ConfigError, match="layer=4 is not one of the model's 4 layers"):
        plain.heat_map(0, layer=4)


def test_a_detector_of_another_model_is_refused(scene, run):
    other = stethoscope.load("qwen2-vl-2b", random_init="tiny")
    with pytest.raises(CapabilityError, match=r"detector reads features that .* does not give.*missing: attn_"):
        diagnose(other, scene, QUESTION, answer="A dog.", detector=run[2])


def test_a_detector_with_an_unknown_feature_is_refused(adapter, scene, run):
    detector = stethoscope.Detector()
    detector.design = Design(FeatureSchema(("nll", "telepathy_l00")))
    with pytest.raises(CapabilityError, match="unknown feature 'telepathy'"):
        diagnose(adapter, scene, QUESTION, answer="A dog.", detector=detector)


class Deaf:
    """The embedded model without relevancy or words: what a model behind an API would give."""

    def __init__(self, adapter):
        self._adapter, self.name = adapter, "deaf"
        self.setup, self.encode_as, self.answer = adapter.setup, adapter.encode_as, adapter.answer
        self.encode = adapter.encode

    def trace(self, encoded, answer, requires):
        if "relevancy" in requires:
            raise CapabilityError("deaf gives no relevancy")
        return self._adapter.trace(encoded, answer, requires)

    def trace_batch(self, encoded, answers, requires):
        return [self.trace(prompt, answer, requires) for prompt, answer in zip(encoded, answers, strict=True)]


def test_what_a_model_cannot_give_is_left_out_and_said(adapter, scene, run):
    diagnosis = diagnose(Deaf(adapter), scene, QUESTION, answer="A dog and a cat.", detector=run[2])
    assert diagnosis.relevancy is None
    assert diagnosis.evolution is None
    assert "deaf gives no relevancy" in diagnosis.notes
    assert [named.verdict is not None for named in diagnosis.mentions] == [True, True]
    assert "deaf gives no relevancy" in diagnosis.to_html()
    assert diagnosis._repr_html_()
    json.dumps(diagnosis.to_dict(), allow_nan=False)
    with pytest.raises(CapabilityError, match="deaf gives no relevancy"):
        diagnosis.heat_map(0)


def test_a_detector_that_needs_what_the_model_cannot_give(adapter, scene):
    detector = stethoscope.Detector()
    detector.design = Design(FeatureSchema(("nll", "relevancy_peak")))
    with pytest.raises(CapabilityError, match="the detector reads features that deaf does not give"):
        diagnose(Deaf(adapter), scene, QUESTION, answer="A dog.", detector=detector)


def test_queries_have_no_place_and_the_tower_has(scene):
    diagnosis = diagnose(stethoscope.load("blip2-opt-2.7b", random_init="tiny"), scene, QUESTION, answer="a dog")
    with pytest.raises(CapabilityError, match="form no grid"):
        diagnosis.heat_map(0, raw=True)
    assert diagnosis.heat_map(0).sum() == pytest.approx(float(diagnosis.relevancy.patches[0, -1].sum()), rel=1e-2)
    assert '"maps":{"tower"' in diagnosis.to_html()


def test_the_features_of_any_table_are_told_from_its_columns(adapter, scene):
    """Also those with a column for every layer and head."""
    every = FeatureSet(groups=GROUPS)
    encoded = adapter.encode(scene, QUESTION)
    answer = adapter.answer(encoded, "A dog.")
    columns = every.compute(trace_answers(adapter, [encoded], [answer], every.requires, [scene], [()])[0])
    assert any(name.endswith("_l00h00") for name in columns)
    assert set(map(feature_of, columns)) == set(every.names)


def test_public_names():
    assert stethoscope.diagnose is diagnose
    assert stethoscope.Diagnosis.__name__ == "Diagnosis"


def test_mentions_are_labelled_by_what_the_picture_shows(adapter):
    scene = testbed.scenes(2)[1]
    answer = "There is a knife, a fork and a clock in the room."
    mentions = diagnose(adapter, scene.image(), QUESTION, answer=answer, truth=scene.visible).mentions
    assert [mention.label for mention in mentions] == [
        int(name not in scene.visible) for name in ("knife", "fork", "clock")
    ]
    assert {mention.outcome for mention in mentions} == {""}  # no detector, so none is caught or missed
    words = Extraction(
        "words", Vocabulary({"blade": ["knife"], "room": []}).mentions, None, {"knife": "blade", "room": "room"}
    )
    named = diagnose(adapter, scene.image(), QUESTION, answer=answer, truth=scene.visible, extraction=words).mentions
    assert [(mention.object, mention.label) for mention in named] == [("blade", 0), ("room", -1)]  # COCO knows no rooms


def test_mentions_of_a_record_keep_their_labels(adapter, run, scene):
    store, _, detector = run
    record = store.find("chair", "counter-000001")
    diagnosis = diagnose(adapter, scene, QUESTION, record.answer, detector, mentions=record.mentions)
    assert [(mention.object, mention.label) for mention in diagnosis.mentions] == [
        (mention.object, mention.label) for mention in record.mentions
    ]
    assert sum(diagnosis.outcomes.values()) == len([mention for mention in record.mentions if mention.label >= 0])


@pytest.mark.parametrize("name", ["china.jpg", pytest.param("grace_hopper.jpg", marks=pytest.mark.slow)])
def test_no_percentage_of_a_photograph_is_called_calibrated(adapter, name):
    if name == "china.jpg":
        picture = load_sample_image(name)
    else:
        picture = np.asarray(Image.open(pytest.importorskip("matplotlib.cbook").get_sample_data(name, asfileobj=False)))
    diagnosis = diagnose(adapter, Image.fromarray(picture), QUESTION, detector=testbed.DETECTOR_DIR)
    assert "no percentage here is calibrated" in diagnosis.shift
    assert diagnosis.calibration == "shifted"
    assert diagnosis.to_dict()["calibration"] == "shifted"
    assert diagnosis.shift in diagnosis.to_html()
    scene = diagnose(adapter, testbed.scenes(2)[1].image(), QUESTION, detector=testbed.DETECTOR_DIR)
    assert (scene.shift, scene.calibration) == ("", "calibrated")


def test_an_answer_that_names_nothing_is_explained(adapter, scene):
    diagnosis = diagnose(adapter, scene, "Is there a dog in the image?", detector=testbed.DETECTOR_DIR)
    word = diagnosis.answer.text.strip(" .").lower()
    reply = describe_reply(diagnosis)
    assert f"The answer is {word} and names no object itself" in reply
    assert f"{word} {percent(diagnosis.token_probability[0])}" in reply
    assert "names no object, so" in describe_reply(diagnose(adapter, scene, QUESTION, answer="A quiet room."))


def test_raw_attention_over_the_picture(adapter, scene, plain):
    encoded = adapter.encode(scene, QUESTION)
    trace = adapter.trace(encoded, plain.answer, {"attention"})
    assert np.allclose(plain.attention.mean, trace.image_attention, atol=5e-6)
    assert np.allclose(plain.attention.image_mass, trace.mass[..., 0], atol=5e-6)
    token, last = plain.mentions[0].tokens[0], plain.attention.image_mass.shape[1] - 1
    side = (8, 8)  # the image tokens of the embedded model
    for layer, head, values in (
        (None, "mean", trace.image_attention[token].mean(0)),
        (last, "largest", plain.attention.heads[token, last].amax(0)),
        (1, 2, plain.attention.heads[token, 1, 2]),
    ):
        assert np.allclose(plain.attention_map(token, layer, head, side), values.reshape(side), rtol=0.02, atol=1e-3)
    assert np.allclose(plain.attention_map(token).sum(), trace.image_attention[token].mean(0).sum(), rtol=1e-2)
    assert np.allclose(plain.attention.matrix.sum(-1), 1, atol=1e-5)
    assert np.allclose(plain.to_frame()["attention_image"], trace.mass[..., 0].mean((1, 2)), atol=1e-5)
    assert np.allclose(
        plain.to_dict()["tokens"][token]["attention"]["image"], trace.image_attention[token].mean(0), atol=1e-4
    )
    for arguments, name in (((999,), "token"), ((0, 4), "layer"), ((0, 0, 99), "head"), ((0, 0, "most"), "head")):
        with pytest.raises(ConfigError, match=f"{name}=.*should be"):
            plain.attention_map(*arguments)


def test_the_detector_says_where_it_sees_what_is_named(adapter):
    hits, sure = [], {True: [], False: []}
    for scene in testbed.scenes(3003)[3000:]:
        absent = next(name for name in ("clock", "boat", "dog", "pizza") if name not in scene.visible)
        named = [*scene.visible, absent]
        answer = "The image shows " + ", ".join(f"a {name}" for name in named) + "."
        diagnosis = diagnose(adapter, scene.image(), QUESTION, answer=answer, detector=testbed.DETECTOR_DIR)
        assert list(diagnosis.seen) == named
        shown = payload(diagnosis)["seen"]
        assert shown["shape"] == [8, 8]
        for name in named:
            seen, (probability, cells) = diagnosis.seen_map(name, (8, 8)), shown["objects"][name]
            assert np.abs(seen.ravel() - diagnosis.seen[name]).max() < 0.02  # boxes are measured, to a part of a pixel
            assert seen.max() == pytest.approx(diagnosis.seen[name].max())
            assert seen.max() == pytest.approx(probability, abs=1e-4)
            assert np.allclose(
                np.frombuffer(base64.b64decode(cells), np.uint8) / 255, seen.ravel() / seen.max(), atol=0.02
            )
            sure[name in scene.visible].append(probability)
            if name in scene.visible:
                mask = scene.mask() == 1 + testbed.CATEGORIES.index(name)
                hits.append(mask.reshape(8, 12, 8, 12).any((1, 3)).ravel()[seen.argmax()])
    assert np.mean(hits) > 0.8
    assert np.mean(sure[True]) > 0.7 > 0.2 > np.mean(sure[False])
    with pytest.raises(CapabilityError, match="does not look for 'unicorn' in image tokens, \\['"):
        diagnosis.seen_map("unicorn")


def test_a_detector_without_image_tokens_sees_nothing(judged):
    assert judged.seen == {}
    assert payload(judged)["seen"] is None
