"""Checkpoints of a run: damaged files, a full disk, a crash between two files, and atomic writing."""

import errno
import os
import shutil
import stat

import pytest
import torch
from safetensors.torch import load_file

import train
from helpers import assert_same_bits, call_main, fails, make_shallow, metrics, run_dir, script, succeed, train_run
from utils.errors import UserError
from utils.records import checkpoint
from utils.records.checkpoint import load_into, load_weights, replace_file, save_weights, saved_step


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


@pytest.mark.parametrize("name", ["state.json", ".metadata", "__0_0.distcp"])
def test_a_damaged_state_is_named(name, finished, monkeypatch, capsys):
    (run_dir(finished) / "state-2" / name).write_bytes(b"abc")
    message = fails(train, [*finished, "--resume"], monkeypatch, capsys)
    assert f"{run_dir(finished) / 'state-2'} can't be read, so" in message
    assert message.endswith("last.safetensors can't be resumed; start again with --overwrite\n")


def test_damaged_weights_are_named(finished, monkeypatch, capsys):
    path = run_dir(finished) / "last.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    message = fails(train, [*finished, "--resume"], monkeypatch, capsys)
    assert f"{path} is not a readable .safetensors file" in message


def test_a_state_of_one_file_is_not_resumed_but_overwritten(finished, monkeypatch, capsys):
    """As the earliest versions wrote it."""
    folder = run_dir(finished)
    shutil.rmtree(folder / "state-2")
    (folder / "state-2.pt").write_bytes(b"abc")
    assert "state-2 is missing, so" in fails(train, [*finished, "--resume"], monkeypatch, capsys)
    train_run([*finished, "--overwrite", "--num_steps", "3"], monkeypatch)
    assert [path.name for path in folder.glob("state-*")] == ["state-3"]


def test_a_half_written_checkpoint_is_never_loaded(finished, monkeypatch, capsys):
    """A process was killed while it wrote the weights of step 4, after their state."""
    folder = run_dir(finished)
    (folder / ".last.safetensors.tmp").write_bytes(b"half")
    shutil.copytree(folder / "state-2", folder / "state-4")
    (folder / "state-4" / "state.json").unlink()
    train_run([*finished, "--resume", "--num_steps", "4"], monkeypatch)
    assert "resuming at step 2 of 4" in capsys.readouterr().out
    assert [row["step"] for row in metrics(finished)] == ["2", "4"]
    assert [path.name for path in folder.glob("state-*")] == ["state-4"]


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
            patch.setattr(checkpoint, "save_file", full_disk)
        call_main(train, [*finished, "--num_steps", 4, "--resume"], patch)
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert f"the checkpoint of step 4 can't be written to {folder}: [Errno 28] No space left on device (" in error
    assert error.endswith("last.safetensors of step 2 is whole\n")
    assert_same_bits(before, load_file(folder / "last.safetensors"))
    train_run([*finished, "--num_steps", "4", "--resume"], monkeypatch)
    assert "resuming at step 2 of 4" in capsys.readouterr().out
    assert [path.name for path in folder.glob("state-*")] == ["state-4"]


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


def test_weights_are_read_as_they_were_written(tmp_path):
    weights = {"a": torch.randn(3, 4).T, "b": torch.randn(2).bfloat16()}  # not contiguous; 16 bits
    save_weights(tmp_path / "w.safetensors", weights, step=7)
    loaded, step = load_weights(tmp_path / "w.safetensors")
    assert (step, saved_step(tmp_path / "w.safetensors")) == (7, 7)
    assert_same_bits(loaded, weights)
    with pytest.raises(UserError, match="nothing.safetensors does not exist"):
        saved_step(tmp_path / "nothing.safetensors")
    with pytest.raises(UserError, match="is a folder; give its best.safetensors"):
        saved_step(tmp_path)


def test_weights_that_do_not_fit_are_named():
    model = torch.nn.Linear(3, 2)
    state = {name: torch.randn_like(weight) for name, weight in model.state_dict().items()}
    load_into(model, state, "w")
    assert_same_bits(model.state_dict(), state)
    for wrong, message in (
        ({**state, "weight": torch.zeros(4, 3)}, r"w does not fit the model: weight has \(4, 3\), expected \(2, 3\)"),
        ({"weight": state["weight"]}, r"bias has nothing, expected \(2,\)"),
        ({**state, "scale": torch.zeros(1)}, r"scale has \(1,\), expected nothing"),
    ):
        with pytest.raises(UserError, match=message):
            load_into(model, wrong, "w")


def test_a_file_is_replaced_at_once_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("ne")
        raise OSError

    with pytest.raises(OSError):
        replace_file(path, fail)
    assert path.read_text() == "old"
    replace_file(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    if os.name == "posix":
        os.umask(umask := os.umask(0))
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
