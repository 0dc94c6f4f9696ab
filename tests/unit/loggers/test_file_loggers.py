import pandas as pd
from helpers.logged_run import CURVE, FINALS, TEXT, log_everything

from stethoscope.loggers.file_loggers import CsvLogger


def test_pandas_reads_what_was_logged(tmp_path):
    log_everything(CsvLogger(), tmp_path)
    folder = tmp_path / "runs" / "first" / "csv"
    metrics = pd.read_csv(folder / "metrics.csv")
    progress, finals = metrics[metrics["step"].notna()], metrics[metrics["step"].isna()]
    assert list(zip(progress["step"], progress["name"], progress["value"], strict=True)) == [
        (16, "pope/progress/share", 0.5),
        (32, "pope/progress/share", 1.0),
    ]
    assert dict(zip(finals["name"], finals["value"], strict=True)) == FINALS
    settings = pd.read_csv(folder / "settings.csv", index_col="name")["value"]
    assert settings["choices.detector"] == "logistic"
    assert (settings["pope.limit"], settings["pope.task.version"]) == ("8", "1")
    assert settings["hub_token"] == "***"
    samples = pd.read_csv(folder / "pope-samples.csv")
    assert list(samples.columns) == ["sample", "answer"]
    assert list(samples["answer"]) == [TEXT, "yes"]
    assert pd.read_csv(folder / "detector-roc.csv").to_numpy().tolist() == CURVE


def test_a_resumed_run_adds_figures(tmp_path):
    for _ in range(2):
        log_everything(CsvLogger("tables"), tmp_path)
    folder = tmp_path / "runs" / "first" / "tables"
    assert len(pd.read_csv(folder / "metrics.csv")) == 2 * 4
    assert len(pd.read_csv(folder / "pope-samples.csv")) == 2
    assert {path.name for path in folder.iterdir()} == {
        "metrics.csv", "settings.csv", "pope-samples.csv", "detector-roc.csv",
    }  # fmt: skip


def test_without_a_run_directory_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logger = CsvLogger()
    logger.setup(None)
    logger.log_config({"a": 1})
    logger.log_metrics({"a": 1.0})
    logger.log_table("t", ["a"], [[1]])
    logger.finalize("finished")
    assert list(tmp_path.iterdir()) == []
