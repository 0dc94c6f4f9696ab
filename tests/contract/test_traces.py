"""A trace holds what the model did: its logits, its attention, its layers read by its own head."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.contract_helpers import attention, extended, has_encoder, language, predicting, reads_by_queries

from stethoscope.core.errors import CapabilityError, ConfigError
from stethoscope.core.types import Generation
from stethoscope.diagnosis.layers_pass import attention_recorder, read_layers
from stethoscope.features import DEFAULT_GROUPS, FEATURES, GROUPS, FeatureSet
from stethoscope.tracing.hooks import AttentionRecorder, record
from stethoscope.tracing.trace import REQUIREMENTS, SEGMENTS

TENSORS = ("logits", "mass", "image_attention", "lens_logprob", "lens_rank", "blank_logits")


def close(actual, other, tolerance):
    assert (actual - other).abs().max() <= tolerance


@pytest.fixture(scope="module")
def traces(adapter, encoded, answers):
    return [adapter.trace(prompt, answer) for prompt, answer in zip(encoded, answers, strict=True)]


def eager(adapter, encoded, answer):
    """Attention and hidden states by layer of a plain eager pass; maps of the cross-attention where there is one."""
    inputs = extended(adapter, encoded, answer.token_ids)
    with attention(adapter.model, "eager"), torch.no_grad():
        output = adapter.model(**inputs, output_attentions=True, output_hidden_states=True)
    output = output.get("language_model_outputs") or output
    if has_encoder(adapter):
        return output.decoder_attentions, output.decoder_hidden_states, output.cross_attentions
    return output.attentions, output.hidden_states, ()


def test_shapes_and_types(adapter, traces):
    text = adapter.model.config.get_text_config()
    layers, heads, words = (
        text.num_hidden_layers,
        text.num_attention_heads,
        adapter.model.get_output_embeddings().out_features,
    )
    for trace in traces:
        tokens, image = len(trace.answer.token_ids), len(trace.spans.image)
        assert trace.logits.shape == trace.blank_logits.shape == (tokens, words)
        assert trace.mass.shape == (tokens, layers, heads, len(SEGMENTS))
        assert trace.image_attention.shape == (tokens, layers, image)
        assert trace.lens_logprob.shape == trace.lens_rank.shape == (tokens, layers)
        for name in TENSORS:
            tensor = getattr(trace, name)
            assert tensor.dtype == torch.float32
            assert tensor.device.type == "cpu"
            assert torch.isfinite(tensor).all()


def test_logits_give_the_logprobs_of_generation(traces):
    for trace in traces:
        ids = torch.tensor(trace.answer.token_ids)[:, None]
        close(trace.logits.log_softmax(-1).gather(-1, ids)[:, 0], torch.tensor(trace.answer.logprobs), 1e-4)


def test_masses_of_a_row_sum_to_one(traces):
    for trace in traces:
        close(trace.mass.sum(-1), torch.tensor(1.0), 1e-5)


def test_attention_to_image_tokens_sums_to_the_image_mass(traces):
    for trace in traces:
        close(trace.image_attention.sum(-1), trace.mass[..., SEGMENTS.index("image")].mean(-1), 1e-5)


def test_no_mass_on_previous_tokens_before_there_are_any(traces):
    for trace in traces:
        previous = trace.mass[..., SEGMENTS.index("previous")]
        assert (previous[0] == 0).all()
        assert len(previous) == 1 or (previous[1:] > 0).any()


def test_attention_equals_eager_output_attentions(adapter, encoded, traces):
    for prompt, trace in zip(encoded, traces, strict=True):
        own, _, crossing = eager(adapter, prompt, trace.answer)
        maps = torch.stack(own)[:, 0]  # (L, H, S, S)
        if crossing:  # half of the row is over the encoder's sequence, half over the decoder's
            maps = torch.cat([torch.stack(crossing)[:, 0], maps], -1) / 2
        columns = {"image": list(prompt.spans.image), "question": list(prompt.spans.question)}
        columns["previous"] = list(range(prompt.spans.length + bool(crossing), maps.shape[-1]))
        start = prompt.spans.length if crossing else 0
        columns["first"] = sorted({start} - set(prompt.spans.image))  # PaliGemma and BLIP-2 begin with the image
        used = {position for part in columns.values() for position in part}
        columns["rest"] = [position for position in range(maps.shape[-1]) if position not in used]
        rows = range(len(maps[0, 0]))[predicting(adapter, prompt, trace.answer.token_ids)]
        for k, query in enumerate(rows):
            row = maps[:, :, query]
            expected = torch.stack([row[..., columns[name]].sum(-1) for name in SEGMENTS], -1)
            close(trace.mass[k], expected, 5e-6)  # SDPA and eager round differently
            close(trace.image_attention[k], row[..., list(prompt.spans.image)].mean(1), 5e-6)


def test_raw_attention_by_layer_and_head_equals_eager_output_attentions(adapter, encoded, answers):
    prompt, answer = encoded[1], answers[1]
    notes = []
    maps = read_layers(adapter, prompt, answer, [3, 1], notes)[1]
    assert notes == []
    own, _, crossing = eager(adapter, prompt, answer)
    rows, image = predicting(adapter, prompt, answer.token_ids), list(prompt.spans.image)
    own = torch.stack(own)[:, 0, :, rows].permute(2, 0, 1, 3)  # (T, L, H, S)
    whole = torch.stack(crossing)[:, 0, :, rows].permute(2, 0, 1, 3) if crossing else own  # over the prompt
    expected = whole[..., image]
    assert maps.tokens == tuple(range(len(answer.token_ids)))
    close(maps.heads, expected, 5e-6)  # SDPA and eager round differently
    close(maps.mean, expected.mean(2), 5e-6)
    close(maps.largest, expected.amax(2), 5e-6)
    close(maps.image_mass, expected.sum(-1), 5e-6)
    close(maps.to_image(2), expected[2].mean((0, 1)), 5e-6)
    close(maps.to_image(2, -1, 1), expected[2, -1, 1], 5e-6)
    means, own = whole.mean((1, 2)), own.mean((1, 2))
    question = means[:, list(prompt.spans.question)]
    start, count = 1 if crossing else prompt.spans.length, len(answer.token_ids)
    before = torch.nn.functional.pad(own[:, start : start + count], (0, max(0, start + count - own.shape[1])))
    columns = [means[:, image].sum(-1, keepdim=True), question, before]
    parts = columns[:2] if crossing else columns
    rest = 1 - torch.cat(parts, -1).sum(-1, keepdim=True)
    close(maps.matrix, torch.cat([*columns, rest, *([own[:, :1]] if crossing else [])], -1), 2e-5)
    assert not before.triu().any()
    few = attention_recorder(
        *adapter.forward_inputs(prompt, answer.token_ids), prompt, answer, [3, 1], 2 * maps.heads[0].nbytes
    )
    with record(adapter.model, few), torch.no_grad():
        adapter.model(**extended(adapter, prompt, answer.token_ids))
    assert few.maps().tokens == (1, 3)
    close(few.maps().heads, expected[[1, 3]], 5e-6)
    with pytest.raises(CapabilityError, match="not held"):
        few.maps().to_image(0, 0, 0)


def test_recorded_maps_are_eager_output_attentions_bit_by_bit(adapter, encoded, answers):
    class Maps(AttentionRecorder):
        def __init__(self):
            self.heard = {}

        def on_weights(self, site, weights):
            self.heard.setdefault(site.role, []).append(weights.clone())

    roles = {"language"} | ({"encoder", "cross"} if has_encoder(adapter) else set())
    roles |= {"connector"} if reads_by_queries(adapter) else set()
    roles |= set() if adapter.model.config.model_type == "convllava" else {"vision"}  # no attention in its tower
    for prompt, answer in zip(encoded, answers, strict=True):
        own, _, crossing = eager(adapter, prompt, answer)
        with record(adapter.model, Maps()) as maps, torch.no_grad():
            adapter.model(**extended(adapter, prompt, answer.token_ids))
        for role, expected in (("language", own), ("cross", crossing)):
            assert len(maps.heard.get(role, ())) == len(expected)
            assert all(map(torch.equal, maps.heard.get(role, ()), expected))
        assert set(maps.heard) == roles


def test_lens_reads_every_layer_by_the_final_norm_and_head(adapter, encoded, traces):
    norm, head = language(adapter).norm, adapter.model.get_output_embeddings()
    cap = getattr(adapter.model.config.get_text_config(), "final_logit_softcapping", None) or 1e9  # of Gemma 2
    for prompt, trace in zip(encoded, traces, strict=True):
        _, hidden, _ = eager(adapter, prompt, trace.answer)
        rows = predicting(adapter, prompt, trace.answer.token_ids)
        ids = torch.tensor(trace.answer.token_ids)[:, None]
        for layer in range(trace.lens_logprob.shape[1] - 1):
            with torch.no_grad():
                logits = cap * torch.tanh(head(norm(hidden[layer + 1][0, rows])) / cap)
            close(trace.lens_logprob[:, layer], logits.log_softmax(-1).gather(-1, ids)[:, 0], 1e-4)
            expected = (logits > logits.gather(-1, ids)).sum(-1).float()
            assert (trace.lens_rank[:, layer] - expected).abs().max() <= 1
        close(trace.lens_logprob[:, -1], trace.logits.log_softmax(-1).gather(-1, ids)[:, 0], 1e-5)
        assert torch.equal(trace.lens_rank[:, -1], (trace.logits > trace.logits.gather(-1, ids)).sum(-1).float())


def test_blank_logits_are_those_of_zero_pixels(adapter, encoded, traces):
    tiles_may_be_padding = adapter.model.config.model_type in ("idefics3", "smolvlm")  # if they are exactly zero
    blank = 1e-6 if tiles_may_be_padding else 0.0
    for prompt, trace in zip(encoded, traces, strict=True):
        inputs = extended(adapter, prompt, trace.answer.token_ids)
        inputs["pixel_values"] = torch.full_like(inputs["pixel_values"], blank)
        with torch.no_grad():
            logits = adapter.model(**inputs).logits[0, predicting(adapter, prompt, trace.answer.token_ids)]
        close(trace.blank_logits, logits, 1e-4)
        assert (trace.blank_logits - trace.logits).abs().max() > 1e-3


def test_relevancy_has_a_row_for_every_token_and_adds_up(adapter, encoded, traces):
    for prompt, trace in zip(encoded, traces, strict=True):
        relevancy = adapter.trace(prompt, trace.answer, ["relevancy"]).relevancy
        assert relevancy.image.shape[::2] == (len(trace.answer.token_ids), len(prompt.spans.image))
        parts = (relevancy.image, relevancy.question, relevancy.answer, relevancy.rest)
        close(sum(part.sum(-1) for part in parts), relevancy.total, 1e-5)
        assert relevancy.question_positions == prompt.spans.question
        assert (relevancy.image.sum(-1) > 0).any()


def entering(adapter, encoded, answer):
    """The image tokens of an ordinary pass, at the input of the language model or of its encoder."""
    with torch.no_grad():
        output = adapter.model(**extended(adapter, encoded, answer.token_ids), output_hidden_states=True)
    output = output.get("language_model_outputs") or output
    states = output.encoder_hidden_states if has_encoder(adapter) else output.hidden_states
    return states[0][0, list(encoded.spans.image)].float()


def test_image_embeds_are_what_enters_the_language_model(adapter, encoded, answers):
    expected = [entering(adapter, *pair) for pair in zip(encoded, answers, strict=True)]
    generated, prompts = adapter.generate_with_cache(encoded, Generation(max_new_tokens=5))
    shared, asked = adapter.generate_with_cache([encoded[0]] * 4, Generation(max_new_tokens=5))
    bare = [replace(p, cache=None if p.cache is None else replace(p.cache, embeds=None)) for p in prompts]
    ways = [
        *((batch, adapter.trace_batch(batch, answers, ["hidden"]), expected) for batch in (encoded, bare)),
        (prompts, adapter.trace_batch(prompts, generated, ["hidden"]), expected),
        (asked, adapter.trace_batch(asked, shared, ["hidden"]), expected[:1] * 4),
        (encoded, adapter.trace_batch(encoded, answers, ["hidden", "relevancy"]), expected),
        (encoded, [adapter.trace(*pair, ["relevancy"]) for pair in zip(encoded, answers, strict=True)], expected),
        (encoded, adapter.trace_batch(adapter.prefill(encoded), answers, ["relevancy"]), expected),
    ]
    for batch, traces, embeds in ways:
        for prompt, trace, own in zip(batch, traces, embeds, strict=True):
            assert len(own) == len(prompt.spans.image)
            assert trace.image_embeds.dtype == torch.float32
            close(trace.image_embeds, own, 1e-5 * own.abs().max())  # SDPA and eager round differently
    cached = [prompt.cache for prompt in (*prompts, *asked) if prompt.cache is not None]
    assert all(cache.embeds is not None for cache in cached)
    assert adapter.trace(encoded[0], answers[0], ["attention", "lens"]).image_embeds is None


def test_every_feature_has_a_finite_value_for_every_token(adapter, encoded, traces):
    features = FeatureSet()
    for prompt, trace in zip(encoded, traces, strict=True):
        columns = features.compute(adapter.trace(prompt, trace.answer, features.requires))
        assert {name for name in FEATURES if any(column.startswith(name) for column in columns)} >= set(features.names)
        for values in columns.values():
            assert values.shape == (len(trace.answer.token_ids),)
            assert np.isfinite(values).all()


def lacking(adapter, encoded):
    """Groups of published features that this kind of model has not."""
    encoder = ("states", "sinks", "image_lens") * has_encoder(adapter)
    return {*encoder, *("grid",) * (not encoded.spans.grids)}


def test_published_features_are_finite_and_the_same_in_a_batch(adapter, encoded, answers):
    asked = {item.group for item in FEATURES.values() if item.mentions_only}
    groups = set(GROUPS) - {*DEFAULT_GROUPS, *asked} - lacking(adapter, encoded[0])
    features = FeatureSet(sorted(groups))
    together = adapter.trace_batch(encoded, answers, features.requires)
    for prompt, answer, trace in zip(encoded, answers, together, strict=True):
        alone, columns = adapter.trace(prompt, answer, features.requires), features.compute(trace)
        assert all(values.shape == (len(answer.token_ids),) for values in columns.values())
        assert all(np.isfinite(values).all() for values in columns.values())
        for name in ("noise_logits", "no_image_logits", "core_logits", "trajectory"):
            close(getattr(trace, name), getattr(alone, name), 1e-3)
            assert len(getattr(trace, name)) == len(answer.token_ids)
        assert (trace.no_image_logits - trace.logits).abs().max() > 1e-3
        for name in ("mass", "image", "peak", "response"):
            close(getattr(trace.heads, name), getattr(alone.heads, name), 1e-4)


def test_published_features_that_a_model_lacks_are_refused_by_name(adapter, encoded, answers):
    for group in lacking(adapter, encoded[0]):
        features = FeatureSet([group])
        with pytest.raises(CapabilityError, match=group):
            features.compute(adapter.trace(encoded[0], answers[0], features.requires))


def test_a_batch_of_traces_equals_single_traces(adapter, encoded, traces):
    together = adapter.trace_batch(encoded, [trace.answer for trace in traces])
    for single, other in zip(traces, together, strict=True):
        assert (single.answer, single.spans) == (other.answer, other.spans)
        for name in TENSORS:
            close(getattr(single, name), getattr(other, name), 1e-4)


@pytest.mark.parametrize("requires", [(), ("attention",), ("lens",), ("hidden",), ("blank",), ("relevancy",)])
def test_a_trace_holds_what_was_asked_for(adapter, encoded, traces, requires):
    trace = adapter.trace(encoded[0], traces[0].answer, requires)
    held = {"attention": trace.mass, "lens": trace.lens_rank, "blank": trace.blank_logits, "hidden": trace.hidden}
    held["relevancy"] = trace.relevancy
    assert {name for name in REQUIREMENTS if held[name] is not None} == set(requires)
    close(trace.logits, traces[0].logits, 1e-4)


def test_an_empty_answer_has_an_empty_trace(adapter, encoded, traces):
    trace = adapter.trace(encoded[0], adapter.answer(encoded[0], ""))
    for name in TENSORS:
        assert getattr(trace, name).shape == (0, *getattr(traces[0], name).shape[1:])


def test_unknown_needs_are_refused(adapter, encoded, answers):
    with pytest.raises(ConfigError, match="attention"):
        adapter.trace(encoded[0], answers[0], ("atention",))
