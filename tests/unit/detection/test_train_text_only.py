"""The script behind the shipped text-only detector: families and pictures that are judged are never learned from."""

import json

import numpy as np
import pytest

from scripts import train_text_only as script

SCENES = {"a kitchen": ("oven", "bowl", "cup"), "a street": ("car", "bus", "bench")}


@pytest.fixture
def folder(tmp_path):
    """Sixty pictures, each described by two models."""
    random, objects = np.random.default_rng(0), {}
    rows = {"One-7B": [], "Two": []}
    for image in range(60):
        scene = list(SCENES)[image % 2]
        objects[image] = [name for name in SCENES[scene] if random.random() < 0.7]
        for model, captions in rows.items():
            caption = f"The image shows {scene} with a {' and a '.join(random.permutation(SCENES[scene])[:2])}."
            captions.append({"image_id": image, "caption": caption, "model": model})
    (tmp_path / "objects.json").write_text(json.dumps(objects))
    for model, captions in rows.items():
        (tmp_path / f"{model}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in captions))
    return tmp_path


def test_every_family_and_picture_is_judged_once_by_others(folder, monkeypatch, capsys):
    learned = []

    def train(captions, truth):
        learned.append({(caption.family, caption.image) for caption in captions})
        return train_real(captions, truth)

    def table_of(captions, truth, repeats):
        table = table_real(captions, truth, repeats)
        asked.append({(caption.family, caption.image) for caption in captions})
        return table

    train_real, table_real, asked = script.train, script.table_of, []
    monkeypatch.setattr(script, "train", train)
    monkeypatch.setattr(script, "table_of", table_of)
    monkeypatch.setattr("sys.argv", ["train_text_only", str(folder), "--judge", "--images", "all"])
    script.main()
    output = capsys.readouterr().out
    assert len(learned) == 2 * script.FOLDS
    judged = asked[1::2]  # of each pair of tables the first is learned from
    assert sum(map(len, judged)) == 120
    assert set().union(*judged) == {(family, str(image)) for family in ("One", "Two") for image in range(60)}
    for known, held_out in zip(learned, judged, strict=True):
        assert not {family for family, _ in known} & {family for family, _ in held_out}
        assert not {image for _, image in known} & {image for _, image in held_out}
    lines = [line for line in output.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[2] for line in lines[2:14]] == [*script.SCORES] * 3
    assert lines[-2].startswith("| One | .")


def test_half_of_the_pictures_is_for_development():
    halves = [script.development(str(image)) for image in range(2000)]
    assert 900 < sum(halves) < 1100
    assert halves[:8] == [script.development(str(image)) for image in range(8)]
