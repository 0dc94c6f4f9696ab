"""The draw of a limited run: even over subsets, labels and images, fixed, and part of every longer draw."""

import json
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from stethoscope.core.types import ImageRef, Sample
from stethoscope.evaluation.selection import select_samples
from stethoscope.tasks.dash_b import DashB
from stethoscope.tasks.mme import Mme
from stethoscope.tasks.natural_bench import NaturalBench
from stethoscope.tasks.pope import Pope

SUBSETS = ("random", "popular", "adversarial")


def sample(name, picture, subset="all", **reference):
    return Sample(name, ImageRef(f"{picture}.png", Path(f"{picture}.png")), "?", f"{picture}", subset, reference)


def pope_like(images=50, questions=6):
    """Every image has as many yes as no questions in every subset, the file's order being image by image."""
    return [
        sample(f"{subset}-{image}-{number}", image, subset, label=("yes", "no")[number % 2])
        for subset in SUBSETS
        for image in range(images)
        for number in range(questions)
    ]


def counts(samples, key):
    return Counter(map(key, samples))


def gap(counter):
    return max(counter.values()) - min(counter.values())


@pytest.mark.parametrize("limit", [2, 8, 16, 100, 151, 600])
def test_subsets_labels_and_images_are_even(limit):
    drawn = select_samples(pope_like(), limit)
    assert len(drawn) == limit
    assert gap(counts(drawn, lambda row: row.reference["label"])) <= 1
    assert len(counts(drawn, lambda row: row.group)) == min(limit, 50)
    assert gap(counts(drawn, lambda row: row.group)) <= 1
    if limit >= 6:
        assert gap(counts(drawn, lambda row: row.subset)) <= 1
        assert gap(counts(drawn, lambda row: (row.subset, row.reference["label"]))) <= 1


def test_a_constant_answer_is_half_right_on_the_first_eight():
    labels = counts(select_samples(pope_like(), 8), lambda row: row.reference["label"])
    assert labels == {"yes": 4, "no": 4}


def test_a_longer_draw_holds_every_shorter_one_whatever_the_order_of_the_file():
    samples = pope_like(images=7)
    draws = [{row.id for row in select_samples(samples, limit)} for limit in range(1, len(samples) + 1)]
    assert all(shorter < longer for shorter, longer in pairwise(draws))
    assert {row.id for row in select_samples(samples[::-1], 20)} == draws[19]
    assert [row.id for row in select_samples(samples, 20)] == [row.id for row in samples if row.id in draws[19]]


def test_all_samples_without_a_limit_or_with_a_large_one():
    samples = pope_like(images=2)
    assert select_samples(samples, None) == select_samples(samples, 99) == tuple(samples)


def test_a_small_subset_and_a_rare_label_are_used_up():
    samples = [sample(f"a{n}", f"a{n}", "a", label="yes") for n in range(20)]
    samples += [sample(f"b{n}", f"b{n}", "b", label="no") for n in range(2)]
    samples += [sample("c", "a0", "a", label="no")]
    drawn = select_samples(samples, 10)
    assert counts(drawn, lambda row: row.subset) == {"a": 8, "b": 2}
    assert "c" in {row.id for row in drawn}


def test_references_without_classes_are_drawn_over_images():
    samples = [sample(f"{image}-{n}", image, label=f"text {image} {n}") for image in range(30) for n in range(4)]
    assert len({row.group for row in select_samples(samples, 30)}) == 30
    plain = [sample(f"{image}-{n}", image, objects=["dog"]) for image in range(9) for n in range(4)]
    assert gap(counts(select_samples(plain, 18), lambda row: row.group)) == 0


def test_images_come_from_the_whole_file():
    order = [int(row.group) for row in select_samples([sample(str(n), n) for n in range(1000)], 100)]
    assert 350 < sum(order) / 100 < 650
    assert order == sorted(order)


def test_pairs_stay_together():
    task = Mme(folder="unused")
    samples = [
        sample(f"{category}-{image}-{label}", image, category, label=label)
        for category in ("existence", "count")
        for image in range(10)
        for label in ("yes", "no")
    ]
    drawn = select_samples(samples, 12, task.unit)
    assert set(counts(drawn, task.unit).values()) == {2}
    assert counts(drawn, lambda row: row.subset) == {"existence": 6, "count": 6}
    assert set(counts(select_samples(samples, 13, task.unit), task.unit).values()) == {1, 2}


def test_sets_of_question_tasks_stay_together():
    groups = [
        sample(f"{group}-{question}-{image}", group, group=group, question=question, image=image, label="yes")
        for group in range(6)
        for question in (0, 1)
        for image in (0, 1)
    ]
    task = NaturalBench(source="hub")
    drawn = select_samples(groups, 8, task.unit)
    assert sorted(counts(drawn, lambda row: row.group).values()) == [4, 4]
    assert DashB(source="hub").unit(groups[0]) == groups[0].id


def test_a_large_set_is_drawn_at_once():
    samples = pope_like(images=5000)
    start = time.process_time()
    assert len(select_samples(samples, 45_000)) == 45_000
    assert time.process_time() - start < 10  # about 1 s; the square of it would be hours


def test_pope_itself(shared, tmp_path):
    lines = [line for path in (shared / "pope").glob("*.json") for line in path.read_text().splitlines()]
    for row in map(json.loads, lines):
        (tmp_path / row["image"]).touch()
    task = Pope("files", questions=str(shared / "pope"), images=str(tmp_path))
    task.setup()
    for limit in (8, 300, 500):
        drawn = select_samples(task.samples(), limit, task.unit)
        assert len({row.group for row in drawn}) == limit
        assert gap(counts(drawn, lambda row: (row.subset, row.reference["label"]))) <= 1
