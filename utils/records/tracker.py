"""The records of a run while it trains: metrics.csv, TensorBoard, W&B, curves.png and the terminal."""

import math
import sys
import time

from tqdm import tqdm

from utils.metrics import BEST_METRICS, percent
from utils.records.best_effort import BestEffort, reason
from utils.records.metrics_file import MetricsFile, as_columns
from utils.records.run_folder import CURVES, EVENTS, METRICS, read_config
from utils.records.weights import BEST, LAST
from utils.terminal import say

FEW_CLASSES = 10  # up to this number of classes the terminal omits the top-5 accuracy
# What matplotlib raises for reasons outside the program: a file, its installation, LaTeX for `text.usetex`, no memory.
DRAWING_ERRORS = (OSError, ImportError, RuntimeError, MemoryError)


class Tracker:
    """Writes the records, in the first process only; in the others its methods do nothing. A context manager.

    A record that can't be written is a warning; it is tried again at the next evaluation, with all that it lacks.
    No training metric is named here: those of `log_steps` and the columns of `log_evaluation` are the caller's.
    """

    def __init__(self, run_dir, first_step, num_steps, seconds, num_classes, enabled, wandb=None):
        """`seconds` is the duration of the run before it resumes at `first_step`; `wandb` is a WeightsAndBiases."""
        self.run_dir = run_dir
        self.num_classes = num_classes
        self.enabled = enabled
        self.wandb = wandb
        self.started = time.perf_counter() - seconds
        if not enabled:
            return
        from utils.records.event_file import EventFile  # a slow import that other processes do not need

        draw_again = f"visualize.py --curves {run_dir} draws them again"
        self.drawing_curves = BestEffort(f"drawing {run_dir / CURVES}", DRAWING_ERRORS, draw_again)
        self.drawing_figures = BestEffort("drawing a figure", DRAWING_ERRORS)
        self.writing_events = BestEffort("writing TensorBoard's events")
        self.writing_metrics = BestEffort(f"writing {run_dir / METRICS}")
        self.is_complete = False
        self.title = title_of(run_dir)
        self.events = EventFile(run_dir, first_step)
        self.writing_events.attempt(self.events.write)
        self.metrics = MetricsFile(run_dir / METRICS, first_step)
        self.writing_metrics.attempt(self.metrics.write)
        self.bar = tqdm(
            total=num_steps,
            initial=first_step,
            desc="train",
            unit="step",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            say(f"warning: closing the records has failed ({reason(failure)})")  # `error` says why the run ended

    def say(self, message):
        """Print a line above the progress bar."""
        if self.enabled:
            say(message)

    def log_steps(self, first_step, metrics, lr, images_per_second):
        """Record {metric: its values in the steps from `first_step` on}."""
        if not self.enabled:
            return
        steps = [dict(zip(metrics, values, strict=True)) for values in zip(*metrics.values(), strict=True)]
        for step, values in enumerate(steps, start=first_step):
            self.add_scalars({f"train/{name}": value for name, value in values.items()}, step)
        last_step = first_step + len(steps) - 1
        self.add_scalars({"train/lr": lr, "train/images_per_second": images_per_second}, last_step)
        if not self.writing_events.failed:
            self.writing_events.attempt(self.events.write)
        newest = ", ".join(f"{name} {value:.4g}" for name, value in steps[-1].items())
        self.bar.set_postfix_str(f"{newest}, lr {lr:.2e}, {images_per_second:.1f} img/s", refresh=False)
        self.bar.update(len(steps))

    def log_evaluation(self, row, best):
        """Record a row of metrics.csv, {column: number}, also in TensorBoard and as a line in the terminal.

        It replaces an earlier row of the same step. Records that have failed are tried again. `best` is a Best.
        """
        if not self.enabled:
            return
        self.metrics.add(row)
        self.writing_metrics.attempt(self.metrics.write)
        tests = {name.replace("_", "/", 1): value for name, value in row.items() if name.startswith("test_")}
        self.add_scalars(tests, row["step"], retry=True)
        self.writing_events.attempt(self.events.write)
        if self.wandb:
            self.wandb.summarise({f"best_{best.metric}": best.value, "best_step": best.step})
        top5 = f" top-5 {100 * row['test_top5_accuracy']:6.2f} %" if self.num_classes > FEW_CLASSES else ""
        metric = BEST_METRICS[best.metric]
        chosen = f" {metric.title} {100 * row[f'test_{best.metric}']:6.2f} %" if metric.from_confusion else ""
        width = len(str(self.bar.total))
        self.say(
            f"step {row['step']:>{width}}/{self.bar.total}"
            f"  train loss {row['train_loss']:.4f} accuracy {100 * row['train_accuracy']:6.2f} %"
            f"  test loss {row['test_loss']:.4f} accuracy {100 * row['test_accuracy']:6.2f} %{top5}{chosen}"
            f"  lr {row['lr']:.2e}  {row['images_per_second']:.1f} img/s"
        )

    def add_scalars(self, values, step, retry=False):
        """Record {name: number} at W&B, after a failure only to `retry`, and in TensorBoard with the next write."""
        self.events.add_scalars(values, step)
        if self.wandb:
            self.wandb.log(values, step, retry)

    def log_figure(self, name, figure, step):
        """Record a matplotlib figure in TensorBoard and at W&B."""
        if self.enabled:
            self.drawing_figures.attempt(lambda: self.events.add_figure(name, figure, step))
            if self.wandb:
                self.wandb.log_figure(name, figure, step)

    def seconds(self):
        """The duration of the run, including the time before it was resumed."""
        return time.perf_counter() - self.started

    def complete(self):
        """Write at the end what could not be written before, and draw the curves, also after an error."""
        if self.is_complete:
            return
        self.is_complete = True
        self.bar.close()
        self.writing_events.attempt(self.events.write)
        if self.writing_metrics.failed:
            self.writing_metrics.attempt(self.metrics.write)
        if self.metrics.rows:
            self.drawing_curves.attempt(self.draw_curves)

    def draw_curves(self):
        from utils.curves import plot_curves
        from utils.figures import save

        save(plot_curves(as_columns(self.metrics.rows), self.title), self.run_dir / CURVES)

    def close(self):
        """Complete the records, and send the rest to W&B."""
        if not self.enabled:
            return
        self.complete()
        if self.wandb:
            self.wandb.finish()

    def summarise(self, best, test_images):
        """Print the results of the run, its Best among them, and the paths of its files."""
        if not self.enabled:
            return
        self.complete()
        records = {METRICS: self.writing_metrics, CURVES: self.drawing_curves, EVENTS: self.writing_events}
        incomplete = [name for name, record in records.items() if record.failed]
        self.say(summary(self.run_dir, self.metrics.rows, best, self.num_classes, test_images, incomplete))


def title_of(run_dir):
    """The title of a run's curves."""
    config = read_config(run_dir)
    if not config:
        return run_dir.name
    return "{name}: {model_type} on {dataset}".format(**config["flags"])


def summary(run_dir, rows, best, num_classes, test_images=None, incomplete=()):
    """The results of a run and the paths of its files as text.

    `rows` are those of metrics.csv, {column: text}. With the number of `test_images`, which earlier versions did not
    record, accuracies have intervals. `incomplete` names the records that could not be written.
    """
    last = ""
    if rows:
        top1, top5 = (float(rows[-1].get(f"test_{name}", "nan")) for name in ("accuracy", "top5_accuracy"))
        shows_top5 = num_classes > FEW_CLASSES and not math.isnan(top5)
        top5 = f"top-5 {percent(top5, test_images)}, " if shows_top5 else ""
        last = f"test accuracy {percent(top1, test_images)}, {top5}"
    lines = [f"\n{last}{best.text(test_images)}{' (95 % intervals)' if test_images else ''}"]
    for title, name in (
        ("weights", BEST),
        ("", LAST),
        ("metrics", METRICS),
        ("curves", CURVES),
        ("TensorBoard", EVENTS),
    ):
        path = f"tensorboard --logdir {run_dir}" if name == EVENTS else run_dir / name
        exists = any(run_dir.glob(name))
        note = "" if exists and name not in incomplete else "  (incomplete)" if exists else "  (missing)"
        lines.append(f"  {title:<11}  {path}{note}")
    return "\n".join(lines)
