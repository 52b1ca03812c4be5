"""The folder of a run: who may write to it, and which runs continue in it."""

import os

import pytest

import train
from helpers import call_main, fails, make_shallow
from utils.errors import UserError
from utils.records.run_folder import read_config, read_metrics, read_run


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    make_shallow(monkeypatch)


def test_a_folder_with_a_run_is_not_overwritten_without_a_flag(tiny_flags, monkeypatch, capsys):
    call_main(train, tiny_flags("--num_steps", 1), monkeypatch)
    capsys.readouterr()
    message = fails(train, tiny_flags("--num_steps", 1), monkeypatch, capsys)
    assert "run holds a run already; give --resume, --overwrite or another --name" in message


def test_a_restart_resumes_what_the_same_torchrun_started_and_no_other_run(tiny_flags, monkeypatch, capsys):
    """The worker's parent is torchrun, which counts its restarts from 0."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    call_main(train, tiny_flags("--num_steps", 4), monkeypatch)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    call_main(train, tiny_flags("--num_steps", 6, "--overwrite"), monkeypatch)
    assert "resuming at step 4 of 6" in capsys.readouterr().out
    monkeypatch.setattr(os, "getppid", lambda: -1)
    message = fails(train, tiny_flags("--num_steps", 8), monkeypatch, capsys)
    assert "holds a run already; give --resume" in message
    call_main(train, tiny_flags("--num_steps", 8, "--overwrite"), monkeypatch)
    assert "resuming" not in capsys.readouterr().out


def test_processes_that_do_not_see_the_same_folder_are_an_error(tiny_flags, monkeypatch, capsys):
    """As on two machines without a common disk, of which one has a checkpoint."""
    monkeypatch.setattr("utils.training.union_over_processes", lambda items: {True, False})
    message = fails(train, tiny_flags("--resume"), monkeypatch, capsys)
    assert "must be on a disk that all machines share" in message


def test_damaged_records_are_named(tmp_path):
    assert read_config(tmp_path) is None
    assert read_metrics(tmp_path) == {}
    with pytest.raises(UserError, match="is not the folder of a run: it has no config.json with a run's flags"):
        read_run(tmp_path)
    (tmp_path / "config.json").write_text('{"flags": {}}')
    with pytest.raises(UserError, match="has no evaluation in its metrics.csv yet"):
        read_run(tmp_path)
    (tmp_path / "metrics.csv").write_text("step,train_loss\n1,much\n")
    with pytest.raises(UserError, match="metrics.csv is damaged: it needs numbers in the columns step, "):
        read_metrics(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is not valid JSON"):
        read_config(tmp_path)
