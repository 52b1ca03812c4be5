"""A run's own checkpoints: `last.safetensors`, `best.safetensors` and the state that resuming needs.

`last.safetensors` records its step. The optimizer's state of that step is in the folder `state-<step>/`, to which every
process writes its part (torch.distributed.checkpoint). The state is written first and older states are deleted last, so
at any moment there are weights and a state of the same step. Neither depends on the number of processes that wrote it
or on what each of them held, so a run resumes with any number of processes, with whole weights or with shards.
"""

import contextlib
import json
import os
import shutil
import warnings
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from utils.errors import RunStoppedError, UserError
from utils.parallel.processes import barrier

STATE = "state.json"
LAST, BEST = "last.safetensors", "best.safetensors"


def save_checkpoint(run_dir, step, weights, best_weights, tensors, state, is_first):
    """Write the weights and the state of `step`. A crash at any point leaves the older pair or the new one.

    All processes call it together. Those without `is_first` write their part of `tensors`, {name: tensor}, and take
    part in gathering the weights. `best_weights` is None if this step is not the best; `state` must suit JSON. Raises
    RunStoppedError if it can't be written.
    """
    try:
        write_checkpoint(run_dir, step, weights, best_weights, tensors, state, is_first)
    except (OSError, SafetensorError) as error:
        path = Path(run_dir) / LAST
        kept = f"{path} of step {saved_step(path)} is whole" if path.exists() else "there is no earlier one"
        free = shutil.disk_usage(run_dir).free / 1e9
        why = " ".join(str(error).split())
        what = (
            f"the checkpoint of step {step} can't be written to {run_dir}: {why} ({free:.1f} GB are free on that disk)"
        )
        raise RunStoppedError(f"{what}; {kept}", status=1) from error


def write_checkpoint(run_dir, step, weights, best_weights, tensors, state, is_first):
    """`save_checkpoint` with the original errors."""
    folder = state_folder(run_dir, step)
    if is_first and folder.exists():  # from a process that was killed while it wrote
        shutil.rmtree(folder)
    barrier()
    with distributed_checkpoint() as dcp:
        dcp.save(tensors, checkpoint_id=folder)
    if best_weights is not None:
        save_weights(Path(run_dir) / BEST, best_weights, step, is_first)
    if is_first:
        replace_file(folder / STATE, lambda path: path.write_text(json.dumps(state)))
    save_weights(Path(run_dir) / LAST, weights, step, is_first)
    if is_first:
        for path in Path(run_dir).glob("state-*"):
            if path != folder:
                shutil.rmtree(path, ignore_errors=True)  # a remaining file does no harm and is deleted next time
    barrier()  # a launcher ends all processes when one has ended, so none may go before the first one has written


def load_checkpoint(run_dir):
    """(weights, state) of the run's last checkpoint; `load_tensors` reads the rest of it. Raises UserError."""
    path = Path(run_dir) / LAST
    weights, step = load_weights(path)
    with readable_state(run_dir, step):
        return weights, json.loads((state_folder(run_dir, step) / STATE).read_text())


def load_tensors(run_dir, step, like):
    """The tensors of `save_checkpoint`, read into those that `like(name, shape, dtype)` returns. Raises UserError."""
    with readable_state(run_dir, step), distributed_checkpoint() as dcp:
        reader = dcp.FileSystemReader(state_folder(run_dir, step))
        stored = reader.read_metadata().state_dict_metadata
        tensors = {name: like(name, kept.size, kept.properties.dtype) for name, kept in stored.items()}
        dcp.load(tensors, storage_reader=reader)
        return tensors


def state_folder(run_dir, step):
    return Path(run_dir) / f"state-{step}"


@contextlib.contextmanager
def readable_state(run_dir, step):
    """Turn every error inside into a UserError."""
    try:
        yield
    except Exception as error:  # damaged files raise nearly every type
        folder, path = state_folder(run_dir, step), Path(run_dir) / LAST
        what = "can't be read" if folder.exists() else "is missing"
        raise UserError(f"{folder} {what}, so {path} can't be resumed; start again with --overwrite") from error


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


def save_weights(path, weights, step, is_first=True):
    """Write {name: tensor}, whole or sharded, as one file by the first process; all processes call it."""
    tensors = {}
    for name, tensor in weights.items():
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if is_first:
            tensors[name] = tensor.cpu().contiguous()
    if is_first:
        replace_file(path, lambda temporary: save_file(tensors, temporary, metadata={"step": str(step)}))


def load_weights(path):
    """({name: tensor}, step) of a .safetensors file. Raises UserError."""
    with opened_weights(path) as (file, step):
        return {name: file.get_tensor(name) for name in file.keys()}, step  # noqa: SIM118


def saved_step(path):
    """The step at which a .safetensors file was saved, without reading its weights. Raises UserError."""
    with opened_weights(path) as (_, step):
        return step


@contextlib.contextmanager
def opened_weights(path):
    """(file, step) of a .safetensors file. Raises UserError, also for errors while it is read."""
    if not Path(path).is_file():
        what = f"is a folder; give its {BEST}" if Path(path).is_dir() else "does not exist"
        raise UserError(f"{path} {what}")
    try:
        with safe_open(path, framework="pt") as file:
            yield file, int((file.metadata() or {}).get("step", 0))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable .safetensors file: {error}") from error


def load_into(model, weights, path):
    """Load a run's weights into the model. Raises UserError that names the first weight that does not fit."""
    expected = model.state_dict()
    for name in sorted(set(expected) | set(weights)):
        found = tuple(weights[name].shape) if name in weights else "nothing"
        wanted = tuple(expected[name].shape) if name in expected else "nothing"
        if found != wanted:
            raise UserError(f"{path} does not fit the model: {name} has {found}, expected {wanted}")
    model.load_state_dict(weights)


def replace_file(path, write):
    """Write a file atomically: `write` fills a temporary file, which is synced to the disk and renamed."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    if os.name == "posix":
        os.umask(umask := os.umask(0))
        os.chmod(temporary, 0o666 & ~umask)  # safetensors makes its files readable by their owner only
    os.replace(temporary, path)
    if os.name == "posix":  # the new name is durable once its folder is
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
