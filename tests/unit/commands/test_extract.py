"""The files of the run whose features are computed."""

import pytest
import yaml
from omegaconf import OmegaConf

from stethoscope.commands import extract
from stethoscope.core.errors import ArtefactError

SAVED = {"limit": 3, "batch_size": 1, "seed": 0, "model": {}, "generation": {}}


@pytest.mark.parametrize("task", [None, 3, "pope", ["pope"]])
def test_a_run_whose_task_is_no_mapping_is_refused(tmp_path, task):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**SAVED, "task": task}))
    with pytest.raises(ArtefactError, match="was made neither by `stethoscope evaluate` nor by `benchmark`"):
        extract.run(OmegaConf.create({"run": str(tmp_path)}))
