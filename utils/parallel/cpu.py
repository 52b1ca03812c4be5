"""How a run computes on a CPU: on how many threads, and which parts are compiled."""

import os

import torch


def restore_threads(number):
    """Use the `number` of threads with which a run was started, since sums depend on it; None is unknown.

    OMP_NUM_THREADS wins. Returns a line that reports a change, or None.
    """
    present = torch.get_num_threads()
    if number in (None, present) or "OMP_NUM_THREADS" in os.environ:
        return None
    torch.set_num_threads(number)
    return f"{number} CPU threads, as when the run was started, not {present}; OMP_NUM_THREADS changes that"


def is_compiled(args, model, device):
    """Whether --compile compiles the model: on a CPU the blocks of a transformer in 16 bits, on Apple's GPUs nothing.

    On a CPU convolutions and float32 do not become faster (benchmarks/NOTES.md).
    """
    if not args.compile or device.type == "mps":
        return False
    return device.type != "cpu" or ((args.fp16 or args.bf16) and hasattr(model, "blocks"))


def compile_in_place(model, device):
    """Compile by torch.compile; training, evaluation, merged tokens and odd batches each compile a block's code."""
    set_up_compiler()
    for part in model.blocks if device.type == "cpu" else [model]:
        part.compile()


def set_up_compiler():
    """Settings of torch.compile for models whose blocks are compiled one by one."""
    torch._dynamo.config.recompile_limit = 64  # per function; beyond it PyTorch would continue without compiling
    torch._dynamo.config.optimize_ddp = False  # it would split a block's graph at DDP's buckets, to send parts earlier
