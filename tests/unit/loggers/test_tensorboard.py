import io

import numpy as np
import pytest
from helpers.logged_run import FINALS, log_everything
from PIL import Image

from stethoscope.core.errors import ConfigError
from stethoscope.loggers import base
from stethoscope.loggers.tensorboard import TensorBoardLogger

pytest.importorskip("tensorboard", reason="needs the extra tensorboard")


def read(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0}).Reload()


def test_tensorboards_own_reader_gives_back_what_was_logged(tmp_path):
    log_everything(TensorBoardLogger(), tmp_path)
    events = read(tmp_path / "runs/first/tensorboard")
    assert [(point.step, point.value) for point in events.Scalars("pope/progress/share")] == [(16, 0.5), (32, 1.0)]
    for name, value in FINALS.items():
        assert [point.value for point in events.Scalars(name)] == [value]
    (text,) = events.Tensors("pope/samples/text_summary")
    lines = text.tensor_proto.string_val[0].decode().splitlines()
    assert lines[:3] == ["| sample | answer |", "| --- | --- |", r"| s0 | a \| &lt;b&gt;dog&lt;/b&gt; \* |"]
    (picture,) = events.Images("pope/samples/picture")
    red = np.asarray(Image.open(io.BytesIO(picture.encoded_image_string)).convert("RGB"))
    assert (red == [255, 0, 0]).all()
    assert red.shape == (2, 4, 3)
    (curve,) = events.Images("detector/roc")
    assert (curve.width, curve.height) == (640, 480)


def test_settings_are_hyperparameters(tmp_path):
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    log_everything(TensorBoardLogger("events"), tmp_path)
    events = read(tmp_path / "runs/first/events")
    metadata = events.SummaryMetadata("_hparams_/session_start_info")
    values = HParamsPluginData.FromString(metadata.plugin_data.content).session_start_info.hparams
    assert values["seed"].number_value == 3
    assert values["choices.detector"].string_value == "logistic"
    assert values["hub_token"].string_value == "***"
    assert values["pope.limit"].number_value == 8
    assert values["status"].string_value == "finished"


def test_a_resumed_run_is_read_as_one(tmp_path):
    for status in ("failed", "finished"):
        log_everything(TensorBoardLogger(), tmp_path, status)
    events = read(tmp_path / "runs/first/tensorboard")
    assert len(events.Scalars("detector/auroc")) == 2


def test_a_missing_package_is_told_with_its_extra(monkeypatch):
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'needs the package tensorboard: pip install "lvlm-stethoscope\[tensorb'):
        TensorBoardLogger()


def test_settings_are_checked():
    with pytest.raises(ConfigError, match=r"logger\.pictures=-1 should be at least 0"):
        TensorBoardLogger(pictures=-1)
