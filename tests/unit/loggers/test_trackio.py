import importlib.util
import json
import os
import sqlite3
import sys
from pathlib import Path

import pytest
from helpers.logged_run import FINALS, TEXT, log_everything
from PIL import Image

from stethoscope.core.errors import ConfigError
from stethoscope.loggers import base
from stethoscope.loggers.trackio import TrackioLogger

pytestmark = pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="needs the extra trackio")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Trackio's folder, which it reads from the environment once, when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        if "trackio" not in sys.modules:
            patch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))
        import trackio.utils

        if not os.environ.get("TRACKIO_DIR"):
            pytest.skip("trackio was imported before, with the folder of the user")
        yield Path(trackio.utils.TRACKIO_DIR)


def test_trackios_own_database_has_what_was_logged(store, tmp_path, capfd):
    from trackio.sqlite_storage import SQLiteStorage

    logger = TrackioLogger(project="first-tests", group="study")
    logger.patience = None  # in this thread, so that the pause is one of Trackio's
    log_everything(logger, tmp_path, pause=1.5)
    assert capfd.readouterr().out == ""
    assert SQLiteStorage.get_runs("first-tests") == ["first"]
    rows = SQLiteStorage.get_logs("first-tests", "first")
    assert [(row["step"], row["pope/progress/share"]) for row in rows if "pope/progress/share" in row] == [
        (16, 0.5), (32, 1.0),
    ]  # fmt: skip
    logged = {name: value for row in rows for name, value in row.items()}
    assert {name: logged[name] for name in FINALS} == FINALS
    assert logged["status"] == "finished"
    config = SQLiteStorage.get_run_config("first-tests", "first")
    assert (config["seed"], config["choices"], config["hub_token"]) == (3, {"detector": "logistic"}, "***")
    assert config["pope"] == {"task": {"version": "1"}, "limit": 8}
    assert config["_Group"] == "study"
    cells = logged["pope/samples"]["_value"]
    assert [row["answer"] for row in cells] == [TEXT, "yes"]
    picture = Image.open(store / "media" / cells[0]["picture"]["file_path"]).convert("RGB")
    assert (picture.size, picture.getpixel((0, 0))) == ((4, 2), (255, 0, 0))
    assert Image.open(store / "media" / logged["detector/roc"]["file_path"]).size == (640, 480)
    with sqlite3.connect(store / "first-tests.db") as database:
        tables = {name for (name,) in database.execute("select name from sqlite_master where type = 'table'")}
        (table,) = [name for name in tables if "artifact" in name and "version" in name]
        database.row_factory = sqlite3.Row
        (artifact,) = map(dict, database.execute(f"select * from {table}"))
    assert json.loads(artifact["metadata"]) == {"version": 2, "api_key": "***"}
    assert "manifest.json" in artifact["manifest"]


def test_a_resumed_run_goes_on_and_another_of_its_name_does_not(store, tmp_path):
    from trackio.sqlite_storage import SQLiteStorage

    for folder in ("a", "a", "b"):
        (tmp_path / folder).mkdir(exist_ok=True)
        log_everything(TrackioLogger(project="second-tests"), tmp_path / folder)
    with sqlite3.connect(store / "second-tests.db") as database:
        counts = [count for (count,) in database.execute("select count(*) from metrics group by run_id")]
    assert sorted(counts) == [6, 12]
    assert len(SQLiteStorage.get_runs("second-tests")) >= 1


def test_settings_are_checked(monkeypatch):
    with pytest.raises(ConfigError, match=r"logger\.pictures=-1 should be at least 0"):
        TrackioLogger(pictures=-1)
    with pytest.raises(ConfigError, match=r"logger\.patience=0 should be above 0"):
        TrackioLogger(patience=0)
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'needs the package trackio: pip install "lvlm-stethoscope\[trackio\]"'):
        TrackioLogger()
