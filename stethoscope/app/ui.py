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
from stethoscope.diagnosis.run_diagnosis import MentionExtractor

TITLE = "LVLM-Stethoscope"
QUESTION = "Please describe this image in detail."
HINT = "Choose a picture, ask, and then click any word of the answer, or go through them with ← and →."
MODEL = "model"  # events of one name take turns, since they need the model


def style() -> str:
    """Read the CSS of the whole page."""
    return "\n".join([asset("diagnosis/viewer.css"), asset("app/app.css")])


def theme() -> gr.themes.Base:
    """Make a theme with the fonts of the machine: nothing is fetched."""
    sans, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    return gr.themes.Base(font=sans, font_mono=mono, primary_hue="blue", neutral_hue="slate", radius_size="md")


def build_page(
    pool: ModelPool, runs: Runs, extractor: MentionExtractor, examples: Sequence[Path], sessions: Sessions
) -> gr.Blocks:
    """Build the page; ``queue`` and ``launch`` make it a server.

    Args:
        pool: the models.
        runs: finished runs to look through.
        extractor: finds the objects that a text names.
        examples: files of pictures to choose from.
        sessions: of the server; they keep the answer that each page looks at.
    """
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as screen:
        gr.HTML(f"<h1>{TITLE}</h1>", elem_classes="st-head", js_on_load=None)
        with gr.Tabs(selected="ask") as tabs:
            with gr.Tab("Ask", id="ask", elem_id="tab-ask"):
                parts = _ask_tab(pool, examples)
            with gr.Tab("Finished run", id="run", elem_id="tab-run"):
                browser = _run_tab(runs)
        _wire_ask(pool, extractor, parts, sessions)
        _wire_run(pool, runs, extractor, parts, browser, tabs, sessions)
        screen.unload(lambda: None)  # a page with this event holds a connection open, by which its session lives
    return screen


def _component(name: str, value: str, template: str, script: str) -> gr.HTML:
    """Make a component of our own; data comes as its value."""
    return gr.HTML(value, html_template=str(template), js_on_load=str(script), elem_id=name, apply_default_css=False)


def _ask_tab(pool: ModelPool, examples: Sequence[Path]) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=300, elem_id="asking"):
            picture = gr.Image(
                type="filepath", sources=["upload", "clipboard"], label="picture", height=260, elem_id="photograph",
                buttons=[],
            )  # fmt: skip
            # the file as it was uploaded, so that it is read, and found broken, where the model's pictures are read
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
    options = [parts[name] for name in ("temperature", "top_p", "beams", "length", "seed")]

    def own_file(picture: str | None) -> Path | None:
        return None if picture is None else sessions.own_file(picture)

    def ask(request: gr.Request, model: str, picture: str | None, question: str, *settings: float) -> Iterator[str]:
        try:
            asked = answer.Question(model, own_file(picture), question, answer.generation(*settings))
        except Exception as error:
            yield payload.failure(error)
            return
        yield from _kept(answer.ask(pool, asked, extractor), request, sessions)

    def look_again(request: gr.Request, event: gr.EventData) -> Iterator[str]:
        kept = sessions.answer(str(request.session_hash))
        try:
            chosen, scope = event.answer_id, str(event.scope)
        except AttributeError:  # no event of the page
            chosen = scope = None
        if kept is None or kept.id != chosen:
            yield payload.message("this answer is no longer there: ask again", "error")
            return
        yield from _kept(answer.explain_again(pool, kept, scope, extractor), request, sessions)

    def arrived(picture: str | None) -> Any:
        """Read a picture when it arrives, so that what is wrong with it is said before a question is written."""
        try:
            if picture is not None:
                answer.read_picture(own_file(picture))
        except Exception as error:
            return payload.failure(error)
        return gr.skip()

    turn = {"concurrency_id": MODEL, "concurrency_limit": 1, "show_progress": "hidden", "api_visibility": "private"}
    inputs, view = [parts["model"], parts["picture"], parts["question"], *options], parts["view"]
    begun = gr.on([parts["ask"].click, parts["question"].submit], ask, inputs, view, trigger_mode="once", **turn)
    view.gradient(look_again, None, view, **turn)
    parts["picture"].change(arrived, parts["picture"], view, **{**turn, "concurrency_id": "picture"})
    parts["stop"].click(
        lambda: payload.message("stopped", clear=True), None, view, cancels=[begun], show_progress="hidden",
        queue=False, api_visibility="private",
    )  # fmt: skip


def _kept(steps: Iterator[answer.Step], request: gr.Request, sessions: Sessions) -> Iterator[str]:
    """What to show, while the session remembers the answer that it is about."""
    for shown, session in steps:
        if session is not None:
            sessions.keep_answer(str(request.session_hash), session)
        yield shown


def _run_tab(runs: Runs) -> dict[str, Any]:
    names = runs.names
    chosen = gr.Dropdown(names, value=runs.first, label="run", elem_id="run", interactive=bool(names))
    with gr.Tabs():
        with gr.Tab("Samples"):
            listing = _component("list", runs.listing(runs.first), fill("app/samples.html"), asset("app/samples.js"))
        with gr.Tab("Figures") as figures:
            waiting = payload.encode("figures", note="making the figures …" if names else NO_RUN)
            report = _component("figures", waiting, fill("app/figures.html"), asset("app/figures.js"))
    return {"run": chosen, "list": listing, "figures": figures, "report": report}


def _wire_run(
    pool: ModelPool,
    runs: Runs,
    extractor: MentionExtractor,
    parts: dict[str, Any],
    browser: dict[str, Any],
    tabs: gr.Tabs,
    sessions: Sessions,
) -> None:
    quiet = {"show_progress": "minimal", "api_visibility": "private"}

    def look(request: gr.Request, run: str | None, model: str, event: gr.EventData) -> Iterator[tuple[Any, ...]]:
        """Open a sample in the first tab, with its stored answer."""
        unchanged = gr.skip()
        try:
            asked = runs.question(str(run), str(event.task), str(event.sample), pool, model)
            sessions.use(str(request.session_hash), [asked.picture])
        except Exception as error:
            gr.Warning(escape(json.loads(payload.failure(error))["text"]), duration=8)
            yield (unchanged,) * 5
            return
        first = gr.Tabs(selected="ask"), str(asked.picture), asked.text, asked.model
        for shown in _kept(answer.ask(pool, asked, extractor), request, sessions):
            yield *first, shown
            first = (unchanged,) * 4

    browser["run"].change(runs.listing, browser["run"], browser["list"], **quiet)
    emptied = payload.encode("figures", note="")
    browser["run"].change(lambda: emptied, None, browser["report"], **quiet)
    browser["figures"].select(runs.figures, browser["run"], browser["report"], **quiet)
    outputs = [tabs, parts["picture"], parts["question"], parts["model"], parts["view"]]
    browser["list"].look(
        look, [browser["run"], parts["model"]], outputs, concurrency_id=MODEL, concurrency_limit=1, **quiet
    )
