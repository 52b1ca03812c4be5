"""The records of a run while it trains: metrics.csv, TensorBoard, W&B, curves.png and the terminal."""

import math
import sys
import time

from tqdm import tqdm

from utils.metrics import BEST_METRICS
from utils.records.best_effort import BestEffort, reason
from utils.records.metrics_file import MetricsFile, as_columns
from utils.records.result import FEW_CLASSES, summary
from utils.records.run_folder import CURVES, EVENTS, METRICS, read_config
from utils.terminal import say

# What matplotlib raises for reasons outside the program: a file, its installation, LaTeX for `text.usetex`, no memory.
DRAWING_ERRORS = (OSError, ImportError, RuntimeError, MemoryError)


class Tracker:
    """Writes the records, in the first process only; in the others its methods do nothing. A context manager.

    A record that can't be written is a warning; it is tried again at the next evaluation, with all that it lacks.
    No training metric is named here: those of `log_steps` and the columns of `log_evaluation` are the caller's.
    """

    def __init__(self, run_dir, first_step, num_steps, seconds, num_classes, enabled, wandb=None, evaluated_on="test"):
        """`seconds` is the duration of the run before it resumes at `first_step`; `wandb` is a WeightsAndBiases.

        `evaluated_on` is the evaluated split, with which the names of its metrics begin.
        """
        self.run_dir = run_dir
        self.num_classes, self.evaluated_on = num_classes, evaluated_on
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
        self.metrics = MetricsFile(run_dir / METRICS, first_step, evaluated_on)
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
        evaluated = {
            name.replace("_", "/", 1): value for name, value in row.items() if name.startswith(f"{self.evaluated_on}_")
        }
        self.add_scalars(evaluated, row["step"], retry=True)
        self.writing_events.attempt(self.events.write)
        if self.wandb:
            self.wandb.summarise({f"best_{best.metric}": best.value, "best_step": best.step})
        width = len(str(self.bar.total))
        self.say(
            f"step {row['step']:>{width}}/{self.bar.total}"
            f"  train loss {row['train_loss']:.4f} accuracy {100 * row['train_accuracy']:6.2f} %"
            f"{self.evaluation_text(row, BEST_METRICS[best.metric], best.metric)}"
            f"  lr {row['lr']:.2e}  {row['images_per_second']:.1f} img/s"
        )

    def evaluation_text(self, row, metric, name):
        """The part of the line about the evaluated split, with the BestMetric `name`; empty if it was not measured."""
        values = {key.removeprefix(f"{self.evaluated_on}_"): value for key, value in row.items()}
        if math.isnan(values["loss"]):
            return ""
        top5 = f" top-5 {100 * values['top5_accuracy']:6.2f} %" if self.num_classes > FEW_CLASSES else ""
        chosen = f" {metric.title} {100 * values[name]:6.2f} %" if metric.from_confusion else ""
        accuracy = f"accuracy {100 * values['accuracy']:6.2f} %"
        return f"  {self.evaluated_on} loss {values['loss']:.4f} {accuracy}{top5}{chosen}"

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

    def summarise(self, result):
        """Print the content of result.json and the paths of the run's files."""
        if not self.enabled:
            return
        self.complete()
        records = {METRICS: self.writing_metrics, CURVES: self.drawing_curves, EVENTS: self.writing_events}
        incomplete = [name for name, record in records.items() if record.failed]
        self.say(summary(self.run_dir, result, self.num_classes, incomplete))


def title_of(run_dir):
    """The title of a run's curves."""
    config = read_config(run_dir)
    if not config:
        return run_dir.name
    return "{name}: {model_type} on {dataset}".format(**config["flags"])
