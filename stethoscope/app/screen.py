"""The page of ``stethoscope app``: a tab to ask and look, and a tab over finished runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr

from stethoscope.app import asking, payload
from stethoscope.app.models import Pool
from stethoscope.app.runs import NO_RUN, Runs
from stethoscope.app.sessions import Sessions
from stethoscope.diagnosis.readers import Reader
from stethoscope.markup import escape

TITLE = "LVLM-Stethoscope"
QUESTION = "Please describe this image in detail."
HINT = "Choose a picture, ask, and then click any word of the answer, or go through them with ← and →."
MODEL = "model"  # events of one name take turns, since they need the model


def style() -> str:
    """CSS of the whole page."""
    resources = files("stethoscope.app")
    return "\n".join(resources.joinpath(name).read_text("utf-8") for name in ("view.css", "page.css"))


def theme() -> gr.themes.Base:
    """Fonts of the machine: nothing is fetched."""
    sans, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    return gr.themes.Base(font=sans, font_mono=mono, primary_hue="blue", neutral_hue="slate", radius_size="md")


def build_screen(pool: Pool, runs: Runs, reader: Reader, examples: Sequence[Path], sessions: Sessions) -> gr.Blocks:
    """The page; ``queue`` and ``launch`` make it a server.

    Args:
        pool: the models.
        runs: finished runs to look through.
        reader: finds the objects that a text names.
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
        _wire_ask(pool, reader, parts, sessions)
        _wire_run(pool, runs, reader, parts, browser, tabs, sessions)
        screen.unload(lambda: None)  # a page with this event holds a connection open, by which its session lives
    return screen


def _component(name: str, value: str, **options: Any) -> gr.HTML:
    """A component of our own: template and script lie beside this file, data comes as its value."""
    resources = files("stethoscope.app")
    template, script = (resources.joinpath(f"{name}.{kind}").read_text("utf-8") for kind in ("html", "js"))
    return gr.HTML(value, html_template=template, js_on_load=script, elem_id=name, apply_default_css=False, **options)


def _ask_tab(pool: Pool, examples: Sequence[Path]) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=300, elem_id="asking"):
            picture = gr.Image(
                type="filepath", sources=["upload", "clipboard"], label="picture", height=260, elem_id="photograph",
                buttons=[],
            )  # fmt: skip
            # the file as it was uploaded, so that it is read, and found broken, where the model's pictures are read
            picture.preprocess = lambda given: None if given is None else given.path
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
                    1, asking.MAX_BEAMS, 1, step=1, label="beams", info="more than 1: not shown while written"
                )
                parts["length"] = gr.Slider(1, asking.MAX_LENGTH, 128, step=1, label="length", info="tokens at most")
                parts["seed"] = gr.Number(0, label="seed", precision=0, info="of the drawing")
        with gr.Column(scale=3, min_width=320, elem_id="looking"):
            parts["view"] = _component("view", payload.message(HINT))
    return parts


def _wire_ask(pool: Pool, reader: Reader, parts: dict[str, Any], sessions: Sessions) -> None:
    options = [parts[name] for name in ("temperature", "top_p", "beams", "length", "seed")]

    def own_file(picture: str | None) -> Path | None:
        return None if picture is None else sessions.own_file(picture)

    def ask(request: gr.Request, model: str, picture: str | None, question: str, *settings: float) -> Iterator[str]:
        try:
            asked = asking.Question(model, own_file(picture), question, asking.generation(*settings))
        except Exception as error:
            yield payload.failure(error)
            return
        yield from _kept(asking.ask(pool, asked, reader), request, sessions)

    def look_again(request: gr.Request, event: gr.EventData) -> Iterator[str]:
        case = sessions.case(str(request.session_hash))
        try:
            chosen, scope = event.case, str(event.scope)
        except AttributeError:  # no event of the page
            chosen = scope = None
        if case is None or case.id != chosen:
            yield payload.message("this answer is no longer there: ask again", "error")
            return
        yield from _kept(asking.again(pool, case, scope, reader), request, sessions)

    def arrived(picture: str | None) -> Any:
        """Read a picture when it arrives, so that what is wrong with it is said before a question is written."""
        try:
            if picture is not None:
                asking.read_picture(own_file(picture))
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


def _kept(steps: Iterator[asking.Step], request: gr.Request, sessions: Sessions) -> Iterator[str]:
    """What to show, while the session remembers the answer that it is about."""
    for shown, case in steps:
        if case is not None:
            sessions.keep_case(str(request.session_hash), case)
        yield shown


def _run_tab(runs: Runs) -> dict[str, Any]:
    names = runs.names
    chosen = gr.Dropdown(names, value=runs.first, label="run", elem_id="run", interactive=bool(names))
    with gr.Tabs():
        with gr.Tab("Samples"):
            listing = _component("list", runs.listing(runs.first))
        with gr.Tab("Figures") as figures:
            report = _component("figures", payload.encode("figures", note="making the figures …" if names else NO_RUN))
    return {"run": chosen, "list": listing, "figures": figures, "report": report}


def _wire_run(
    pool: Pool,
    runs: Runs,
    reader: Reader,
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
        for shown in _kept(asking.ask(pool, asked, reader), request, sessions):
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
