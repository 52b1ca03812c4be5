"""Checkpoints of a run: damaged files, a full disk, a crash between two files, and how many are kept."""

import errno
import gc
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import train
from helpers import (
    assert_same_bits,
    call_main,
    fails,
    flip_bit,
    make_shallow,
    metrics,
    run_dir,
    script,
    stop_after,
    succeed,
    train_run,
    truncate,
)
from utils.records import weights
from utils.records.weights import save_weights
from utils.train_state import Progress, TrainState
from utils.training import train_step


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    make_shallow(monkeypatch)


@pytest.fixture
def finished(tiny_flags, monkeypatch, capsys):
    """The flags of a finished run of two steps."""
    flags = tiny_flags("--num_steps", 2)
    train_run(flags, monkeypatch)
    capsys.readouterr()
    return flags


@pytest.mark.parametrize("damage", [flip_bit, truncate, Path.unlink])
@pytest.mark.parametrize(
    "name", ["state-2/state.json", "state-2/.metadata", "state-2/__0_0.distcp", "last.safetensors"]
)
def test_a_damaged_checkpoint_is_an_error_that_names_it(name, damage, finished, monkeypatch, capsys):
    folder = run_dir(finished)
    damage(folder / name)
    message = fails(train, [*finished, "--resume", "--num_steps", 4], monkeypatch, capsys)
    if damage is Path.unlink and name == "last.safetensors":
        assert "run holds best.safetensors, metrics.csv, curves.png, result.json but no last.safetensors, so" in message
    else:
        assert str(folder / Path(name).parts[0]) in message
        assert message.endswith(f"so {folder} can't be resumed; start again with another --name or --overwrite\n")


@pytest.mark.parametrize("damage", [flip_bit, truncate, Path.unlink])
@pytest.mark.parametrize("name", ["state-6/state.json", "state-6/__0_0.distcp", "last.safetensors"])
def test_a_run_resumes_from_the_newest_whole_checkpoint(name, damage, tiny_flags, monkeypatch, capsys):
    whole = tiny_flags("--num_steps", 8, "--eval_every", 2, "--name", "whole")
    expected, rows = train_run(whole, monkeypatch, "whole")
    flags = tiny_flags("--num_steps", 8, "--eval_every", 2)
    stop_after(6, monkeypatch)
    with pytest.raises(SystemExit):
        train_run(flags, monkeypatch)
    folder = run_dir(flags)
    assert sorted(path.name for path in folder.glob("*-[0-9]*")) == ["last-4.safetensors", "state-4", "state-6"]
    damage(folder / name)
    capsys.readouterr()
    resumed, resumed_rows = train_run([*flags, "--resume"], monkeypatch)
    printed = capsys.readouterr().out
    assert f"using {folder / 'last-4.safetensors'} of step 4" in printed
    assert "resuming at step 4 of 8" in printed
    assert_same_bits(resumed, expected)
    assert_same_bits(load_file(folder / "best.safetensors"), load_file(run_dir(whole) / "best.safetensors"))
    assert [row["test_loss"] for row in resumed_rows] == [row["test_loss"] for row in rows]
    assert sorted(path.name for path in folder.glob("*-[0-9]*")) == ["last-6.safetensors", "state-6", "state-8"]


@pytest.mark.parametrize("keep, names", [(1, ["state-8"]), (3, ["last-4.safetensors", "last-6.safetensors"])])
def test_as_many_checkpoints_are_kept_as_asked_for(keep, names, tiny_flags, monkeypatch):
    flags = tiny_flags("--num_steps", 8, "--eval_every", 2, "--keep_checkpoints", keep)
    mine = run_dir(flags) / "state-of-mine" / "notes.txt"  # no state of a run
    mine.parent.mkdir(parents=True)
    mine.touch()
    last, _ = train_run(flags, monkeypatch)
    assert mine.exists()
    names += [f"state-{step}" for step in (4, 6, 8)] if keep == 3 else []
    assert sorted(path.name for path in run_dir(flags).glob("*-[0-9]*")) == sorted(names)
    monkeypatch.setattr(os, "link", unsupported)  # by the file system
    train_run([*flags, "--resume", "--num_steps", 9], monkeypatch)
    if keep == 3:
        assert_same_bits(load_file(run_dir(flags) / "last-8.safetensors"), last)


def test_the_best_weights_of_a_step_that_is_lost_are_forgotten(tmp_path):
    """Their step was evaluated as the best one, then its checkpoint was damaged; the run resumes before it."""

    def best_step_after(resumed):
        state = SimpleNamespace(run_dir=tmp_path, progress=Progress(best_value=0.5, best_step=2, best_result={}))
        TrainState.forget_later_best(state)
        assert (state.progress.best_value, state.progress.best_result) == ((0.5, {}) if resumed == 2 else (None, None))
        return state.progress.best_step

    assert best_step_after(resumed=2) == 2  # the end of the run reports that there is no file
    for step, expected in ((2, 2), (6, 0)):
        save_weights(tmp_path / "best.safetensors", {"weight": torch.ones(1)}, step)
        assert best_step_after(resumed=step) == expected
    truncate(tmp_path / "best.safetensors")
    assert best_step_after(resumed=2) == 2


def unsupported(*arguments):
    raise OSError(errno.ENOTSUP, "Operation not supported")


def test_a_state_of_one_file_is_not_resumed_but_overwritten(finished, monkeypatch, capsys):
    """As the earliest versions wrote it."""
    folder = run_dir(finished)
    shutil.rmtree(folder / "state-2")
    (folder / "state-2.pt").write_bytes(b"abc")
    message = fails(train, [*finished, "--resume", "--num_steps", 4], monkeypatch, capsys)
    assert "state-2 is missing, so" in message
    train_run([*finished, "--overwrite", "--num_steps", "3"], monkeypatch)
    assert [path.name for path in folder.glob("state-*")] == ["state-3"]


def test_a_state_of_a_newer_torch_is_named_where_it_can_not_be_read(finished, monkeypatch, capsys):
    folder = run_dir(finished)
    config = json.loads((folder / "config.json").read_text())
    config["versions"]["torch"] = "99.1.0"
    (folder / "config.json").write_text(json.dumps(config))
    flip_bit(folder / "state-2" / ".metadata")
    message = fails(train, [*finished, "--resume", "--num_steps", 4], monkeypatch, capsys)
    assert "torch 99.1.0 wrote it, resume with that version in place of torch" in message


def test_a_half_written_checkpoint_is_never_loaded(finished, monkeypatch, capsys):
    """A process was killed while it wrote the weights of step 4, after their state."""
    folder = run_dir(finished)
    (folder / ".last.safetensors.tmp").write_bytes(b"half")
    shutil.copytree(folder / "state-2", folder / "state-4")
    (folder / "state-4" / "state.json").unlink()
    train_run([*finished, "--resume", "--num_steps", "4"], monkeypatch)
    assert "resuming at step 2 of 4" in capsys.readouterr().out
    assert [row["step"] for row in metrics(finished)] == ["2", "4"]
    assert sorted(path.name for path in folder.glob("state-*")) == ["state-2", "state-4"]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux shows what is mapped")
def test_a_resumed_run_does_not_keep_the_old_checkpoint_open(finished, monkeypatch):
    """It would occupy the disk after it is replaced, and on Windows it could not be replaced."""
    found = []

    def step(run, batches):
        found.append("last.safetensors" in Path("/proc/self/maps").read_text())
        found.extend("last.safetensors" in os.readlink(link) for link in open_files())
        return train_step(run, batches)

    def open_files():
        return [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]

    monkeypatch.setattr("utils.training.train_step", step)
    gc.collect()  # what the run before has mapped
    train_run([*finished, "--resume", "--num_steps", 3], monkeypatch)
    assert found
    assert not any(found)


def full_disk(*arguments, **keywords):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("part", ["state", "weights"])
def test_a_checkpoint_that_can_not_be_written_leaves_the_one_before(part, finished, monkeypatch, capsys):
    """Either nothing fits on the disk, or the state fits and the weights do not."""
    folder = run_dir(finished)
    before = load_file(folder / "last.safetensors")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        if part == "state":
            patch.setattr("torch.distributed.checkpoint.save", full_disk)
        else:
            patch.setattr(weights, "save_file", full_disk)
        call_main(train, [*finished, "--num_steps", 4, "--resume"], patch)
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert f"the checkpoint of step 4 can't be written to {folder}: [Errno 28] No space left on device (" in error
    assert error.endswith("last.safetensors of step 2 is whole\n")
    assert_same_bits(before, load_file(folder / "last.safetensors"))
    train_run([*finished, "--num_steps", "4", "--resume"], monkeypatch)
    assert "resuming at step 2 of 4" in capsys.readouterr().out
    assert sorted(path.name for path in folder.glob("state-*")) == ["state-2", "state-4"]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="limits the size of files")
def test_a_limited_file_size_leaves_the_checkpoint_before(tiny_flags):
    """The operating system refuses to write, in the middle of a file."""
    import resource

    flags = tiny_flags("--num_steps", 2)
    succeed("train.py", *flags)
    before = load_file(run_dir(flags) / "last.safetensors")
    size = max(path.stat().st_size for path in (run_dir(flags) / "state-2").iterdir())

    def limit_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    failed = script("train.py", *flags, "--num_steps", 4, "--resume", preexec_fn=limit_files)
    assert failed.returncode == 1
    error = failed.stderr.splitlines()[-1]
    assert "the checkpoint of step 4 can't be written to" in error
    assert error.endswith("last.safetensors of step 2 is whole")
    assert_same_bits(before, load_file(run_dir(flags) / "last.safetensors"))
    assert "resuming at step 2 of 4" in succeed("train.py", *flags, "--num_steps", 4, "--resume")
