"""The folder of a run: who may write to it, and which runs continue in it."""

import argparse
import os
import re
import shutil

import pytest
from safetensors.torch import load_file

import train
from command_line import train_parser
from helpers import call_main, contents, fails, make_shallow, run_dir
from utils.errors import UserError
from utils.locks import exclusive_lock
from utils.records.run_folder import LOCK, is_finished, read_config, read_metrics, read_run
from utils.records.weights import save_weights


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


def test_a_run_is_finished_when_its_last_step_is_evaluated(tiny_flags, monkeypatch):
    """--epochs alone does not say how many steps there are. Its checkpoint may be deleted to save space."""
    flags = tiny_flags("--epochs", 0.2)
    folder, parsed = run_dir(flags), train_parser().parse_args(flags)
    assert not is_finished(folder, parsed)
    call_main(train, flags, monkeypatch)
    parsed.num_steps = None  # as checked flags with --epochs
    assert read_config(folder)["num_steps"] == 18
    assert is_finished(folder, parsed)
    for name, value in (("epochs", 0.3), ("learning_rate", 1.0), ("seed", 1)):
        assert not is_finished(folder, argparse.Namespace(**{**vars(parsed), name: value}))
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text("")
    assert not is_finished(folder, parsed)
    (folder / "config.json").write_text(config)
    last = load_file(folder / "last.safetensors")
    save_weights(folder / "last.safetensors", last, step=17)
    assert not is_finished(folder, parsed)  # by a version that evaluated before it saved
    (folder / "last.safetensors").unlink()
    assert is_finished(folder, parsed)


def test_the_results_of_a_finished_run_are_printed_again_without_its_checkpoint(tiny_flags, monkeypatch, capsys):
    flags = tiny_flags("--num_steps", 2)
    call_main(train, flags, monkeypatch)
    (run_dir(flags) / "last.safetensors").unlink()
    shutil.rmtree(run_dir(flags) / "state-2")
    before, _ = contents(run_dir(flags)), capsys.readouterr()
    call_main(train, [*flags, "--resume"], monkeypatch)
    assert re.search(r"\nlast, step 2   test accuracy [\d.]+ % \[.*\]\nbest, step 2   test", capsys.readouterr().out)
    assert contents(run_dir(flags)) == before


@pytest.mark.parametrize(
    "name", ["best.safetensors", "metrics.csv", "curves.png", "result.json", "last.safetensors", "config.json"]
)
def test_nothing_that_is_found_is_deleted_unasked(name, tiny_flags, monkeypatch, capsys):
    """What other programs left, an older version, or what remains when checkpoints are deleted to save space."""
    flags = tiny_flags("--num_steps", 2)
    run_dir(flags).mkdir(parents=True)
    (run_dir(flags) / name).write_text("{}" if name == "config.json" else "mine")
    before = contents(run_dir(flags))
    message = fails(train, flags, monkeypatch, capsys)
    assert "run holds a run already; give --resume, --overwrite or another --name" in message
    if name not in ("last.safetensors", "config.json"):
        message = fails(train, [*flags, "--resume"], monkeypatch, capsys)
        assert f"run holds {name} but no last.safetensors, so --resume can't continue; give another" in message
    assert contents(run_dir(flags)) == before
    call_main(train, [*flags, "--overwrite"], monkeypatch)
    assert "best" in capsys.readouterr().out


def test_a_folder_in_use_is_not_touched_by_a_second_process(tiny_flags, monkeypatch, capsys):
    """Not even with --overwrite, which would delete the live run."""
    flags = tiny_flags("--num_steps", 2)
    call_main(train, flags, monkeypatch)
    capsys.readouterr()
    before = contents(run_dir(flags))
    with exclusive_lock(run_dir(flags) / LOCK):
        for flag in ("--resume", "--overwrite"):
            message = fails(train, [*flags, flag, "--num_steps", 4], monkeypatch, capsys)
            assert re.search(rf"run is in use by process {os.getpid()} on \S+ since \d{{4}}-\d\d-\d\d ", message)
            assert message.endswith("; wait for its end, or give another --name\n")
    assert contents(run_dir(flags)) == before
    call_main(train, [*flags, "--resume", "--num_steps", 4], monkeypatch)


def test_the_classes_of_a_resumed_run_are_those_it_began_with(tiny_flags, image_folder, monkeypatch, capsys):
    """A class folder was renamed meanwhile; the weights would call a cat a tiger from now on."""
    flags = tiny_flags("--dataset", "imagefolder", "--data_dir", image_folder, "--num_steps", 2, "--num_workers", 0)
    call_main(train, flags, monkeypatch)
    for split in ("train", "val"):
        (image_folder / split / "dog").rename(image_folder / split / "ant")
    capsys.readouterr()
    before = contents(run_dir(flags))
    for deleted in ([], [run_dir(flags) / "config.json"]):  # the checkpoint knows its classes too
        for path in deleted:
            path.unlink()
            del before[path]
        with pytest.raises(SystemExit) as stopped:
            call_main(train, [*flags, "--resume", "--num_steps", 4], monkeypatch)
        assert stopped.value.code == 2
        message = capsys.readouterr().err
        assert "run was trained on other classes: it has 'cat' where imagefolder has 'ant'" in message
        assert contents(run_dir(flags)) == before


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_a_damaged_config_does_not_prevent_resuming(text, tiny_flags, monkeypatch, capsys):
    flags = tiny_flags("--num_steps", 2)
    call_main(train, flags, monkeypatch)
    (run_dir(flags) / "config.json").write_text(text)
    capsys.readouterr()
    call_main(train, [*flags, "--resume", "--num_steps", 4], monkeypatch)
    printed = capsys.readouterr().out
    assert "warning: resuming with --num_steps 4; the run was started with 2" in printed  # from the checkpoint
    assert "resuming at step 2 of 4" in printed
    assert read_config(run_dir(flags))["num_steps"] == 4


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
