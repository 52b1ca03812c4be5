"""A run's own checkpoints: `last.safetensors`, `best.safetensors` and, beside them, what resuming needs.

`last.safetensors` names its step; the optimizer's state of that step is in the folder `state-<step>/`, to which every
process writes its part (torch.distributed.checkpoint). The state is written first and older ones are deleted last, so
at any moment weights and state of one step are both there. Neither says how many processes wrote it or what each of
them held, so a run goes on with any number of them, with whole weights or with shards.
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


def save_checkpoint(run_dir, step, weights, best_weights, tensors, state, first):
    """Write the weights and the state of `step`; a crash at any point leaves the older pair or the new one.

    All processes call it together; those that are not `first` write their part of `tensors`, {name: tensor}, and help
    to put the weights together. `best_weights` is None where this step is not the best; `state` is JSON's. Raises
    RunStoppedError where it can't be written.
    """
    try:
        write_checkpoint(run_dir, step, weights, best_weights, tensors, state, first)
    except (OSError, SafetensorError) as error:
        path = Path(run_dir) / LAST
        kept = f"{path} of step {saved_step(path)} is whole" if path.exists() else "there is no earlier one"
        free = shutil.disk_usage(run_dir).free / 1e9
        why = " ".join(str(error).split())
        what = (
            f"the checkpoint of step {step} can't be written to {run_dir}: {why} ({free:.1f} GB are free on that disk)"
        )
        raise RunStoppedError(f"{what}; {kept}", status=1) from error


def write_checkpoint(run_dir, step, weights, best_weights, tensors, state, first):
    """What `save_checkpoint` does, with the errors as they come."""
    folder = state_folder(run_dir, step)
    if first and folder.exists():  # of a sitting that was killed while it wrote
        shutil.rmtree(folder)
    barrier()
    with distributed_checkpoint() as dcp:
        dcp.save(tensors, checkpoint_id=folder)
    if best_weights is not None:
        save_weights(Path(run_dir) / BEST, best_weights, step, first)
    if first:
        replace_file(folder / STATE, lambda path: path.write_text(json.dumps(state)))
    save_weights(Path(run_dir) / LAST, weights, step, first)
    if first:
        for path in Path(run_dir).glob("state-*"):
            if path != folder:
                shutil.rmtree(path, ignore_errors=True)  # what is left does no harm, and goes next time


def load_checkpoint(run_dir):
    """(weights, state) of the run's last checkpoint; `load_tensors` takes the rest of it. Raises UserError."""
    path = Path(run_dir) / LAST
    weights, step = load_weights(path)
    with readable_state(run_dir, step):
        return weights, json.loads((state_folder(run_dir, step) / STATE).read_text())


def load_tensors(run_dir, step, like):
    """The tensors of `save_checkpoint`, as `like(name, shape, dtype)` makes place for them. Raises UserError."""
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
    """Raises UserError for whatever goes wrong inside."""
    try:
        yield
    except Exception as error:  # damaged files raise nearly every type
        folder, path = state_folder(run_dir, step), Path(run_dir) / LAST
        what = "can't be read" if folder.exists() else "is missing"
        raise UserError(f"{folder} {what}, so {path} can't be resumed; start anew with --overwrite") from error


@contextlib.contextmanager
def distributed_checkpoint():
    """PyTorch's module for it. Raises OSError in all processes where one of them can't read or write its part."""
    import torch.distributed.checkpoint as dcp  # a slow import that evaluation need not pay

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a single process is warned that it is one
        try:
            yield dcp
        except dcp.api.CheckpointException as error:  # which is no Exception
            reasons = {str(reason) for reason, _ in error.failures.values()}
            raise OSError("; ".join(sorted(reasons))) from error


def save_weights(path, weights, step, first=True):
    """Write {name: tensor}, whole or sharded, as one file by the first process; all of them call it."""
    tensors = {}
    for name, tensor in weights.items():
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if first:
            tensors[name] = tensor.cpu().contiguous()
    if first:
        replace_file(path, lambda temporary: save_file(tensors, temporary, metadata={"step": str(step)}))


def load_weights(path):
    """({name: tensor}, step) of a .safetensors file. Raises UserError."""
    with opened_weights(path) as (file, step):
        return {name: file.get_tensor(name) for name in file.keys()}, step  # noqa: SIM118


def saved_step(path):
    """The step that a .safetensors file is of, without reading its weights. Raises UserError."""
    with opened_weights(path) as (_, step):
        return step


@contextlib.contextmanager
def opened_weights(path):
    """(file, step) of a .safetensors file. Raises UserError, also for what is found while it is read."""
    if not Path(path).is_file():
        raise UserError(f"{path} {'is not a file' if Path(path).exists() else 'does not exist'}")
    try:
        with safe_open(path, framework="pt") as file:
            yield file, int((file.metadata() or {}).get("step", 0))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable .safetensors file: {error}") from error


def load_into(model, weights, path):
    """Fill the model with a run's weights. Raises UserError that names the first weight which does not fit."""
    expected = model.state_dict()
    for name in sorted(set(expected) | set(weights)):
        found = tuple(weights[name].shape) if name in weights else "nothing"
        wanted = tuple(expected[name].shape) if name in expected else "nothing"
        if found != wanted:
            raise UserError(f"{path} does not fit the model: {name} has {found}, expected {wanted}")
    model.load_state_dict(weights)


def replace_file(path, write):
    """Let `write` fill a temporary file, sync it to the disk and give it its name: whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    if os.name == "posix":
        os.umask(umask := os.umask(0))
        os.chmod(temporary, 0o666 & ~umask)  # safetensors lets nobody else read its files
    os.replace(temporary, path)
    if os.name == "posix":  # the new name is durable once its folder is
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
