"""The page of ``stethoscope app``: a tab to ask and look, and a tab over finished runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr

from stethoscope.app import asking, payload
from stethoscope.app.models import Pool
from stethoscope.app.runs import NO_RUN, Runs
from stethoscope.diagnosis.readers import Reader
from stethoscope.errors import StethoscopeError
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


def build_screen(pool: Pool, runs: Runs, reader: Reader, examples: Sequence[Path]) -> gr.Blocks:
    """The page; ``queue`` and ``launch`` make it a server.

    Args:
        pool: the models.
        runs: finished runs to look through.
        reader: finds the objects that a text names.
        examples: files of pictures to choose from.
    """
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as screen:
        gr.HTML(f"<h1>{TITLE}</h1>", elem_classes="st-head", js_on_load=None)
        case = gr.State(None)
        with gr.Tabs(selected="ask") as tabs:
            with gr.Tab("Ask", id="ask", elem_id="tab-ask"):
                parts = _ask_tab(pool, examples)
            with gr.Tab("Finished run", id="run", elem_id="tab-run"):
                browser = _run_tab(runs)
        _wire_ask(pool, reader, parts, case)
        _wire_run(pool, runs, reader, parts, browser, tabs, case)
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
                parts["beams"] = gr.Slider(1, 10, 1, step=1, label="beams", info="more than 1: not shown while written")
                parts["length"] = gr.Slider(1, 512, 128, step=1, label="length", info="tokens at most")
                parts["seed"] = gr.Number(0, label="seed", precision=0, info="of the drawing")
        with gr.Column(scale=3, min_width=320, elem_id="looking"):
            parts["view"] = _component("view", payload.message(HINT))
    return parts


def _wire_ask(pool: Pool, reader: Reader, parts: dict[str, Any], case: gr.State) -> None:
    options = [parts[name] for name in ("temperature", "top_p", "beams", "length", "seed")]

    def ask(model: str, picture: str | None, question: str, *settings: float) -> Iterator[asking.Step]:
        try:
            asked = asking.Question(model, asking.read_picture(picture), question, asking.generation(*settings))
        except StethoscopeError as error:
            yield payload.message(str(error), "error"), None
            return
        yield from asking.ask(pool, asked, reader)

    def look_again(case: asking.Case | None, event: gr.EventData) -> Iterator[asking.Step]:
        if case is None or case.id != event.case:
            yield payload.message("this answer is no longer there: ask again", "error"), case
            return
        yield from asking.again(pool, case, str(event.scope), reader)

    shown = [parts["view"], case]
    turn = {"concurrency_id": MODEL, "concurrency_limit": 1, "show_progress": "hidden", "api_visibility": "private"}
    inputs = [parts["model"], parts["picture"], parts["question"], *options]
    begun = gr.on([parts["ask"].click, parts["question"].submit], ask, inputs, shown, trigger_mode="once", **turn)
    parts["view"].gradient(look_again, [case], shown, **turn)
    parts["stop"].click(
        lambda: payload.message("stopped", clear=True), None, parts["view"], cancels=[begun], show_progress="hidden",
        queue=False, api_visibility="private",
    )  # fmt: skip


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
    case: gr.State,
) -> None:
    quiet = {"show_progress": "minimal", "api_visibility": "private"}

    def look(run: str | None, model: str, event: gr.EventData) -> Iterator[tuple[Any, ...]]:
        """Opens a sample in the first tab, with its stored answer."""
        unchanged = gr.skip()
        try:
            asked, file = runs.question(str(run), str(event.task), str(event.sample), pool, model)
        except StethoscopeError as error:
            gr.Warning(escape(error), duration=8)
            yield (unchanged,) * 6
            return
        first = gr.Tabs(selected="ask"), str(file), asked.text, asked.model
        for shown, found in asking.ask(pool, asked, reader):
            yield *first, shown, found
            first = (unchanged,) * 4

    browser["run"].change(runs.listing, browser["run"], browser["list"], **quiet)
    emptied = payload.encode("figures", note="")
    browser["run"].change(lambda: emptied, None, browser["report"], **quiet)
    browser["figures"].select(runs.figures, browser["run"], browser["report"], **quiet)
    outputs = [tabs, parts["picture"], parts["question"], parts["model"], parts["view"], case]
    browser["list"].look(
        look, [browser["run"], parts["model"]], outputs, concurrency_id=MODEL, concurrency_limit=1, **quiet
    )
