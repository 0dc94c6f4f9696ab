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
from stethoscope.app.pictures import ExamplePicture, displayable
from stethoscope.app.runs import ALL, NO_RUN, Runs
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
                asking = AskTab(pool, extractor, examples, sessions)
            with gr.Tab("Runs", id="run", elem_id="tab-run"):
                browsing = RunTab(pool, extractor, runs, asking, sessions)
        asking.wire_stop([*asking.wire(), *browsing.wire(tabs)])
        page.unload(lambda: None)  # with this event, Gradio keeps a connection open, which keeps the session alive
    return page


def _component(name: str, value: str, template: str, script: str) -> gr.HTML:
    """Make a component from a template and a script of ours; its value is the data that they show."""
    return gr.HTML(value, html_template=str(template), js_on_load=str(script), elem_id=name, apply_default_css=False)


class AskTab:
    """The first tab: picture, question, settings, and the answer with its diagnosis.

    Args:
        pool: the models.
        extractor: extracts the objects that a text names.
        examples: pictures to choose from, of which it is known what they show.
        sessions: of the server, which store the answer that each page shows.
    """

    def __init__(
        self, pool: ModelPool, extractor: MentionExtractor, examples: Sequence[ExamplePicture], sessions: Sessions
    ) -> None:
        self._pool, self._extractor, self._examples, self._sessions = pool, extractor, examples, sessions
        self._truths = {file_digest(example.file): example.objects for example in examples}
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=300, elem_id="asking"):
                self._add_question()
                self._add_choices()
                with gr.Accordion("generation", open=False):
                    self._add_generation()
            with gr.Column(scale=3, min_width=320, elem_id="looking"):
                script = render.script() + asset("app/waiting.js")
                self.view = _component("view", payload.message(HINT), render.viewer(), script)
                self._download = _component("download", "{}", fill("app/nothing.html"), asset("app/download.js"))

    def _add_question(self) -> None:
        """Add the picture, the question and their buttons."""
        shown = [
            {"name": example.name, "picture": data_uri(read_image(example.file, example.name))}
            for example in self._examples
        ]
        self.picture = gr.Image(
            type="filepath", sources=["upload", "clipboard"], label="picture", height=260, elem_id="photograph",
            buttons=[],
        )  # fmt: skip
        self._thumbnails = _component("examples", json_text(shown), fill("app/examples.html"), asset("app/examples.js"))
        self.question = gr.Textbox(
            QUESTION, label="question", info="Shift + Enter asks", lines=2, max_lines=6, elem_id="question"
        )
        with gr.Row():
            self._ask_button = gr.Button("Ask", variant="primary", elem_id="ask", min_width=100)
            self._stop_button = gr.Button("Stop", elem_id="stop", min_width=80)
        _component("busy", "", fill("app/busy.html"), "")
        self._anew_button = gr.Button("New conversation", elem_id="anew", size="sm")

    def _add_choices(self) -> None:
        """Add the choices of model, detector and shape of the picture."""
        self.model = gr.Dropdown(self._pool.names, value=self._pool.name, label="model", elem_id="model")
        self._detector = gr.Dropdown(
            self._pool.detector_names, value=AUTO, label="detector", elem_id="detector",
            info="auto: the one that the app was started with, or found",
        )  # fmt: skip
        self._square = gr.Dropdown(
            [(label, name) for name, label in answer.SQUARED.items()], value=answer.OWN_SQUARE,
            label="shape of the picture", info="of one that is no square", elem_id="square",
        )  # fmt: skip

    def _add_generation(self) -> None:
        """Add the settings of generation."""
        self._temperature = gr.Slider(0, 2, 0, step=0.05, label="temperature", info="0: always the most probable token")
        self._top_p = gr.Slider(0.05, 1, 1, step=0.05, label="top-p", info="read with a temperature")
        self._beams = gr.Slider(
            1, answer.MAX_BEAMS, 1, step=1, label="beams", info="more than 1: not shown while written"
        )
        self._length = gr.Slider(1, answer.MAX_LENGTH, 128, step=1, label="length", info="tokens at most")
        self._mitigation = gr.Dropdown(
            ["none", *(name for name in choices("mitigation") if name != "none")],
            value="none", label="mitigation", info="against hallucinated objects", elem_id="mitigation",
        )  # fmt: skip
        self._seed = gr.Number(0, label="seed", precision=0, info="of the drawing")

    def wire(self) -> list[Any]:
        """Wire the tab but for the buttons that end an answer; return the events that show one."""
        options = {
            "concurrency_id": MODEL, "concurrency_limit": 1, "show_progress": "hidden", "api_visibility": "private",
        }  # fmt: skip
        inputs = [
            self.model, self.picture, self.question, self._temperature, self._top_p, self._beams, self._length,
            self._seed, self._mitigation, self._detector, self._square,
        ]  # fmt: skip
        tracked = {**options, "show_progress": "minimal"}  # waiting.js reads how many wait
        # Gradio would decode the picture: it is read, and may be refused, where pictures for the model are
        raw = {"preprocess": False}
        triggers = [self._ask_button.click, self.question.submit]
        asking = gr.on(triggers, self._ask, inputs, self.view, trigger_mode="once", **tracked, **raw)
        again = self.view.gradient(self._look_again, None, self.view, **tracked)
        self.view.heads(self._heads, None, self.view, **options)
        self.view.export(self._export, None, self._download, **options)
        quick = {**options, "concurrency_id": "picture"}
        self.picture.change(self._check_picture, self.picture, [self.picture, self.view], **quick, **raw)
        self._thumbnails.pick(self._pick, None, self.picture, **quick)
        return [asking, again]

    def wire_stop(self, writing: Sequence[Any]) -> None:
        """Wire the buttons that end whatever shows an answer.

        Args:
            writing: the events that show an answer.
        """
        options = {"show_progress": "hidden", "api_visibility": "private", "concurrency_id": "stop"}
        for button, then in ((self._stop_button, self._stop), (self._anew_button, self._begin_anew)):
            # once nothing more of the answer can come
            button.click(None, cancels=writing).then(then, None, self.view, concurrency_limit=None, **options)

    def show_steps(self, steps: Iterator[answer.Step], request: gr.Request) -> Iterator[str]:
        """Yield the JSON of every step, and store the conversation up to the answer in the request's session."""
        with self._sessions.answering(str(request.session_hash)):
            for data, session in steps:
                if session is not None:
                    self._sessions.set_conversation(str(request.session_hash), session.conversation)
                yield data

    # --- answers to events of the page --------------------------------------------------------------------------------

    def _ask(
        self,
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
        conversation = self._conversation(request)
        try:
            generation = answer.generation(temperature, top_p, beams, length, seed)
            file = self._own_file(picture)
            truth = None if file is None else self._truths.get(file_digest(file))
            question = answer.Question(
                model, file, text, generation, truth=truth, mitigation=mitigation, detector_name=detector, square=square
            )
            question = replace(question, earlier=answer.earlier_turns(conversation, question))
        except Exception as error:
            yield payload.failure(error, True, payload.conversation(conversation))
            return
        yield from self.show_steps(answer.ask(self._pool, question, self._extractor), request)

    def _look_again(self, request: gr.Request, event: gr.EventData) -> Iterator[str]:
        """Show an answer of the conversation, in the scope that the event asks for."""
        try:
            session, scope = self._shown_session(request, event), str(getattr(event, "scope", ""))
        except DataError as error:
            yield payload.failure(error)
            return
        conversation = self._conversation(request)
        with self._sessions.answering(str(request.session_hash)):
            for data, _ in answer.explain_again(self._pool, session, scope, self._extractor, conversation):
                yield data

    def _heads(self, request: gr.Request, event: gr.EventData) -> str:
        """Send the raw attention of one token's single heads, which did not fit into the answer's payload."""
        try:
            session = self._shown_session(request, event)
            return answer.single_heads(self._pool, session, getattr(event, "token", None))
        except Exception as error:
            return payload.failure(error, aside=True)

    def _export(self, request: gr.Request, event: gr.EventData) -> Any:
        """Send the diagnosis as a file."""
        try:
            kind, scope = str(getattr(event, "kind", "")), str(getattr(event, "scope", ""))
            return answer.export(self._pool, self._shown_session(request, event), kind, scope, self._extractor)
        except Exception as error:
            _warn(error)
            return gr.skip()

    def _check_picture(self, picture: Mapping[str, Any] | None) -> tuple[Any, Any]:
        """Check a picture once it is uploaded, and convert one that browsers cannot show.

        One that cannot be read is taken away.
        """
        try:
            file = self._own_file(picture)
            shown = None if file is None else displayable(file)
        except Exception as error:
            return None, payload.failure(error, aside=True)
        return gr.skip() if shown == file else str(shown), gr.skip()

    def _pick(self, event: gr.EventData) -> Any:
        """Put an example into the picture's field."""
        index = getattr(event, "index", None)
        if isinstance(index, int) and 0 <= index < len(self._examples):
            return str(self._examples[index].file)
        return gr.skip()

    def _stop(self, request: gr.Request) -> Iterator[str]:
        """Show what is left of the conversation."""
        yield from self._wait_for_the_end(str(request.session_hash))
        turns = payload.conversation(self._conversation(request))
        yield payload.message("stopped", "stopped", clear=True, conversation=turns)

    def _begin_anew(self, request: gr.Request) -> Iterator[str]:
        """Forget the conversation."""
        yield from self._wait_for_the_end(str(request.session_hash))
        self._sessions.set_conversation(str(request.session_hash), ())
        yield payload.message(NEW_CONVERSATION, clear=True)

    def _wait_for_the_end(self, session_hash: str) -> Iterator[str]:
        """Wait for the pass that the model is in: until it ends, Gradio drops another question in silence."""
        if not self._sessions.wait_until_answered(session_hash, 0):
            yield payload.message("stopping …", "busy")
            self._sessions.wait_until_answered(session_hash, LONGEST_STOP)

    def _conversation(self, request: gr.Request) -> tuple[answer.AnswerSession, ...]:
        return self._sessions.conversation(str(request.session_hash))

    def _shown_session(self, request: gr.Request, event: gr.EventData) -> answer.AnswerSession:
        """Return the session of the answer that an event of the viewer is about."""
        wanted = getattr(event, "answer_id", None)
        session = next((turn for turn in self._conversation(request) if turn.id == wanted), None)
        if session is None:
            raise DataError("this answer is no longer there: ask again")
        return session

    def _own_file(self, picture: Mapping[str, Any] | None) -> Path | None:
        path = None if picture is None else picture["path"]
        return None if path is None else self._sessions.own_file(path)


class RunTab:
    """The second tab: the samples of runs, their figures, and notes on them.

    Args:
        pool: the models.
        extractor: extracts the objects that a text names.
        runs: to look through.
        asking: the first tab, in which samples are opened.
        sessions: of the server.
    """

    def __init__(
        self, pool: ModelPool, extractor: MentionExtractor, runs: Runs, asking: AskTab, sessions: Sessions
    ) -> None:
        self._pool, self._extractor, self._runs = pool, extractor, runs
        self._asking, self._sessions = asking, sessions
        with gr.Row():
            self._run = gr.Dropdown(
                _run_choices(runs.names), value=runs.first, label="run", elem_id="run", min_width=260
            )
            self._other = gr.Dropdown(
                _second_choices(runs.names), value=runs.other or "", label="beside it", elem_id="other", min_width=260
            )
        with gr.Tabs():
            with gr.Tab("Samples"):
                script = asset("diagnosis/parts.js") + asset("report/samples.js")
                shown = runs.listing(runs.first, runs.other)
                self._list = _component("list", shown, fill("report/samples.html"), script)
                nothing = fill("app/nothing.html")
                self._pictures = _component("thumbnails", "{}", nothing, asset("app/thumbnails.js"))
                self._saved_notes = _component("saved-notes", "{}", nothing, asset("app/download.js"))
            with gr.Tab("Figures") as self._figures_tab:
                placeholder = payload.encode("figures", note="making the figures …" if runs.first else NO_RUN)
                self._report = _component("figures", placeholder, fill("app/figures.html"), asset("app/figures.js"))

    def wire(self, tabs: gr.Tabs) -> list[Any]:
        """Wire the tab; return the events that show an answer.

        Args:
            tabs: both tabs, of which the first is shown when a sample is opened.
        """
        options = {"show_progress": "minimal", "api_visibility": "private"}
        quiet = {**options, "show_progress": "hidden", "concurrency_id": "list", "concurrency_limit": 1}
        pictures = {**quiet, "concurrency_id": "thumbnails", "trigger_mode": "multiple"}  # asked for while some arrive
        chosen = [self._run, self._other]
        self._list.thumbnails(self._thumbnails, None, self._pictures, **pictures)
        self._list.refresh(self._refresh, None, [self._list, *chosen], **quiet)
        self._list.note(self._write_note, None, self._list, **quiet)
        self._list.notes(self._save_notes, None, self._saved_notes, **quiet)
        in_turn = {"concurrency_id": "list", "concurrency_limit": 1}  # so that the last choice is what is shown
        for menu in chosen:
            menu.change(self._runs.listing, chosen, self._list, **options, **in_turn)
            menu.change(self._runs.wanted_figures, chosen, self._report, **options, **in_turn)
        self._figures_tab.select(self._runs.figures, chosen, self._report, **options)
        self._report.draw(self._runs.figures, chosen, self._report, **options)
        inputs, asking = [self._asking.model, *chosen], self._asking
        outputs = [tabs, asking.picture, asking.question, asking.model, self._run, asking.view]
        looks = (self._list.look, asking.view.look)
        by_model = {**options, "concurrency_id": MODEL, "concurrency_limit": 1}
        return [look(self._open_sample, inputs, outputs, **by_model) for look in looks]

    # --- answers to events of the page --------------------------------------------------------------------------------

    def _open_sample(
        self, request: gr.Request, model: str, shown: str | None, other: str | None, event: gr.EventData
    ) -> Iterator[tuple[Any, ...]]:
        """Open a sample with its stored answer in the first tab.

        It is asked for from the list, from a neighbour, or by a link.
        """
        unchanged = gr.skip()
        try:
            run, start = str(event.run), event.mention
            mention = start if isinstance(start, int) else None
            question = self._runs.question(run, str(event.task), str(event.sample), self._pool, model, mention)
            if question.picture is not None:
                self._sessions.use(str(request.session_hash), [question.picture])
        except Exception as error:
            _warn(error)
            yield (unchanged,) * 6
            return
        # a run that is newer than the page is a choice from here on; the list of several runs stays as it is
        stays = shown == ALL or run == other
        listed = gr.update(choices=_run_choices(self._runs.names), value=shown if stays else run)
        inputs = gr.Tabs(selected="ask"), str(question.picture), question.text, question.model, listed
        for data in self._asking.show_steps(answer.ask(self._pool, question, self._extractor), request):
            yield *inputs, data
            inputs = unchanged, *inputs[1:]  # Gradio mixes up a value and a skip in the steps of one event

    def _thumbnails(self, event: gr.EventData) -> str:
        """Send small pictures of the samples that the list shows."""
        samples = event.samples if isinstance(event.samples, list) else []
        return self._runs.thumbnails(str(event.run), [str(sample) for sample in samples[:MOST_THUMBNAILS]])

    def _refresh(self, event: gr.EventData) -> tuple[Any, ...]:
        """Send the list again if its runs have changed; whoever asks for it also sees runs that are new."""
        listing = self._runs.refreshed(str(event.run), str(event.other), str(event.state))
        known = (str(name) for name in (event.run, event.other) if name and name != ALL)
        names = list(dict.fromkeys([*self._runs.names, *known]))  # one that is shown may be gone
        menus = gr.update(choices=_run_choices(names)), gr.update(choices=_second_choices(names))
        return gr.skip() if listing is None else listing, *(menus if event.asked is True else (gr.skip(), gr.skip()))

    def _write_note(self, request: gr.Request, event: gr.EventData) -> Any:
        """Write a note on a sample, and send the list with it."""
        try:
            values = {key: getattr(event, key, None) for key in ("task", "sample", "start", "label", "tags", "text")}
            account, _ = credentials(request.headers.get("authorization"))  # verified by AccessMiddleware
            self._runs.annotate(str(event.run), values, account)
        except Exception as error:
            _warn(error)
            return gr.skip()
        return self._runs.listing(str(event.shown), str(event.other))

    def _save_notes(self, event: gr.EventData) -> Any:
        """Send the notes of a run as a file."""
        try:
            return self._runs.notes(str(event.run), str(event.kind))
        except Exception as error:
            _warn(error)
            return gr.skip()


def _run_choices(names: Sequence[str]) -> list[tuple[str, str]]:
    """List the choices of what the list shows, with their values: every run, and all of them."""
    return [*((name, name) for name in names), *([("all runs", ALL)] if names else [])]


def _second_choices(names: Sequence[str]) -> list[tuple[str, str]]:
    """List the choices of a second run, with their values."""
    return [("none", ""), *((name, name) for name in names)]
