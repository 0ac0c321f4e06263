"""The run directory: its paths, its log."""

import json

import pytest

from dynlm.checkpoints import write_log
from dynlm.runs import Run
from dynlm.types import InputError


def test_a_run_touches_nothing_and_logs_line_by_line(tmp_path):
    run = Run(tmp_path / "run")
    assert not run.path.exists()
    write_log(run.log("train"), [{"step": 0}, {"step": 1}])
    assert [json.loads(line)["step"] for line in run.log("train").read_text().splitlines()] == [0, 1]


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_a_run_has_a_name_that_a_file_system_takes(name):
    with pytest.raises(InputError, match=r"the run is .*: give the name of a directory"):
        Run(name)
