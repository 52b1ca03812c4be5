"""A run's own checkpoints: `last.safetensors`, `best.safetensors` and, beside them, what resuming needs.

`last.safetensors` names its step; the optimizer's state of that step is in `state-<step>.pt`. The state is
written first and older ones are deleted last, so at any moment the two files of one step are both there.
"""

import contextlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from utils.errors import UserError

LAST, BEST = "last.safetensors", "best.safetensors"


def save_checkpoint(run_dir, step, weights, state):
    """Write the weights and the state of `step`; a crash at any point leaves the older pair or the new one."""
    run_dir = Path(run_dir)
    if state["progress"]["best_step"] == step:
        save_weights(run_dir / BEST, weights, step)
    replace_file(state_path(run_dir, step), lambda path: torch.save(state, path))
    save_weights(run_dir / LAST, weights, step)
    for path in run_dir.glob("state-*.pt"):
        if path != state_path(run_dir, step):
            path.unlink()


def load_checkpoint(run_dir):
    """(weights, state) of the run's last checkpoint. Raises UserError."""
    path = Path(run_dir) / LAST
    weights, step = load_weights(path)
    state_file = state_path(run_dir, step)
    try:
        return weights, torch.load(state_file, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is not torch.save's raises nearly every type
        what = "can't be read" if state_file.exists() else "is missing"
        raise UserError(f"{state_file} {what}, so {path} can't be resumed; start anew with --overwrite") from error


def state_path(run_dir, step):
    return Path(run_dir) / f"state-{step}.pt"


def save_weights(path, weights, step):
    tensors = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
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
