"""Build the page of ``stethoscope app``: a tab to ask and look, and a tab over finished runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from stethoscope.app import answer, payload
from stethoscope.app.model_pool import ModelPool
from stethoscope.app.runs import NO_RUN, Runs
from stethoscope.app.sessions import Sessions
from stethoscope.core.html import asset, escape
from stethoscope.core.html import render as fill
from stethoscope.diagnosis import render
from stethoscope.tasks.object_extraction import MentionExtractor

TITLE = "LVLM-Stethoscope"
QUESTION = "Please describe this image in detail."
HINT = "Choose a picture, ask, and then click any word of the answer, or go through them with ← and →."
MODEL = "model"  # concurrency id of the events that need the model, of which one runs at a time


def style() -> str:
    """Read the CSS of the whole page."""
    return "\n".join([asset("diagnosis/viewer.css"), asset("app/app.css")])


def theme() -> gr.themes.Base:
    """Build a theme with system fonts, so that no font is fetched."""
    sans, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    return gr.themes.Base(font=sans, font_mono=mono, primary_hue="blue", neutral_hue="slate", radius_size="md")


def build_page(
    pool: ModelPool, runs: Runs, extractor: MentionExtractor, examples: Sequence[Path], sessions: Sessions
) -> gr.Blocks:
    """Build the page, which ``server.start`` serves.

    Args:
        pool: the models.
        runs: finished runs for the second tab.
        extractor: extracts the objects that a text names.
        examples: picture files to choose from.
        sessions: of the server, which store the answer that each page shows.
    """
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        gr.HTML(f"<h1>{TITLE}</h1>", elem_classes="st-head", js_on_load=None)
        with gr.Tabs(selected="ask") as tabs:
            with gr.Tab("Ask", id="ask", elem_id="tab-ask"):
                parts = _ask_tab(pool, examples)
            with gr.Tab("Finished run", id="run", elem_id="tab-run"):
                browser = _run_tab(runs)
        _wire_ask(pool, extractor, parts, sessions)
        _wire_run(pool, runs, extractor, parts, browser, tabs, sessions)
        page.unload(lambda: None)  # with this event, Gradio keeps a connection open, which keeps the session alive
    return page


def _component(name: str, value: str, template: str, script: str) -> gr.HTML:
    """Make a component from a template and a script of ours; its value is the data that they show."""
    return gr.HTML(value, html_template=str(template), js_on_load=str(script), elem_id=name, apply_default_css=False)


def _ask_tab(pool: ModelPool, examples: Sequence[Path]) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=300, elem_id="asking"):
            picture = gr.Image(
                type="filepath", sources=["upload", "clipboard"], label="picture", height=260, elem_id="photograph",
                buttons=[],
            )  # fmt: skip
            # keep Gradio from decoding the file: it is read, and may be refused, where pictures for the model are
            picture.preprocess = lambda upload: None if upload is None else upload.path
            if examples:
                gr.Examples([[str(path)] for path in examples], inputs=[picture], label="examples", elem_id="examples")
            parts["picture"] = picture
            parts["question"] = gr.Textbox(QUESTION, label="question", lines=2, max_lines=6, elem_id="question")
            with gr.Row():
                parts["ask"] = gr.Button("Ask", variant="primary", elem_id="ask", min_width=100)
                parts["stop"] = gr.Button("Stop", elem_id="stop", min_width=80)
            parts["model"] = gr.Dropdown(pool.names, value=pool.name, label="model", elem_id="model")
            with gr.Accordion("generation", open=False):
                parts["temperature"] = gr.Slider(
                    0, 2, 0, step=0.05, label="temperature", info="0: always the most probable token"
                )
                parts["top_p"] = gr.Slider(0.05, 1, 1, step=0.05, label="top-p", info="read with a temperature")
                parts["beams"] = gr.Slider(
                    1, answer.MAX_BEAMS, 1, step=1, label="beams", info="more than 1: not shown while written"
                )
                parts["length"] = gr.Slider(1, answer.MAX_LENGTH, 128, step=1, label="length", info="tokens at most")
                parts["seed"] = gr.Number(0, label="seed", precision=0, info="of the drawing")
        with gr.Column(scale=3, min_width=320, elem_id="looking"):
            script = asset("diagnosis/viewer.js")
            parts["view"] = _component("view", payload.message(HINT), render.viewer(), script)
    return parts


def _wire_ask(pool: ModelPool, extractor: MentionExtractor, parts: dict[str, Any], sessions: Sessions) -> None:
    def own_file(picture: str | None) -> Path | None:
        return None if picture is None else sessions.own_file(picture)

    def ask(
        request: gr.Request,
        model: str,
        picture: str | None,
        text: str,
        temperature: float,
        top_p: float,
        beams: int,
        length: int,
        seed: int,
    ) -> Iterator[str]:
        try:
            generation = answer.generation(temperature, top_p, beams, length, seed)
            question = answer.Question(model, own_file(picture), text, generation)
        except Exception as error:
            yield payload.failure(error)
            return
        yield from _stored(answer.ask(pool, question, extractor), request, sessions)

    def change_scope(request: gr.Request, event: gr.EventData) -> Iterator[str]:
        session = sessions.answer(str(request.session_hash))
        try:
            answer_id, scope = event.answer_id, str(event.scope)
        except AttributeError:  # the event does not come from our viewer
            answer_id, scope = None, ""
        if session is None or session.id != answer_id:
            yield payload.message("this answer is no longer there: ask again", "error")
            return
        yield from _stored(answer.explain_again(pool, session, scope, extractor), request, sessions)

    def check_picture(picture: str | None) -> Any:
        """Read a picture once it is uploaded, so that an error is shown before a question is asked."""
        try:
            if picture is not None:
                answer.read_picture(own_file(picture))
        except Exception as error:
            return payload.failure(error)
        return gr.skip()

    options = {"concurrency_id": MODEL, "concurrency_limit": 1, "show_progress": "hidden", "api_visibility": "private"}
    names = ("model", "picture", "question", "temperature", "top_p", "beams", "length", "seed")
    inputs, view = [parts[name] for name in names], parts["view"]
    asking = gr.on([parts["ask"].click, parts["question"].submit], ask, inputs, view, trigger_mode="once", **options)
    view.gradient(change_scope, None, view, **options)
    parts["picture"].change(check_picture, parts["picture"], view, **{**options, "concurrency_id": "picture"})
    parts["stop"].click(
        lambda: payload.message("stopped", clear=True), None, view, cancels=[asking], show_progress="hidden",
        queue=False, api_visibility="private",
    )  # fmt: skip


def _stored(steps: Iterator[answer.Step], request: gr.Request, sessions: Sessions) -> Iterator[str]:
    """Yield the JSON of every step, and store the answer in the request's session."""
    for data, session in steps:
        if session is not None:
            sessions.set_answer(str(request.session_hash), session)
        yield data


def _run_tab(runs: Runs) -> dict[str, Any]:
    names = runs.names
    run = gr.Dropdown(names, value=runs.first, label="run", elem_id="run", interactive=bool(names))
    with gr.Tabs():
        with gr.Tab("Samples"):
            listing = _component("list", runs.listing(runs.first), fill("app/samples.html"), asset("app/samples.js"))
        with gr.Tab("Figures") as figures:
            placeholder = payload.encode("figures", note="making the figures …" if names else NO_RUN)
            report = _component("figures", placeholder, fill("app/figures.html"), asset("app/figures.js"))
    return {"run": run, "list": listing, "figures": figures, "report": report}


def _wire_run(
    pool: ModelPool,
    runs: Runs,
    extractor: MentionExtractor,
    parts: dict[str, Any],
    browser: dict[str, Any],
    tabs: gr.Tabs,
    sessions: Sessions,
) -> None:
    options = {"show_progress": "minimal", "api_visibility": "private"}

    def open_sample(request: gr.Request, run: str | None, model: str, event: gr.EventData) -> Iterator[tuple[Any, ...]]:
        """Open a sample in the first tab, with its stored answer."""
        unchanged = gr.skip()
        try:
            question = runs.question(str(run), str(event.task), str(event.sample), pool, model)
            if question.picture is not None:
                sessions.use(str(request.session_hash), [question.picture])
        except Exception as error:
            gr.Warning(escape(json.loads(payload.failure(error))["text"]), duration=8)
            yield (unchanged,) * 5
            return
        inputs = gr.Tabs(selected="ask"), str(question.picture), question.text, question.model
        for data in _stored(answer.ask(pool, question, extractor), request, sessions):
            yield *inputs, data
            inputs = (unchanged,) * 4

    browser["run"].change(runs.listing, browser["run"], browser["list"], **options)
    empty = payload.encode("figures", note="")
    browser["run"].change(lambda: empty, None, browser["report"], **options)
    browser["figures"].select(runs.figures, browser["run"], browser["report"], **options)
    outputs = [tabs, parts["picture"], parts["question"], parts["model"], parts["view"]]
    browser["list"].look(
        open_sample, [browser["run"], parts["model"]], outputs, concurrency_id=MODEL, concurrency_limit=1, **options
    )
