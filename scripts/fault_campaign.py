"""Are runs reliable? Stop very different small runs at random moments, damage their files, and compare the results.

A run is interrupted several times, each time resumed, and then compared with a run of the same command that was never
interrupted: weights by their bits, the rows of metrics.csv, and TensorBoard's values. Further faults follow: full disk,
damaged files, a clock that is set back, lost processes. The result is a table of faults and outcomes. The exit status
is 1 if a result was lost or a fault had an unexpected outcome. Only for Linux; on the CPU.

    python scripts/fault_campaign.py --kills 100 --seed 0
"""

import concurrent.futures
import itertools
import multiprocessing
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from fault_checks import compare
from fault_runs import (
    FINISHED,
    HALVES,
    NUM_STEPS,
    PHASES,
    RUNS,
    SAVE_EVERY,
    SECONDS_TO_END,
    Lab,
    last_step,
    make_picture_folder,
)
from faults import FAULTS, run_fault

from utils.checks import make_output_folder
from utils.errors import RunStoppedError, UserError, run_script
from utils.flag_types import Parser, natural, one_of, positive, seed
from utils.profiling import markdown_table

SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")
TARGETS = ("one", "group")
KILLS_PER_RUN = 3
MAX_ROUNDS = 4  # in which kills that came too late are repeated
POLL_SECONDS = 0.002
# Seconds from the beginning of a phase to the signal, at most; for the start-up, those that it takes undisturbed.
LONGEST_DELAY = {"training": 0.25, "evaluation": 0.25, "saving": 0.06}


class Kill(NamedTuple):
    """Which signal a run receives, and when: `delay`, from 0 to 1, after it reaches the phase beyond a step."""

    signal: str
    target: str
    phase: str
    after_step: int
    delay: float
    choice: float  # which of torchrun's processes receives it, from 0 to below 1


class Result(NamedTuple):
    """A run that was interrupted: (kill, phase in which it hit) of each interruption, and what was lost, as lines."""

    name: str
    folder: Path
    hits: list
    problems: list


def main():
    args = parse_flags()
    if sys.platform != "linux":
        raise UserError("the campaign forks processes and reads /proc; it needs Linux")
    make_output_folder(args.output_dir, "--output_dir")
    if any(args.output_dir.iterdir()):
        raise UserError(f"{args.output_dir} is not empty; delete it or give another --output_dir")
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup; the runs would inherit it, unlike a handler
        signal.signal(signal.SIGHUP, lambda *_: None)
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=fork) as pool:
        began = time.monotonic()
        lab = prepare(args, pool)
        results = interrupt_runs(args, lab, pool)
        outcomes = apply_faults(args, lab, pool)
        minutes = (time.monotonic() - began) / 60
    text = report(results, outcomes)
    (args.output_dir / "table.md").write_text(text)
    print(f"\n{text}\n{minutes:.1f} minutes; table: {args.output_dir / 'table.md'}", flush=True)
    losses = [line for result in results for line in described(result)]
    losses += [f"{outcome.fault}, {outcome.variant}: {line}" for outcome in outcomes for line in outcome.problems]
    if losses:
        raise RunStoppedError("\n  ".join([f"{len(losses)} losses", *losses]), status=1)


def parse_flags():
    parser = Parser(__doc__)
    group = parser.add_argument_group("campaign")
    group.add_argument("--kills", type=natural, default=100, metavar="N", help="Number of interruptions.")
    group.add_argument("--seed", type=seed, default=0, metavar="N", help="The seed of signals, moments and damage.")
    group.add_argument(
        "--runs",
        type=one_of("run", RUNS),
        nargs="+",
        default=tuple(RUNS),
        metavar="NAME",
        help=f"The runs to interrupt: {', '.join(RUNS)}; default: all.",
    )
    group.add_argument(
        "--faults",
        type=one_of("fault", (*FAULTS, "none")),
        nargs="+",
        default=tuple(FAULTS),
        metavar="NAME",
        help=f"The further faults: {', '.join(FAULTS)}, or none; default: all.",
    )
    group.add_argument("--jobs", type=positive, default=1, metavar="N", help="Number of runs at the same time.")
    group.add_argument(
        "--output_dir",
        type=Path,
        default="output/fault_campaign",
        metavar="DIR",
        help="The folder of all runs; those that lost nothing are deleted at once.",
    )
    args = parser.parse_args()
    args.faults = [name for name in args.faults if name != "none"]
    return args


def prepare(args, pool):
    """Finish the reference of each run that is needed, undisturbed; returns the Lab. Raises RunStoppedError."""
    make_picture_folder(args.output_dir / "pictures")
    faults = [FAULTS[name] for name in args.faults]
    halves = sorted({fault.base for fault in faults} & set(HALVES))
    names = list(dict.fromkeys([*(args.runs if args.kills else ()), *(fault.base for fault in faults)]))
    lab = Lab(args.output_dir, args.seed, {})
    print(f"{len(names)} undisturbed runs as references", flush=True)
    for name, seconds in zip(names, pool.map(lab.make_reference, names), strict=True):
        lab.startup_seconds[name] = seconds
    list(pool.map(lab.make_half, halves))
    return lab


# Interruptions


def interrupt_runs(args, lab, pool):
    """Interrupt runs until there were as many interruptions as asked for; a list of Results."""
    results, rng = [], random.Random(args.seed)
    for number in range(MAX_ROUNDS):
        missing = args.kills - sum(len(result.hits) for result in results)
        if missing <= 0:
            break
        plan = plan_kills(missing, args.runs, rng)
        jobs = [pool.submit(interrupt, lab, name, f"{name}-{number}{i}", kills) for i, (name, kills) in enumerate(plan)]
        for done in concurrent.futures.as_completed(jobs):
            results.append(done.result())
            verdict = "LOST: " + results[-1].problems[0] if results[-1].problems else "same bits"
            print(f"{results[-1].name}: {len(results[-1].hits)} interruptions: {verdict}", flush=True)
    return results


def plan_kills(count, names, rng):
    """[(name of a run, its Kills in order)] with `count` Kills in all, over all runs, signals, targets and phases."""
    kinds = list(itertools.product(SIGNALS, TARGETS, PHASES))
    kinds = itertools.cycle(rng.sample(kinds, len(kinds)))
    names = itertools.cycle(rng.sample(names, len(names)))
    plan = []
    while count > 0:
        size = min(count, KILLS_PER_RUN)
        latest = NUM_STEPS - SAVE_EVERY  # beyond it the run may end before the phase
        kills = []
        for number in range(size):
            after_step = rng.randrange(number * latest // size, (number + 1) * latest // size)
            kills.append(Kill(*next(kinds), after_step, rng.random(), rng.random()))
        plan.append((next(names), kills))
        count -= size
    return plan


def interrupt(lab, name, folder, kills):
    """Interrupt a run by each of the Kills, resume it every time, finish it, and compare it. Returns a Result."""
    case = lab.case(name, folder)
    hits, problems = [], []
    for kill in kills:
        with case.start() as run:
            phase = wait_for(run, kill, lab.startup_seconds[name])
            if run.status() is not None:
                break  # too late: it has ended
            run.send(signal.Signals[kill.signal], kill.target, kill.choice)
            hits.append((kill, phase))
            run.wait()
            problems += check_end(run, kill, phase)
    with case.start() as run:
        if run.wait() != 0:
            problems.append(f"the last start ended with {run.status()}: {run.last_words()}")
    problems += compare(case.run_dir, lab.reference(name))
    if not problems:
        shutil.rmtree(case.folder)
    return Result(name, case.folder, hits, problems)


def wait_for(run, kill, startup_seconds):
    """Wait for the moment of the Kill, or for the end of the run; returns the phase."""
    if kill.phase == "start-up":
        time.sleep(kill.delay * startup_seconds)
        return run.phase()
    while run.status() is None and (run.phase() != kill.phase or last_step(run.run_dir) < kill.after_step):
        time.sleep(POLL_SECONDS)
    time.sleep(kill.delay * LONGEST_DELAY[kill.phase])
    return run.phase()


def check_end(run, kill, phase):
    """What is wrong with how a run ended after a signal, as lines."""
    if run.status() is None:
        return [f"{kill.signal} in {phase}: it did not end within {SECONDS_TO_END} s"]
    if kill.signal == "SIGKILL" or phase in ("start-up", FINISHED) or run.case.kind.launch == "torchrun":
        return []  # nothing can be said before the run listens; torchrun has its own messages
    stopped = re.search(r"stopped by .*after step (\d+); saved", run.printed())
    problems = []
    if stopped and int(stopped[1]) != last_step(run.run_dir):
        problems.append(f"{stopped[0]}, but {last_step(run.run_dir)} is saved")
    if run.status() != (128 + signal.Signals[kill.signal] if stopped else 0):
        problems.append(f"it ended with status {run.status()}: {run.last_words()}")
    if "Traceback" in run.printed():
        problems.append("it printed a traceback")
    return [f"{kill.signal} to {kill.target} in {phase}: {line}" for line in problems]


def described(result):
    """The losses of a run as lines that name its folder and interruptions."""
    kills = "; ".join(
        f"{kill.signal} to {kill.target} in {phase} (planned: {kill.phase} after step {kill.after_step})"
        for kill, phase in result.hits
    )
    return [f"{result.name} in {result.folder}, interrupted by {kills}: {line}" for line in result.problems]


# Further faults and the table


def apply_faults(args, lab, pool):
    """Every variant of the faults; a list of Outcomes."""
    cases = [(name, variant) for name in args.faults for variant in FAULTS[name].variants]
    outcomes = []
    for outcome in pool.map(run_fault, itertools.repeat(lab), *zip(*cases, strict=True)) if cases else ():
        outcomes.append(outcome)
        verdict = f"LOST: {outcome.problems[0]}" if outcome.problems else outcome.skipped or "as expected"
        print(f"{outcome.fault}, {outcome.variant}: {verdict}", flush=True)
    return outcomes


def report(results, outcomes):
    """The tables as Markdown: interruptions by run and by phase, and further faults."""
    hits = [(result, kill, phase) for result in results for kill, phase in result.hits]
    tables = []
    for title, key, keys in (
        ("interrupted run", lambda result, kill, phase: result.name, RUNS),
        ("interrupted in", lambda result, kill, phase: phase, (*PHASES, FINISHED)),
        ("signal sent to", lambda result, kill, phase: kill.target, TARGETS),
    ):
        groups = {name: [hit for hit in hits if key(*hit) == name] for name in keys}
        rows = [row_of(name, group) for name, group in groups.items() if group]
        tables.append(markdown_table([title, *SIGNALS, "total", "same bits", "lost"], [*rows, row_of("all", hits)]))
    rows = []
    for name in dict.fromkeys(outcome.fault for outcome in outcomes):
        each = [outcome for outcome in outcomes if outcome.fault == name]
        lost = sum(bool(outcome.problems) for outcome in each)
        skipped = sorted({outcome.skipped for outcome in each if outcome.skipped})
        counts = (len(each), sum(not outcome.problems and not outcome.skipped for outcome in each), lost)
        rows.append([f"{FAULTS[name].title}{''.join(f' (skipped: {why})' for why in skipped)}", FAULTS[name].expected])
        rows[-1] += map(str, counts)
    faults = [markdown_table(["fault", "expected", "times", "as expected", "lost"], rows)] if rows else []
    return "\n\n".join((tables if hits else []) + faults) + "\n"


def row_of(name, hits):
    """The cells of one row of interruptions; all of a run count as lost if its results are."""
    counts = [sum(kill.signal == each for _, kill, _ in hits) for each in SIGNALS]
    lost = sum(bool(result.problems) for result, _, _ in hits)
    return [name, *map(str, (*counts, len(hits), len(hits) - lost, lost))]


if __name__ == "__main__":
    run_script(main)
