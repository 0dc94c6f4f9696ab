"""Features against closed forms on a hand-made trace."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

import stethoscope
from stethoscope.core.errors import CaptureError, ConfigError
from stethoscope.core.types import Answer
from stethoscope.features import DEFAULT_GROUPS, FEATURES, GROUPS, FeatureSet, named_set
from stethoscope.features.joining import joinable
from stethoscope.relevancy import Relevancy
from stethoscope.tracing.trace import REQUIREMENTS, SEGMENTS, Spans, Trace

TOKENS, LAYERS, HEADS, IMAGE, WORDS = 3, 4, 2, 5, 8


@pytest.fixture
def trace():
    """Three tokens, ids 2, 5, 2; uniform predictions except that token 1 is certain without the image too."""
    logits = torch.zeros(TOKENS, WORDS)
    logits[1, 5] = 50.0
    blank = torch.zeros(TOKENS, WORDS)
    blank[0, 2] = math.log(WORDS)  # p = 8 / 15
    mass = torch.zeros(TOKENS, LAYERS, HEADS, len(SEGMENTS))
    mass[..., 0], mass[..., 1], mass[..., 4] = 0.5, 0.25, 0.25
    mass[:, 1, 0, 0], mass[:, 1, 0, 4] = 0.75, 0.0
    llm = torch.zeros(TOKENS, LAYERS, 13)
    llm[..., 1:6], llm[..., 7:9], llm[..., 0] = 0.2, 0.25, 0.5
    llm[2, -1, 10:12] = 0.5
    llm[0, -1, 1:6] = torch.tensor([1.0, 0, 0, 0, 0])
    saliency = torch.zeros(TOKENS, LAYERS, 13)
    saliency[:, :2] = 7.0  # early layers, which are not read
    saliency[:, 2:, 1] = 6.0
    saliency[1:, 2:, 10] = 8.0
    saliency[2, 2:, 10:12] = torch.tensor([6.0, 7.0])
    attention = torch.full((TOKENS, LAYERS, IMAGE), 0.1)
    attention[0, 0] = torch.tensor([0.5, 0, 0, 0, 0])
    return Trace(
        answer=Answer("a b a", (2, 5, 2), ((0, 1), (1, 3), (3, 5)), (0.0, 0.0, 0.0)),
        spans=Spans(10, tuple(range(1, 6)), (7, 8)),
        logits=logits,
        mass=mass,
        image_attention=attention,
        lens_logprob=torch.arange(TOKENS * LAYERS).reshape(TOKENS, LAYERS).neg().float(),
        lens_rank=torch.arange(TOKENS * LAYERS).reshape(TOKENS, LAYERS),
        blank_logits=blank,
        hidden=torch.arange((TOKENS + 1) * 2 * 3.0).reshape(TOKENS + 1, 2, 3),
        image_embeds=torch.eye(IMAGE),
        relevancy=Relevancy((0, 1, 2), 9, (1, 2, 3, 4, 5), (7, 8), llm=llm, saliency=saliency),
    )


def test_closed_forms(trace):
    columns = FeatureSet([*DEFAULT_GROUPS, "blank", "relevancy"]).compute(trace)
    uniform = math.log(WORDS)
    np.testing.assert_allclose(columns["nll"], [uniform, 0, uniform], atol=1e-6)
    np.testing.assert_allclose(columns["entropy"], [uniform, 0, uniform], atol=1e-6)
    np.testing.assert_allclose(columns["max_prob"], [1 / WORDS, 1, 1 / WORDS], atol=1e-6)
    np.testing.assert_allclose(columns["margin"], [0, 1, 0], atol=1e-6)
    np.testing.assert_array_equal(columns["position"], [0, 1, 2])
    np.testing.assert_array_equal(columns["repetition"], [0, 0, 1])
    np.testing.assert_allclose(columns["attn_image_l00"], 0.5)
    np.testing.assert_allclose(columns["attn_image_l01"], 0.625)
    np.testing.assert_allclose(columns["svar"], 0.625 + 0.5)  # layers 1 and 2 of 4
    np.testing.assert_allclose(columns["attn_entropy_l00"], [0, 1, 1], atol=1e-6)
    np.testing.assert_allclose(columns["lens_rank_l02"], np.log1p([2, 6, 10]), rtol=1e-6)
    assert "lens_rank_l03" not in columns  # the last layer is the model's own output
    np.testing.assert_allclose(columns["pmi"], [-math.log(8 * 8 / 15), uniform, 0], atol=1e-5)
    blank_entropy = math.log(15) - 8 / 15 * math.log(8)
    np.testing.assert_allclose(columns["blank_entropy_difference"][0], blank_entropy - uniform, atol=1e-5)
    assert columns["blank_divergence"][2] == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(columns["relevancy_image_l00"], 0.5, atol=1e-6)
    np.testing.assert_allclose(columns["relevancy_previous_l03"], [0, 0, 1 / 3], atol=1e-6)
    np.testing.assert_allclose(columns["relevancy_question_l03"], [0.25, 0.25, 1 / 6], atol=1e-6)
    np.testing.assert_allclose(columns["visual_contribution_sum"], np.log([2, 2, 1 / 1.5]), atol=1e-6)
    np.testing.assert_allclose(columns["visual_contribution_max"], np.log([4, 0.8, 0.4]), atol=1e-6)
    np.testing.assert_allclose(
        columns["visual_contribution_mean"], np.log([0.2 / 0.25, 0.2 / (0.5 / 3), 0.2 / (1.5 / 4)]), atol=1e-6
    )
    np.testing.assert_allclose(columns["relevancy_entropy"], [0, 1, 1], atol=1e-6)
    np.testing.assert_allclose(columns["relevancy_peak"], [1, 0.2, 0.2], atol=1e-6)
    np.testing.assert_allclose(columns["saliency_previous"], [0, 0.8, 13 / 11 / 2], atol=1e-6)
    np.testing.assert_allclose(columns["saliency_previous_max"], [0, 0.8, 7 / 11], atol=1e-6)
    np.testing.assert_allclose(columns["saliency_previous_share"], [0, 8 / 14, 13 / 19], atol=1e-6)
    np.testing.assert_allclose(columns["saliency_image_share"], [1, 6 / 14, 6 / 19], atol=1e-6)
    for name, start in (("hidden_middle_q", 0), ("hidden_middle_c", 6), ("hidden_last_c", 9)):
        np.testing.assert_array_equal(columns[f"{name}_d0001"], start + 1 + 6 * np.arange(TOKENS))
    assert all(values.dtype == np.float32 and values.shape == (TOKENS,) for values in columns.values())


def test_published_layers_of_svar():
    """15 % to 55 % of 32 layers are the published 5 to 18."""
    mass = torch.zeros(1, 32, 1, len(SEGMENTS))
    mass[0, :, 0, 0] = 2.0 ** torch.arange(32)
    trace = Trace(Answer("a", (0,), ((0, 1),), (0.0,)), Spans(1, (), ()), torch.zeros(1, 2), mass=mass)
    assert FEATURES["svar"].function(trace).item() == sum(2.0**layer for layer in range(5, 19))


def test_every_feature_says_what_it_reads(trace):
    """A feature works when the trace holds exactly the parts that it declares."""
    parts = {
        "attention": ("mass", "image_attention"),
        "lens": ("lens_rank", "lens_logprob"),
        "blank": ("blank_logits",),
        "hidden": ("hidden",),
    }
    parts["relevancy"] = ("relevancy",)
    for item in FeatureSet([*DEFAULT_GROUPS, "blank", "relevancy"]).features:
        kept = {name: getattr(trace, name) for need in item.requires for name in parts[need]}
        item.function(Trace(trace.answer, trace.spans, trace.logits, **kept))
        assert item.requires <= set(REQUIREMENTS)
        assert item.higher_means in ("hallucinated", "grounded", "depends")
        assert item.summary.endswith(".") or item.summary.endswith(",")


def test_choosing():
    assert FeatureSet(groups=["position"]).requires == frozenset()
    assert FeatureSet(groups=[], names=["pmi"]).requires == {"blank"}
    assert "svar" not in FeatureSet(exclude=["svar"]).names
    assert FeatureSet(["position", "blank"], exclude=["blank"]).names == ("position", "log_position", "repetition")
    assert FeatureSet(["position"], exclude=["position"]).names == ("log_position", "repetition")
    assert {item.group for item in FeatureSet().features} == set(DEFAULT_GROUPS)
    assert set(DEFAULT_GROUPS) < set(GROUPS) == {item.group for item in FeatureSet(GROUPS).features}
    assert FeatureSet(["position"]).cost == "same forward pass"
    assert FeatureSet(["position"], names=["pmi"]).cost == "one more forward pass"
    assert FeatureSet().cost == "same forward pass"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": ["atention"]}, "unknown feature group 'atention'; did you mean 'attention'"),
        ({"names": ["nl"]}, "unknown feature 'nl'"),
        ({"groups": ["position"], "exclude": ["position", "log_position", "repetition"]}, "no feature is left"),
    ],
)
def test_bad_choices(settings, message):
    with pytest.raises(ConfigError, match=message):
        FeatureSet(**settings)


def test_refuses_values_that_are_not_finite(trace):
    trace.logits[1, 3] = float("nan")
    with pytest.raises(CaptureError, match="'nll'"):
        FeatureSet().compute(trace)


def test_answers_together_have_the_columns_of_each_alone():
    """Answers of different lengths, one of them to another question; features that join rows and those that do not."""
    adapter, features = stethoscope.load("testbed"), named_set("full")
    picture = Image.linear_gradient("L").convert("RGB")
    texts = ("There is a dog next to a red car.", "A cat.", "The image shows a tree, a house and a bird.")
    asked = ("Describe the image.", "Describe the image.", "What is in the image? Describe it.")
    encoded = [adapter.encode(picture, question) for question in asked]
    answers = [adapter.answer(prompt, text) for prompt, text in zip(encoded, texts, strict=True)]
    traces = [adapter.trace(*pair, features.requires) for pair in zip(encoded, answers, strict=True)]
    assert joinable(traces) == [[0, 1], [2]]
    for trace, together in zip(traces, features.compute_batch(traces), strict=True):
        alone = features.compute(trace)
        assert list(together) == list(alone)
        assert len(together["nll"]) == len(trace.answer.token_ids)
        for name, values in alone.items():
            np.testing.assert_allclose(together[name], values, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("item", FEATURES.values(), ids=list(FEATURES))
def test_docstrings_say_the_direction(item):
    """``higher_means`` and the docstring agree, and the first line is one that a list can show."""
    direction = {
        "hallucinated": "Higher means hallucinated.",
        "grounded": "Lower means hallucinated.",
        "depends": "Either direction can mean hallucinated; it depends on the model.",
    }
    assert direction[item.higher_means] in item.document
    assert len(item.summary.removesuffix("; predicting row.").removesuffix("; consuming row.")) <= 100
