"""Implement ``stethoscope app``: serve the page for questions, answers and finished runs."""

from __future__ import annotations

import importlib.util
import signal
import sys
from pathlib import Path

from omegaconf import DictConfig

from stethoscope.adapters.base import Adapter
from stethoscope.app.access import local_user, loopback, read_accounts, read_hosts
from stethoscope.app.server import check_address, own_folder, start
from stethoscope.app.sessions import Sessions
from stethoscope.commands.common import require_model
from stethoscope.core.component import build
from stethoscope.core.errors import ConfigError
from stethoscope.storage.reuse import is_address, local_run


def run(config: DictConfig) -> None:
    """Load the model and serve the page until it is interrupted."""
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError('gradio is not installed; pip install "lvlm-stethoscope[app]"')
    from hydra.core.hydra_config import HydraConfig

    public = bool(config.share) or not loopback(str(config.host))
    notes = _notes_are_written(config, public)
    accounts = read_accounts(None if config.auth is None else str(config.auth), public)
    hosts = read_hosts(config.hosts)
    check_address(str(config.host), int(config.port))
    # after what needs no torch: it takes seconds to load
    from stethoscope.app.model_pool import NO_DETECTOR, ModelPool
    from stethoscope.app.pictures import write_examples
    from stethoscope.app.runs import Runs
    from stethoscope.tasks.extraction import load_extraction

    extractor = load_extraction(config.extraction, config.plugins)
    adapter = build(config.model, Adapter, "model", config.plugins)
    require_model(adapter, "app")
    folder_of_runs, detector = Path(str(config.runs)), config.detector
    chosen = str(HydraConfig.get().runtime.choices.model)
    name = adapter.name if chosen == "hf" else chosen
    run, other = (None if path is None else local_run(str(path)) for path in (config.run, config.beside))
    pool = ModelPool(adapter, name, detector.folder, detector.live, folder_of_runs, run, config.plugins)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the folder of uploads goes with the server
    with own_folder() as folder:
        from stethoscope.app.ui import build_page

        author = "anonymous" if public else local_user()
        runs = Runs(folder_of_runs, run, folder, config.plugins, other, notes, author)
        print(f"loading {name} ...", file=sys.stderr)
        with pool.use(name) as ready:  # so that what is wrong with it is said here, and the first question is quick
            origin = ready.detectors.origin
            print(f"detector: {origin}" if origin else NO_DETECTOR.format(model=name), file=sys.stderr)
        sessions = Sessions(folder)
        examples = write_examples(folder, config.seed, int(config.examples))
        page = build_page(pool, runs, extractor, examples, sessions)
        address = start(page, str(config.host), int(config.port), sessions, bool(config.share), hosts, accounts)
        if public and accounts is None:
            print("warning: everybody can reach this page, ask the model and look through the runs", file=sys.stderr)
        print(f"open {address} (Ctrl+C ends it)")
        try:
            page.block_thread()
        finally:
            page.close(verbose=False)


def _notes_are_written(config: DictConfig, public: bool) -> bool:
    """Decide whether users may write notes into runs.

    Where it is not set they may, if nobody else can reach the page and the runs are on this disk.

    Args:
        config: of the command.
        public: whether other machines can reach the page.

    Raises:
        ConfigError: ``notes`` is no boolean, or would be lost with the copy of a run at an address.
    """
    if config.notes not in (None, True, False):
        raise ConfigError(f"notes={config.notes} should be true, false or null")
    copied = [str(path) for path in (config.run, config.beside) if path is not None and is_address(str(path))]
    if copied and config.notes:
        raise ConfigError(f"notes=true: notes on {copied[0]} would be lost with its copy, which goes when the app ends")
    return not (public or copied) if config.notes is None else bool(config.notes)
