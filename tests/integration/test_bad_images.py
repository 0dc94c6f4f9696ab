"""Odd and broken pictures: each is answered or fails by itself with a clear line; the run goes on."""

import json

import numpy as np
import pytest
import torch
from helpers.contract_helpers import others_slow
from omegaconf import OmegaConf
from PIL import Image

import stethoscope as package
from stethoscope.core.component import choices, conf_folder
from stethoscope.core.errors import DataError, StethoscopeError
from stethoscope.core.types import Generation
from stethoscope.tracing.trace import REQUIREMENTS

PIXELS = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
PHOTO = Image.fromarray(PIXELS)
GREY = PHOTO.convert("L")
SIXTEEN = np.asarray(GREY).astype(np.uint16) * 257


def turned(path):
    exif = Image.Exif()
    exif[0x0112] = 3
    PHOTO.rotate(180).save(path, exif=exif)


def animated(path):
    PHOTO.save(path, save_all=True, append_images=[PHOTO.rotate(180)])


def cut_short(path):
    PHOTO.save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


GOOD = {
    "photo.png": PHOTO.save,
    "turned.png": turned,
    "opaque.png": lambda path: PHOTO.convert("RGBA").save(path),
    "animated.webp": lambda path: PHOTO.save(path, save_all=True, append_images=[PHOTO.rotate(180)], lossless=True),
    "animated.gif": animated,
    "grey.png": GREY.save,
    "sixteen.png": lambda path: Image.fromarray(SIXTEEN).save(path),
    "sixteen.tiff": lambda path: Image.fromarray(SIXTEEN).save(path),
    "cmyk.tiff": lambda path: PHOTO.convert("CMYK").save(path),
    "palette.png": lambda path: PHOTO.convert("P").save(path),
    "transparent.png": lambda path: Image.new("RGBA", (40, 40), (9, 9, 9, 0)).save(path),
    "white.png": lambda path: Image.new("RGB", (40, 40), "white").save(path),
    "dot.png": lambda path: Image.new("RGB", (1, 1), "red").save(path),
    "stripe.png": lambda path: PHOTO.resize((8000, 100)).save(path),
    "tower.png": lambda path: PHOTO.resize((100, 8000)).save(path),
}
BAD = {
    "short.png": cut_short,
    "short.jpg": cut_short,
    "empty.png": lambda path: path.write_bytes(b""),
    "text.png": lambda path: path.write_text("this is no image"),
}
SAME = [
    ("photo.png", "turned.png"), ("photo.png", "opaque.png"), ("photo.png", "animated.webp"),
    ("grey.png", "sixteen.png"), ("grey.png", "sixteen.tiff"), ("transparent.png", "white.png"),
]  # fmt: skip


def test_a_run_over_every_kind_of_file(stethoscope, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for name, write in (GOOD | BAD).items():
        write(images / name)
    asked = [
        {"question_id": number, "image": name, "text": "Is there a dog in the image?", "label": "no"}
        for number, name in enumerate(GOOD | BAD)
    ]
    (tmp_path / "coco_pope_random.json").write_text("\n".join(map(json.dumps, asked)) + "\n")
    line = stethoscope(
        "evaluate", "model.random_init=tiny", "task=pope", "task.source=files", "task.subsets=[random]", "logger=none",
        f"task.questions={tmp_path}", f"task.images={images}", "name=one",
    )  # fmt: skip
    assert f"{len(BAD)} of {len(asked)} samples failed, the first is pope sample" in line
    lines = (tmp_path / "runs" / "one" / "samples.jsonl").read_text().splitlines()
    assert len(lines) == len(asked)
    digests = {}
    for record in map(json.loads, lines):
        name = next(name for name in GOOD | BAD if name in json.dumps(record))
        digests[name] = record
    for name, record in digests.items():
        assert (record["status"] == "failed") == (name in BAD), record
        if name in BAD:
            assert f"{name} cannot be read" in record["error"]
    for first, other in SAME:
        assert digests[first]["answer"] == digests[other]["answer"]
    assert len({json.dumps(digests[name]["answer"]) for name in GOOD}) >= len(GOOD) - len(SAME) - 1


def families():
    """A configuration for each family of models."""
    classes = {}
    for name in (name for name in choices("model") if name != "none"):
        config = OmegaConf.load(conf_folder() / "model" / f"{name}.yaml")
        classes.setdefault((config.get("_target_"), config.get("family")), name)
    return sorted(classes.values())


@pytest.fixture(scope="module", params=others_slow(families()))
def adapter(request):
    torch.set_num_threads(1)
    return package.load(request.param, random_init="tiny", device="cpu")


@pytest.mark.parametrize("size", [(1, 1), (8000, 100)], ids=str)
def test_odd_sizes_are_answered_and_traced(adapter, size):
    encoded = adapter.encode(PHOTO.resize(size), "Is there a dog in the image?")
    assert encoded.spans.image
    answer = adapter.generate([encoded], Generation(max_new_tokens=2))[0]
    trace = adapter.trace(encoded, answer, REQUIREMENTS)
    assert all(torch.isfinite(part).all() for part in (trace.logits, trace.mass, trace.relevancy.image))
    assert trace.relevancy.image.shape[-1] == len(encoded.spans.image)


def test_pictures_reach_the_model_as_a_person_would_see_them(adapter, tmp_path):
    turned(tmp_path / "turned.png")
    expected = adapter.encode(GREY.convert("RGB"), "a").inputs
    for image in (GREY, Image.fromarray(SIXTEEN)):
        for name, value in adapter.encode(image, "a").inputs.items():
            assert torch.equal(value, expected[name]), name
    expected = adapter.encode(PHOTO, "a").inputs
    for image in (Image.open(tmp_path / "turned.png"), PHOTO.convert("RGBA")):
        for name, value in adapter.encode(image, "a").inputs.items():
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("picture", [None, PIXELS], ids=lambda picture: type(picture).__name__)
def test_what_is_no_picture_is_refused(adapter, picture):
    with pytest.raises(DataError, match=f"a path or the bytes of a file, got {type(picture).__name__}"):
        adapter.encode(picture, "a")


def test_a_prompt_without_a_place_for_the_image(adapter):
    """Some processors put the image before any prompt; all others need a place for it in the prompt."""
    own = type(adapter)(random_init="tiny", prompt="Q: {question} A:", **_family(adapter))
    if type(adapter.processor).__name__ in ("Blip2Processor", "InstructBlipProcessor", "PaliGemmaProcessor"):
        assert len(own.encode(PHOTO, "a").spans.image) == len(adapter.encode(PHOTO, "a").spans.image)
        return
    with pytest.raises(StethoscopeError, match=r"[iI]mage") as error:
        own.encode(PHOTO, "a")
    assert "\n" not in str(error.value)


def _family(adapter):
    return {"family": adapter.family} if type(adapter).__name__ == "HfAdapter" else {}
