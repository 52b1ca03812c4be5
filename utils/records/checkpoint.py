"""A run's own checkpoints: `last.safetensors`, `best.safetensors` and the state that resuming needs.

`last.safetensors` records its step. The optimizer's state of that step is in the folder `state-<step>/`, to which every
process writes its part (torch.distributed.checkpoint). The state is written first and the oldest pairs are deleted
last, so at any moment there are weights and a state of the same step. Earlier pairs are kept as
`last-<step>.safetensors` and `state-<step>/`. None of them depends on the number of processes that wrote it or on what
each of them held, so a run resumes with any number of processes, with whole weights or with shards.

All files carry checksums, which are verified when they are loaded. Earlier versions wrote none.
"""

import contextlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch.torch_version import TorchVersion

from utils.errors import RunStoppedError, UserError
from utils.parallel.processes import barrier, from_first_process, union_over_processes
from utils.records.files import file_checksum, replace_file, text_checksum
from utils.records.weights import LAST, load_weights, save_weights, saved_step

CONFIG = "config.json"  # of the run
STATE = "state.json"


class Checkpoint(NamedTuple):
    """A pair of weights and state that has been read."""

    path: Path  # of the weights
    step: int
    weights: dict  # {name: tensor}
    state: dict  # what `save_checkpoint` was given


def save_checkpoint(run_dir, step, weights, tensors, state, is_first, keep=1, model_type=""):
    """Write the weights and the state of `step`, and keep the last `keep` pairs. A crash leaves an older pair or this.

    All processes call it together. Those without `is_first` write their part of `tensors`, {name: tensor}, and take
    part in gathering the weights. `state` must suit JSON. Raises RunStoppedError if it can't be written.
    """
    with errors_stop_the_run(run_dir, f"the checkpoint of step {step}"):
        folder = state_folder(run_dir, step)
        if is_first and folder.exists():  # from a process that was killed while it wrote
            shutil.rmtree(folder)
        barrier()
        with distributed_checkpoint() as dcp:
            dcp.save(tensors, checkpoint_id=folder)
        sums = union_over_processes(file_checksums(folder, is_first))
        if is_first:
            write_state(folder, state, dict(sums))
            if keep > 1:
                keep_last(Path(run_dir), step)
        save_weights(Path(run_dir) / LAST, weights, step, is_first, model_type)
        if is_first:
            delete_oldest(Path(run_dir), step, keep)
        barrier()  # a launcher ends all processes when one has ended, so none may go before the first one has written


def save_measured(run_dir, name, step, weights, is_first, model_type=""):
    """Write weights that were measured to the file `name`, BEST or AVERAGED. All processes call it.

    Raises RunStoppedError.
    """
    with errors_stop_the_run(run_dir, f"{name} of step {step}"):
        save_weights(Path(run_dir) / name, weights, step, is_first, model_type)


def update_state(run_dir, step, state):
    """Replace the `state` of the last `save_checkpoint`, of the same step. Raises RunStoppedError."""
    folder = state_folder(run_dir, step)
    with errors_stop_the_run(run_dir, f"the progress of step {step}"):
        write_state(folder, state, json.loads((folder / STATE).read_text())["files"])


@contextlib.contextmanager
def errors_stop_the_run(run_dir, what):
    """Turn an error in writing into a RunStoppedError that names the checkpoint that remains."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        kept = "there is no earlier one"
        with contextlib.suppress(UserError):
            kept = f"{Path(run_dir) / LAST} of step {saved_step(Path(run_dir) / LAST)} is whole"
        free = shutil.disk_usage(run_dir).free / 1e9
        why = f"{' '.join(str(error).split())} ({free:.1f} GB are free on that disk)"
        raise RunStoppedError(f"{what} can't be written to {run_dir}: {why}; {kept}", status=1) from error


def file_checksums(folder, is_first):
    """{(name, checksum)} of the files that this process has written to a state."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    paths = [*folder.glob(f"__{rank}_*"), *([folder / ".metadata"] if is_first else [])]
    return {(path.name, file_checksum(path)) for path in paths}


def write_state(folder, state, files):
    """Write STATE: `state`, the {name: checksum} of the folder's other files, and its own checksum."""
    content = {**state, "files": files}
    content["checksum"] = text_checksum(json.dumps(content))
    replace_file(folder / STATE, lambda path: path.write_text(json.dumps(content)))


def keep_last(run_dir, step):
    """Give last.safetensors of an earlier step a second name, under which it remains when `step` replaces it."""
    last = run_dir / LAST
    with contextlib.suppress(UserError):  # it is missing, or damaged
        earlier = saved_step(last)
        path = run_dir / f"last-{earlier}.safetensors"
        if earlier != step and not path.exists() and state_folder(run_dir, earlier).exists():
            try:
                os.link(last, path)
            except OSError:  # a file system without hard links
                replace_file(path, lambda temporary: shutil.copyfile(last, temporary))


def delete_oldest(run_dir, step, keep):
    """Delete all pairs but that of `step` and the `keep` - 1 before it."""
    older = older_weights(run_dir)
    kept = {step, *sorted((each for each in older if each < step), reverse=True)[: keep - 1]}
    for each in older.keys() - kept:
        older[each].unlink()
    for path, each in state_folders(run_dir).items():
        if each not in kept:
            shutil.rmtree(path, ignore_errors=True)  # a remaining file does no harm and is deleted next time


def older_weights(run_dir):
    """{step: path} of the files `last-<step>.safetensors`."""
    paths = Path(run_dir).glob("last-*.safetensors")
    return {int(path.stem[5:]): path for path in paths if path.stem[5:].isdecimal()}


def weight_files(run_dir):
    """The weights from which the run may resume, the newest first; last.safetensors even if it is missing."""
    return [Path(run_dir) / LAST, *(path for _, path in sorted(older_weights(run_dir).items(), reverse=True))]


def has_checkpoint(run_dir):
    """Whether there is anything to resume from, whole or damaged."""
    return any(path.exists() for path in weight_files(run_dir))


def load_checkpoint(run_dir, is_first=True):
    """(the run's newest whole Checkpoint, why newer ones can't be used), the same in all processes.

    `load_tensors` reads the rest of it. Raises UserError if none is whole.
    """
    found, problems = newest_checkpoint(run_dir) if is_first else (None, [])
    name, problems = from_first_process((found and found.path.name, problems))
    if name is None:
        raise UserError(f"{problems[0]}, so {run_dir} can't be resumed; start again with another --name or --overwrite")
    return found or read_checkpoint(Path(run_dir) / name), problems


def newest_checkpoint(run_dir):
    """(the newest Checkpoint that is whole or None, why newer ones are not)."""
    problems = []
    for path in weight_files(run_dir):
        try:
            return read_checkpoint(path), problems
        except UserError as error:
            problems.append(str(error))
    return None, problems


def read_checkpoint(path):
    """The Checkpoint whose weights are in `path`, with all checksums verified. Raises UserError."""
    weights, step = load_weights(path)
    with readable_state(path.parent, step) as folder:
        state = json.loads((folder / STATE).read_text())
        checksum = state.pop("checksum", None)
        if checksum not in (None, text_checksum(json.dumps(state))):
            raise ValueError(f"the checksum of {STATE} does not match")
        for name, expected in state.pop("files", {}).items():
            if file_checksum(folder / name) != expected:
                raise ValueError(f"the checksum of {name} does not match")
    return Checkpoint(path, step, weights, state)


def load_tensors(run_dir, step, like):
    """The tensors of `save_checkpoint`, read into those that `like(name, shape, dtype)` returns. Raises UserError."""
    with readable_state(run_dir, step) as folder, distributed_checkpoint() as dcp:
        reader = dcp.FileSystemReader(folder)
        stored = reader.read_metadata().state_dict_metadata
        tensors = {name: like(name, kept.size, kept.properties.dtype) for name, kept in stored.items()}
        dcp.load(tensors, storage_reader=reader)
        return tensors


def state_folder(run_dir, step):
    return Path(run_dir) / f"state-{step}"


def state_folders(run_dir):
    """{path: step} of the `state_folder`s, and of the files of an early version; a user's own state-... is none."""
    steps = {path: path.name.removeprefix("state-").removesuffix(".pt") for path in Path(run_dir).glob("state-*")}
    return {path: int(step) for path, step in steps.items() if step.isdecimal()}


@contextlib.contextmanager
def readable_state(run_dir, step):
    """The state's folder; turns every error inside into a UserError."""
    folder = state_folder(run_dir, step)
    try:
        yield folder
    except Exception as error:  # damaged files raise nearly every type
        if not folder.exists():
            raise UserError(f"{folder} is missing") from error
        reason = " ".join(str(error).split())
        raise UserError(f"{folder} can't be read ({reason}){written_by_newer_torch(run_dir)}") from error


def written_by_newer_torch(run_dir):
    """What an error adds if the run's torch is newer, since a release of torch reads states up to its own only."""
    with contextlib.suppress(Exception):  # config.json may be damaged too
        written = json.loads((Path(run_dir) / CONFIG).read_text())["versions"]["torch"]
        if TorchVersion(written) > TorchVersion(torch.__version__):
            return f"; torch {written} wrote it, resume with that version in place of torch {torch.__version__}"
    return ""


@contextlib.contextmanager
def distributed_checkpoint():
    """PyTorch's module. Raises OSError in all processes if one of them can't read or write its part."""
    import torch.distributed.checkpoint as dcp  # a slow import that evaluation does not need

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that there is a single process only
        try:
            yield dcp
        except dcp.api.CheckpointException as error:  # not a subclass of Exception
            reasons = {str(reason) for reason, _ in error.failures.values()}
            raise OSError("; ".join(sorted(reasons))) from error
