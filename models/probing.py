"""Probing of what may not work: PyTorch's private operators, which any release may change, and Triton kernels."""

import functools
import importlib
import logging
import textwrap
import threading


def probe(name, check, fallback):
    """The result of `check()`; if it raises, `fallback`, with a warning in the log that `name` cannot be used.

    The check runs in a thread of its own: the caller's modes (a default device, autocast, counters of FLOPs) do not
    apply there, and its OpenMP threads end with it. They would make processes hang that are forked later.
    """
    results, errors = [], []

    def run():
        try:
            results.append(check())
        except Exception as error:  # whatever has changed or is missing may raise any error
            errors.append(textwrap.shorten(f"{type(error).__name__}: {error}".splitlines()[0], 200))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if results:
        return results[0]
    logging.getLogger(__name__).warning("%s: %s; ordinary, slower operators are used instead", name, errors[0])
    return fallback


@functools.cache
def load_kernel(name, device):
    """The function `apply` of models/`name`.py, a module of Triton kernels, if its `trial(device)` does not raise.

    Else None: Triton may be missing, or the C compiler that it needs. So a kernel is used only after it has computed
    the right results on this GPU.
    """

    def load():
        module = importlib.import_module(f"models.{name}")
        module.trial(device)
        return module.apply

    return probe(f"models/{name}.py", load, None)


def require_same(found, expected, bound):
    """Raise ArithmeticError unless the relative error in the Euclidean norm is below `bound`; NaN is not."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise ArithmeticError(f"{tuple(found.shape)} {found.dtype}, not {tuple(expected.shape)} {expected.dtype}")
    error = ((found.double() - expected.double()).norm() / expected.double().norm()).item()
    if not error < bound:
        raise ArithmeticError(f"results differ from those of ordinary operators, relative error {error:.1e}")
