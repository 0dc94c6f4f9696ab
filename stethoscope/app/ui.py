"""Build the page of ``stethoscope app``: a tab to ask and look, and a tab over runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from stethoscope.app import answer, payload
from stethoscope.app.access import credentials
from stethoscope.app.model_pool import ModelPool
from stethoscope.app.runs import ALL, NO_RUN, ExamplePicture, Runs
from stethoscope.app.sessions import Sessions
from stethoscope.core.component import choices
from stethoscope.core.errors import DataError
from stethoscope.core.html import asset, data_uri, escape, json_text
from stethoscope.core.html import render as fill
from stethoscope.core.images import file_digest, read_image
from stethoscope.detection.lookup import AUTO
from stethoscope.diagnosis import render
from stethoscope.tasks.object_extraction import MentionExtractor

TITLE = "LVLM-Stethoscope"
QUESTION = "Please describe this image in detail."
NEW_CONVERSATION = "A new conversation: the next question begins it."
HINT = "Choose a picture, ask, and then click any word of the answer, or go through them with ← and →."
MOST_THUMBNAILS = 40  # in one request
LONGEST_STOP = 300.0  # seconds for which Stop waits at most until the model has ended its pass
MODEL = "model"  # concurrency id of the events that need the model, of which one runs at a time


def style() -> str:
    """Read the CSS of the whole page."""
    return "\n".join(map(asset, ("diagnosis/viewer.css", "report/samples.css", "app/app.css")))


def _warn(error: Exception) -> None:
    """Show an error in a corner of the page."""
    gr.Warning(escape(payload.error_text(error)), duration=8)


def theme() -> gr.themes.Base:
    """Build a theme with system fonts, so that no font is fetched."""
    sans, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    return gr.themes.Base(font=sans, font_mono=mono, primary_hue="blue", neutral_hue="zinc", radius_size="md")


def build_page(
    pool: ModelPool, runs: Runs, extractor: MentionExtractor, examples: Sequence[ExamplePicture], sessions: Sessions
) -> gr.Blocks:
    """Build the page, which ``server.start`` serves.

    Args:
        pool: the models.
        runs: for the second tab.
        extractor: extracts the objects that a text names.
        examples: pictures to choose from, of which it is known what they show.
        sessions: of the server, which store the answer that each page shows.
    """
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        gr.HTML(f"<h1>{TITLE}</h1>", elem_classes="st-head", js_on_load=None)
        with gr.Tabs(selected="ask") as tabs:
            with gr.Tab("Ask", id="ask", elem_id="tab-ask"):
                parts = _ask_tab(pool, examples)
            with gr.Tab("Runs", id="run", elem_id="tab-run"):
                browser = _run_tab(runs)
        writing = _wire_ask(pool, extractor, parts, sessions, examples)
        writing += _wire_run(pool, runs, extractor, parts, browser, tabs, sessions)
        _wire_stop(parts, sessions, writing)
        page.unload(lambda: None)  # with this event, Gradio keeps a connection open, which keeps the session alive
    return page


def _component(name: str, value: str, template: str, script: str) -> gr.HTML:
    """Make a component from a template and a script of ours; its value is the data that they show."""
    return gr.HTML(value, html_template=str(template), js_on_load=str(script), elem_id=name, apply_default_css=False)


def _ask_tab(pool: ModelPool, examples: Sequence[ExamplePicture]) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=300, elem_id="asking"):
            picture = gr.Image(
                type="filepath", sources=["upload", "clipboard"], label="picture", height=260, elem_id="photograph",
                buttons=[],
            )  # fmt: skip
            shown = [
                {"name": example.name, "picture": data_uri(read_image(example.file, example.name))}
                for example in examples
            ]
            parts["examples"] = _component(
                "examples", json_text(shown), fill("app/examples.html"), asset("app/examples.js")
            )
            parts["picture"] = picture
            parts["question"] = gr.Textbox(
                QUESTION, label="question", info="Shift + Enter asks", lines=2, max_lines=6, elem_id="question"
            )
            with gr.Row():
                parts["ask"] = gr.Button("Ask", variant="primary", elem_id="ask", min_width=100)
                parts["stop"] = gr.Button("Stop", elem_id="stop", min_width=80)
            _component("busy", "", fill("app/busy.html"), "")
            parts["anew"] = gr.Button("New conversation", elem_id="anew", size="sm")
            parts["model"] = gr.Dropdown(pool.names, value=pool.name, label="model", elem_id="model")
            parts["detector"] = gr.Dropdown(
                pool.detector_names, value=AUTO, label="detector", elem_id="detector",
                info="auto: the one that the app was started with, or found",
            )  # fmt: skip
            parts["square"] = gr.Dropdown(
                [(label, name) for name, label in answer.SQUARED.items()], value=answer.OWN_SQUARE,
                label="shape of the picture", info="of one that is no square", elem_id="square",
            )  # fmt: skip
            with gr.Accordion("generation", open=False):
                parts["temperature"] = gr.Slider(
                    0, 2, 0, step=0.05, label="temperature", info="0: always the most probable token"
                )
                parts["top_p"] = gr.Slider(0.05, 1, 1, step=0.05, label="top-p", info="read with a temperature")
                parts["beams"] = gr.Slider(
                    1, answer.MAX_BEAMS, 1, step=1, label="beams", info="more than 1: not shown while written"
                )
                parts["length"] = gr.Slider(1, answer.MAX_LENGTH, 128, step=1, label="length", info="tokens at most")
                parts["mitigation"] = gr.Dropdown(
                    ["none", *(name for name in choices("mitigation") if name != "none")],
                    value="none", label="mitigation", info="against hallucinated objects", elem_id="mitigation",
                )  # fmt: skip
                parts["seed"] = gr.Number(0, label="seed", precision=0, info="of the drawing")
        with gr.Column(scale=3, min_width=320, elem_id="looking"):
            script = render.script() + asset("app/waiting.js")
            parts["view"] = _component("view", payload.message(HINT), render.viewer(), script)
            parts["download"] = _component("download", "{}", fill("app/nothing.html"), asset("app/download.js"))
    return parts


def _wire_ask(
    pool: ModelPool,
    extractor: MentionExtractor,
    parts: dict[str, Any],
    sessions: Sessions,
    examples: Sequence[ExamplePicture],
) -> list[Any]:
    """Wire the first tab; return the events that show an answer."""
    truths = {file_digest(example.file): example.objects for example in examples}

    def own_file(picture: Mapping[str, Any] | None) -> Path | None:
        path = None if picture is None else picture["path"]
        return None if path is None else sessions.own_file(path)

    def ask(
        request: gr.Request,
        model: str,
        picture: Mapping[str, Any] | None,
        text: str,
        temperature: float,
        top_p: float,
        beams: int,
        length: int,
        seed: int,
        mitigation: str,
        detector: str,
        square: str,
    ) -> Iterator[str]:
        try:
            generation = answer.generation(temperature, top_p, beams, length, seed)
            file = own_file(picture)
            truth = None if file is None else truths.get(file_digest(file))
            question = answer.Question(
                model, file, text, generation, truth=truth, mitigation=mitigation, detector_name=detector, square=square
            )
            earlier = answer.earlier_turns(sessions.conversation(str(request.session_hash)), question)
            question = replace(question, earlier=earlier)
        except Exception as error:
            turns = sessions.conversation(str(request.session_hash))
            yield payload.failure(error, True, payload.conversation(turns))
            return
        yield from _stored(answer.ask(pool, question, extractor), request, sessions)

    def shown_session(request: gr.Request, event: gr.EventData) -> answer.AnswerSession:
        """Return the session of the answer that an event of the viewer is about."""
        wanted = getattr(event, "answer_id", None)
        session = next((turn for turn in sessions.conversation(str(request.session_hash)) if turn.id == wanted), None)
        if session is None:
            raise DataError("this answer is no longer there: ask again")
        return session

    def look_again(request: gr.Request, event: gr.EventData) -> Iterator[str]:
        """Show an answer of the conversation, in the scope that the event asks for."""
        try:
            session, scope = shown_session(request, event), str(getattr(event, "scope", ""))
        except DataError as error:
            yield payload.failure(error)
            return
        conversation = sessions.conversation(str(request.session_hash))
        with sessions.answering(str(request.session_hash)):
            for data, _ in answer.explain_again(pool, session, scope, extractor, conversation):
                yield data

    def heads(request: gr.Request, event: gr.EventData) -> str:
        """Send the raw attention of one token's single heads, which did not fit into the answer's payload."""
        try:
            return answer.single_heads(pool, shown_session(request, event), getattr(event, "token", None))
        except Exception as error:
            return payload.failure(error, aside=True)

    def export(request: gr.Request, event: gr.EventData) -> Any:
        """Send the diagnosis as a file."""
        try:
            kind, scope = str(getattr(event, "kind", "")), str(getattr(event, "scope", ""))
            return answer.export(pool, shown_session(request, event), kind, scope, extractor)
        except Exception as error:
            _warn(error)
            return gr.skip()

    def check_picture(picture: Mapping[str, Any] | None) -> tuple[Any, Any]:
        """Read a picture once it is uploaded: what cannot be read goes, and what browsers cannot show is converted."""
        try:
            file = own_file(picture)
            shown = None if file is None else answer.displayable(file)
        except Exception as error:
            return None, payload.failure(error, aside=True)
        return gr.skip() if shown == file else str(shown), gr.skip()

    def pick(event: gr.EventData) -> Any:
        """Put an example into the picture's field."""
        index = getattr(event, "index", None)
        return str(examples[index].file) if isinstance(index, int) and 0 <= index < len(examples) else gr.skip()

    options = {"concurrency_id": MODEL, "concurrency_limit": 1, "show_progress": "hidden", "api_visibility": "private"}
    names = ("model", "picture", "question", "temperature", "top_p", "beams", "length", "seed")
    inputs, view = [parts[name] for name in (*names, "mitigation", "detector", "square")], parts["view"]
    tracked = {**options, "show_progress": "minimal"}  # waiting.js reads how many wait
    # Gradio would decode the picture: it is read, and may be refused, where pictures for the model are
    raw = {"preprocess": False}
    triggers = [parts["ask"].click, parts["question"].submit]
    asking = gr.on(triggers, ask, inputs, view, trigger_mode="once", **tracked, **raw)
    again = view.gradient(look_again, None, view, **tracked)
    view.heads(heads, None, view, **options)
    view.export(export, None, parts["download"], **options)
    quick = {**options, "concurrency_id": "picture"}
    parts["picture"].change(check_picture, parts["picture"], [parts["picture"], view], **quick, **raw)
    parts["examples"].pick(pick, None, parts["picture"], **quick)
    return [asking, again]


def _wire_stop(parts: dict[str, Any], sessions: Sessions, writing: Sequence[Any]) -> None:
    """Wire the buttons that end whatever shows an answer.

    Args:
        parts: of the first tab.
        sessions: of the server.
        writing: the events that show an answer.
    """

    def wait_for_the_end(session_hash: str) -> Iterator[str]:
        """Wait for the pass that the model is in: until it ends, Gradio drops another question in silence."""
        if not sessions.wait_until_answered(session_hash, 0):
            yield payload.message("stopping …", "busy")
            sessions.wait_until_answered(session_hash, LONGEST_STOP)

    def stop(request: gr.Request) -> Iterator[str]:
        """Show what is left of the conversation."""
        yield from wait_for_the_end(str(request.session_hash))
        turns = sessions.conversation(str(request.session_hash))
        yield payload.message("stopped", "stopped", clear=True, conversation=payload.conversation(turns))

    def begin_anew(request: gr.Request) -> Iterator[str]:
        """Forget the conversation."""
        yield from wait_for_the_end(str(request.session_hash))
        sessions.set_conversation(str(request.session_hash), ())
        yield payload.message(NEW_CONVERSATION, clear=True)

    options = {"show_progress": "hidden", "api_visibility": "private", "concurrency_id": "stop"}
    for name, then in (("stop", stop), ("anew", begin_anew)):  # once nothing more of the answer can come
        parts[name].click(None, cancels=writing).then(then, None, parts["view"], concurrency_limit=None, **options)


def _stored(steps: Iterator[answer.Step], request: gr.Request, sessions: Sessions) -> Iterator[str]:
    """Yield the JSON of every step, and store the conversation up to the answer in the request's session."""
    with sessions.answering(str(request.session_hash)):
        for data, session in steps:
            if session is not None:
                sessions.set_conversation(str(request.session_hash), session.conversation)
            yield data


def _run_tab(runs: Runs) -> dict[str, Any]:
    with gr.Row():
        run = gr.Dropdown(_shown(runs.names), value=runs.first, label="run", elem_id="run", min_width=260)
        other = gr.Dropdown(
            _others(runs.names), value=runs.other or "", label="beside it", elem_id="other", min_width=260
        )
    with gr.Tabs():
        with gr.Tab("Samples"):
            script = asset("diagnosis/parts.js") + asset("report/samples.js")
            shown = runs.listing(runs.first, runs.other)
            listing = _component("list", shown, fill("report/samples.html"), script)
            pictures = _component("thumbnails", "{}", fill("app/nothing.html"), asset("app/thumbnails.js"))
            saved = _component("saved-notes", "{}", fill("app/nothing.html"), asset("app/download.js"))
        with gr.Tab("Figures") as figures:
            placeholder = payload.encode("figures", note="making the figures …" if runs.first else NO_RUN)
            report = _component("figures", placeholder, fill("app/figures.html"), asset("app/figures.js"))
    return {
        "run": run, "other": other, "list": listing, "thumbnails": pictures, "figures": figures, "report": report,
        "saved": saved,
    }  # fmt: skip


def _shown(names: Sequence[str]) -> list[tuple[str, str]]:
    """List the choices of what the list shows, with their values: every run, and all of them."""
    return [*((name, name) for name in names), *([("all runs", ALL)] if names else [])]


def _others(names: Sequence[str]) -> list[tuple[str, str]]:
    """List the choices of a second run, with their values."""
    return [("none", ""), *((name, name) for name in names)]


def _wire_run(
    pool: ModelPool,
    runs: Runs,
    extractor: MentionExtractor,
    parts: dict[str, Any],
    browser: dict[str, Any],
    tabs: gr.Tabs,
    sessions: Sessions,
) -> list[Any]:
    """Wire the second tab; return the events that show an answer."""
    options = {"show_progress": "minimal", "api_visibility": "private"}
    chosen = [browser["run"], browser["other"]]

    def open_sample(
        request: gr.Request, model: str, shown: str | None, other: str | None, event: gr.EventData
    ) -> Iterator[tuple[Any, ...]]:
        """Open a sample in the first tab, with its stored answer: from the list, from its neighbour, or by its link."""
        unchanged = gr.skip()
        try:
            run, start = str(event.run), event.mention
            mention = start if isinstance(start, int) else None
            question = runs.question(run, str(event.task), str(event.sample), pool, model, mention)
            if question.picture is not None:
                sessions.use(str(request.session_hash), [question.picture])
        except Exception as error:
            _warn(error)
            yield (unchanged,) * 6
            return
        # a run that is newer than the page is a choice from here on; the list of several runs stays as it is
        stays = shown == ALL or run == other
        listed = gr.update(choices=_shown(runs.names), value=shown if stays else run)
        inputs = gr.Tabs(selected="ask"), str(question.picture), question.text, question.model, listed
        for data in _stored(answer.ask(pool, question, extractor), request, sessions):
            yield *inputs, data
            inputs = unchanged, *inputs[1:]  # Gradio mixes up a value and a skip in the steps of one event

    def thumbnails(event: gr.EventData) -> str:
        """Send small pictures of the samples that the list shows."""
        samples = event.samples if isinstance(event.samples, list) else []
        return runs.thumbnails(str(event.run), [str(sample) for sample in samples[:MOST_THUMBNAILS]])

    def refresh(event: gr.EventData) -> tuple[Any, ...]:
        """Send the list again if its runs have changed; whoever asks for it also sees runs that are new."""
        listing = runs.refreshed(str(event.run), str(event.other), str(event.state))
        known = (str(name) for name in (event.run, event.other) if name and name != ALL)
        names = list(dict.fromkeys([*runs.names, *known]))  # one that is shown may be gone
        menus = gr.update(choices=_shown(names)), gr.update(choices=_others(names))
        return gr.skip() if listing is None else listing, *(menus if event.asked is True else (gr.skip(), gr.skip()))

    def write_note(request: gr.Request, event: gr.EventData) -> Any:
        """Write a note on a sample, and send the list with it."""
        try:
            values = {key: getattr(event, key, None) for key in ("task", "sample", "start", "label", "tags", "text")}
            account, _ = credentials(request.headers.get("authorization"))  # verified by AccessMiddleware
            runs.annotate(str(event.run), values, account)
        except Exception as error:
            _warn(error)
            return gr.skip()
        return runs.listing(str(event.shown), str(event.other))

    def save_notes(event: gr.EventData) -> Any:
        """Send the notes of a run as a file."""
        try:
            return runs.notes(str(event.run), str(event.kind))
        except Exception as error:
            _warn(error)
            return gr.skip()

    quiet = {**options, "show_progress": "hidden", "concurrency_id": "list", "concurrency_limit": 1}
    pictures = {**quiet, "concurrency_id": "thumbnails", "trigger_mode": "multiple"}  # asked for while some arrive
    browser["list"].thumbnails(thumbnails, None, browser["thumbnails"], **pictures)
    browser["list"].refresh(refresh, None, [browser["list"], *chosen], **quiet)
    browser["list"].note(write_note, None, browser["list"], **quiet)
    browser["list"].notes(save_notes, None, browser["saved"], **quiet)
    in_turn = {"concurrency_id": "list", "concurrency_limit": 1}  # so that the last choice is what is shown
    for menu in chosen:
        menu.change(runs.listing, chosen, browser["list"], **options, **in_turn)
        menu.change(runs.wanted_figures, chosen, browser["report"], **options, **in_turn)
    browser["figures"].select(runs.figures, chosen, browser["report"], **options)
    browser["report"].draw(runs.figures, chosen, browser["report"], **options)
    inputs = [parts["model"], *chosen]
    outputs = [tabs, parts["picture"], parts["question"], parts["model"], browser["run"], parts["view"]]
    looks = (browser["list"].look, parts["view"].look)
    return [look(open_sample, inputs, outputs, concurrency_id=MODEL, concurrency_limit=1, **options) for look in looks]
