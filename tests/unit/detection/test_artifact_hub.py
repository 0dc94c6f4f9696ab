"""Pushing to and fetching from the hub: the real client against a small server that keeps files as the hub does."""

import pytest
from helpers.hub_server import local_hub
from helpers.token_tables import halves, token_table
from huggingface_hub import ModelCard

from stethoscope.core.errors import ArtefactError
from stethoscope.core.token_table import mention_rows
from stethoscope.detection.detector import Detector
from stethoscope.detection.training import describe_label

TRAIN, CALIBRATION = halves(token_table(300))
TEST = mention_rows(token_table(50, seed=9))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of one's own on this machine, empty, and an empty cache."""
    with local_hub(monkeypatch, tmp_path) as server:
        yield server


@pytest.fixture(scope="module")
def fitted():
    detector = Detector(threshold={"max_missed": 0.4}).fit(TRAIN, CALIBRATION)
    detector.notes = {
        "model": {"model_id": "llava-1.5-7b"},
        "task": {"name": "chair", "version": "1"},
        "label": describe_label(detector),
        "figures": {"auroc": {"value": 0.91234, "low": 0.9, "high": 0.92, "items": 100, "groups": 30}},
    }
    return detector


def test_a_detector_goes_to_the_hub_and_comes_back(hub, fitted):
    address = fitted.push_to_hub("me/detector", private=True, token="hf_secret")
    assert address.endswith(f"/commit/{1:040x}")
    assert hub.made.get("private") or hub.made.get("visibility") == "private"
    assert all(authorization == "Bearer hf_secret" for _, authorization in hub.asked)
    assert set(hub.commits[f"{1:040x}"]) == {"README.md", "detector.safetensors", "manifest.json"}
    again = Detector.from_pretrained("me/detector", token="hf_secret")
    assert (again.predict(TEST) == fitted.predict(TEST)).all()
    assert again.certificate == fitted.certificate
    assert again.notes == fitted.notes


def test_a_revision_is_that_revision(hub, fitted):
    other = Detector(features=["nll"]).fit(TRAIN, CALIBRATION)
    fitted.push_to_hub("me/detector", token="t")
    other.push_to_hub("me/detector", token="t")
    assert Detector.from_pretrained("me/detector").features == ("nll",)
    assert Detector.from_pretrained("me/detector", revision=f"{1:040x}").features == fitted.features


def test_what_is_not_there_is_said_in_one_line(hub, fitted, tmp_path):
    with pytest.raises(ArtefactError, match="no detector at 'you/nothing', which is no folder; on the hub: ") as error:
        Detector.from_pretrained("you/nothing")
    assert "\n" not in str(error.value)
    fitted.push_to_hub("me/detector", token="t")
    with pytest.raises(ArtefactError, match="RevisionNotFound"):
        Detector.from_pretrained("me/detector", revision="v9")
    with pytest.raises(ArtefactError, match="no/such/name"):
        Detector.from_pretrained("no/such/name")
    with pytest.raises(ArtefactError, match="not fitted"):
        Detector().push_to_hub("me/detector", token="t")
    hub.shutdown()
    hub.server_close()
    with pytest.raises(ArtefactError, match="cannot be pushed to 'me/detector'"):
        fitted.push_to_hub("me/detector", token="t")


def test_a_local_folder_needs_no_hub(fitted, tmp_path):
    fitted.save(tmp_path / "detector")
    again = Detector.from_pretrained(tmp_path / "detector")
    assert (again.predict(TEST) == fitted.predict(TEST)).all()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtefactError, match=r"no manifest\.json"):
        Detector.from_pretrained(tmp_path / "empty")


def test_the_card_says_what_it_is(fitted, tmp_path):
    fitted.save(tmp_path / "detector")
    card = (tmp_path / "detector" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: lvlm-stethoscope\n")
    data = ModelCard(card).data
    assert (data.library_name, data.base_model, data.tags[0]) == ("lvlm-stethoscope", None, "hallucination-detection")
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("roc_auc", 0.91234, "chair")
    assert result.metric_args == {"low": 0.9, "high": 0.92, "items": 100, "groups": 30}
    assert "listens to: llava-1.5-7b" in card
    assert "learned from: chair" in card
    assert "label: first sub-token of the first mention" in card
    assert "(the task's ground truth, labels=repope), else 0" in describe_label(fitted, "repope")
    assert "| AUROC | 0.912 | 0.900 to 0.920 |" in card
    assert "at most 0.4 of the hallucinated mentions get none, at confidence 0.95" in card
    fitted.save(tmp_path / "of-hub", {"model": {"model_id": "llava-hf/llava-1.5-7b-hf"}})
    assert ModelCard.load(tmp_path / "of-hub" / "README.md").data.base_model == "llava-hf/llava-1.5-7b-hf"
    Detector().fit(TRAIN, CALIBRATION).save(tmp_path / "plain")
    assert ModelCard.load(tmp_path / "plain" / "README.md").data.eval_results is None
    assert "listens to: not known" in (tmp_path / "plain" / "README.md").read_text()
