"""The processes of a run: a single one, or those that `torchrun` or `torch.distributed.launch` started."""

import contextlib
import gc
import os
import platform
import signal
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from utils.errors import RunStoppedError, UserError
from utils.parallel.devices import has_apple_gpu
from utils.parallel.memory import keep_freed_memory
from utils.terminal import say_on_stderr

PARALLEL = ("ddp", "fsdp")
NO_LIMIT = timedelta(days=365)


class Processes(NamedTuple):
    """This process among all: its rank, their number, its rank on this machine, and its device."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self):
        """Whether this process prints and writes the records."""
        return self.rank == 0

    def __str__(self):
        return f"{self.size} processes on {self.device.type}" if self.size > 1 else str(self.device)


def one_process(device=None):
    """The Processes of a program that runs alone."""
    return Processes(0, 1, 0, device or torch.device("cpu"))


def choose_device(local_rank=0):
    """The GPU of this rank, or Apple's, or the CPU without one; also sets how this process computes on it.

    Raises UserError for more processes than GPUs.
    """
    if not torch.cuda.is_available():
        if has_apple_gpu():
            return torch.device("mps")
        keep_freed_memory()
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} has no GPU of its own: this machine has {torch.cuda.device_count()}; start as many "
            "processes as GPUs (--nproc_per_node)"
        )
    torch.cuda.set_device(local_rank)
    # By default cuDNN rounds the inputs of float32 convolutions to 10 bits (TF32); matrix products are exact.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True  # all images of a run have one size, so the search pays off
    return torch.device("cuda", local_rank)


def device_name():
    """The GPU's name, or the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if has_apple_gpu():
        return "Apple GPU"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def restarted():
    """Whether torchrun has restarted the processes because one of them died (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def launcher():
    """An identifier of the torchrun that started this process, the same after a restart; None without torchrun."""
    if "TORCHELASTIC_RESTART_COUNT" not in os.environ:
        return None
    return f"{platform.node()} {os.getppid()} {os.environ.get('TORCHELASTIC_RUN_ID')}"


@contextlib.contextmanager
def join_processes(local_rank=None):
    """Join the process group that the launcher's environment describes, if any, and leave it at the end.

    `local_rank` is the flag of an old launcher; the environment variable takes precedence.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", local_rank or 0))
    try:
        device = choose_device(local_rank)
    except UserError as error:
        error.only_this_process = True
        raise
    if "RANK" not in os.environ:
        yield one_process(device)
        return
    if device.type == "cuda":
        # Gloo carries the few numbers that the hosts exchange without waiting for the GPUs.
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, **own_store())
    else:
        dist.init_process_group("gloo", **own_store())
    complete = False
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), local_rank, device)
        complete = True
    except UserError as error:
        error.only_this_process = True
        raise
    except RuntimeError as error:
        if "gloo/transport" not in str(error):
            raise
        raise RunStoppedError("another process of the run has ended or does not answer; see its message", 1) from error
    finally:
        gc.collect()  # gloo may abort at exit if a DDP wrapper or an FSDP model outlives the process group
        if complete or device.type == "cpu":  # NCCL would wait here for processes that continue without this one
            dist.destroy_process_group()


def sum_over_processes(tensor):
    """Sum `tensor` over all processes in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def union_over_processes(items):
    """The set of all processes' items."""
    if not dist.is_initialized():
        return set(items)
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, set(items))
    return set().union(*gathered)


def own_store():
    """Arguments of `init_process_group` by which processes that torchrun has restarted find each other.

    torchrun keeps its store, in which they would find the addresses of the processes before the restart. The number of
    restarts is known to the processes of one machine only; for several see docs/distributed.md.
    """
    size = int(os.environ["WORLD_SIZE"])
    if not restarted() or int(os.environ.get("LOCAL_WORLD_SIZE", 0)) != size:
        return {}
    store, rank, size = next(dist.rendezvous("env://"))
    prefix = f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}"
    return {"store": dist.PrefixStore(prefix, store), "rank": rank, "world_size": size}


def from_first_process(value):
    """The first process's `value`, in all processes."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def barrier():
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def shard_weights(model, processes, dtype=None):
    """Keep in each process its shard of every weight, gradient and momentum (FSDP2; ZeRO, Rajbhandari et al., 2020).

    Each block of the model (a module with `is_block`) gathers its weights before it computes and frees them afterwards.
    Weights outside the blocks stay gathered from the forward to the backward pass. With a 16-bit `dtype` weights and
    activations are cast to it; gradients are summed and kept in float32, as the shards are.
    """
    # The keys that a block passes to a token reduction are a view, which nothing writes to.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype and torch.float32)
    mesh = init_device_mesh(processes.device.type, (processes.size,))
    for block in [module for module in model.modules() if getattr(module, "is_block", False)]:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def load_whole_weights(model, weights):
    """Load {name: whole tensor} into a model, which may consist of shards."""
    if isinstance(model, FSDPModule):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        model.reshard()  # after an evaluation it holds whole weights outside its blocks, which can't be loaded
        set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))
    else:
        model.load_state_dict(weights)


def local_parts(tensors):
    """The part of each tensor that this process holds: all of it, or its shard."""
    return [tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach() for tensor in tensors]


@contextlib.contextmanager
def gradients_summed(network, last):
    """Gradients are summed over the processes once per step, with its `last` micro-batch."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(last)
        yield
    elif isinstance(network, DistributedDataParallel) and not last:
        with network.no_sync():
            yield
    else:
        yield


@contextlib.contextmanager
def first_on_each_machine(processes):
    """The body runs in one process of each machine before it runs in the others, for files that are written once.

    The others wait without a time limit, since the body may download. If it fails in one of the first processes, it
    does not run in the others, which raise RunStoppedError.
    """
    if not dist.is_initialized():
        yield
        return
    group = dist.new_group(backend="gloo", timeout=NO_LIMIT)
    if processes.local_rank == 0:
        try:
            yield
        except BaseException:
            with contextlib.suppress(RuntimeError):  # if another process has ended too, this error is still reported
                one_failed(True, group)
            raise
    if one_failed(False, group):
        raise RunStoppedError("another process of the run could not prepare its files; see its message", 1)
    if processes.local_rank != 0:
        yield


def one_failed(failed, group):
    """Whether one of the group's processes has `failed`."""
    flag = torch.tensor(int(failed))
    dist.all_reduce(flag, dist.ReduceOp.MAX, group)
    return bool(flag)


class StopSignal:
    """Reports to all processes, at the same step, that one of them received a stop signal.

    The answer to the question of one step is read in the next, so that no process waits for it.
    """

    def __init__(self):
        self.number = 0
        self.received = 0.0
        self.terminals = [stream for stream in (sys.stdout, sys.stderr) if stream.isatty()]
        self.process = os.getpid()
        self.pending = None

    @contextlib.contextmanager
    def listening(self):
        """Inside, SIGTERM, Ctrl-C and SIGHUP (a closed terminal) are recorded, SIGHUP unless it is ignored (nohup).

        A second signal, at least two seconds later, interrupts at once.
        """
        numbers = [signal.SIGTERM, signal.SIGINT]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        previous = {number: signal.signal(number, self.receive) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def receive(self, number, frame):
        if os.getpid() != self.process:  # a worker that reads images; its training process ends it
            return
        if signal.Signals(number).name == "SIGHUP":
            self.silence_terminals()
        # A launcher forwards a signal that the terminal has already sent; a second Ctrl-C of the user comes later.
        if self.number and time.perf_counter() - self.received > 2:
            raise KeyboardInterrupt
        if not self.number and not (dist.is_initialized() and dist.get_rank()):
            name = signal.Signals(number).name
            say_on_stderr(f"\n{name}: stopping at the end of this step; repeat it to stop at once, unsaved")
        self.number, self.received = number, time.perf_counter()

    def silence_terminals(self):
        """Discard what is printed to a terminal that is gone, since writing to it would be an error."""
        for stream in self.terminals:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())

    def agreed(self):
        """The signal's number, or 0. Every process must call it equally often: once per step or evaluated batch."""
        if not dist.is_initialized():
            return self.number
        answer = 0
        if self.pending is not None:
            work, flag = self.pending
            work.wait()
            answer = int(flag)
        flag = torch.tensor(self.number)
        self.pending = (dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True), flag)
        return answer
