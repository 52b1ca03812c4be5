"""The records of a run while it trains: metrics.csv, TensorBoard, W&B, curves.png and the terminal."""

import csv
import math
import sys
import time

from tqdm import tqdm

from utils.records.checkpoint import BEST, LAST, replace_file
from utils.records.run_folder import CURVES, METRICS, read_config, read_metrics, read_rows

FEW_CLASSES = 10  # up to this number of classes the terminal omits the top-5 accuracy


class Tracker:
    """Writes the records, in the first process only; in the others its methods do nothing. A context manager.

    No training metric is named here: those of `log_steps` and the columns of `log_evaluation` are the caller's.
    """

    def __init__(self, run_dir, first_step, num_steps, seconds, num_classes, enabled, wandb=None):
        """`seconds` is the duration of the run before it resumes at `first_step`; `wandb` is a WeightsAndBiases."""
        self.run_dir = run_dir
        self.num_classes = num_classes
        self.enabled = enabled
        self.wandb = wandb
        self.started = time.monotonic() - seconds
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter  # a slow import that other processes do not need

        self.tensorboard = SummaryWriter(run_dir, purge_step=first_step + 1 if first_step else None)
        self.rows = rows_until(run_dir / METRICS, first_step)
        if (run_dir / METRICS).exists():
            self.write_metrics()
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

    def __exit__(self, *error):
        self.close()

    def say(self, message):
        """Print a line above the progress bar."""
        if self.enabled:
            tqdm.write(message, file=sys.stdout)
            sys.stdout.flush()

    def log_steps(self, first_step, metrics, lr, images_per_second):
        """Record {metric: its values in the steps from `first_step` on}."""
        if not self.enabled:
            return
        steps = [dict(zip(metrics, values, strict=True)) for values in zip(*metrics.values(), strict=True)]
        for step, values in enumerate(steps, start=first_step):
            self.add_scalars({f"train/{name}": value for name, value in values.items()}, step)
        last_step = first_step + len(steps) - 1
        self.add_scalars({"train/lr": lr, "train/images_per_second": images_per_second}, last_step)
        newest = ", ".join(f"{name} {value:.4g}" for name, value in steps[-1].items())
        self.bar.set_postfix_str(f"{newest}, lr {lr:.2e}, {images_per_second:.1f} img/s", refresh=False)
        self.bar.update(len(steps))

    def log_evaluation(self, row, best_accuracy, best_step):
        """Record a row of metrics.csv, {column: number}, also in TensorBoard and as a line in the terminal."""
        if not self.enabled:
            return
        self.rows.append({name: format(value, ".8g") for name, value in row.items()})
        self.write_metrics()
        tests = {name: value for name, value in row.items() if name.startswith("test_")}
        self.add_scalars({name.replace("_", "/", 1): value for name, value in tests.items()}, row["step"])
        self.tensorboard.flush()
        if self.wandb:
            self.wandb.summarise({"best_accuracy": best_accuracy, "best_step": best_step})
        top5 = f" top-5 {100 * row['test_top5_accuracy']:6.2f} %" if self.num_classes > FEW_CLASSES else ""
        width = len(str(self.bar.total))
        self.say(
            f"step {row['step']:>{width}}/{self.bar.total}"
            f"  train loss {row['train_loss']:.4f} accuracy {100 * row['train_accuracy']:6.2f} %"
            f"  test loss {row['test_loss']:.4f} accuracy {100 * row['test_accuracy']:6.2f} %{top5}"
            f"  lr {row['lr']:.2e}  {row['images_per_second']:.1f} img/s"
        )

    def add_scalars(self, values, step):
        """Record {name: number} in TensorBoard and at W&B."""
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(values, step)

    def log_figure(self, name, figure, step):
        """Record a matplotlib figure in TensorBoard and at W&B."""
        if self.enabled:
            self.tensorboard.add_figure(name, figure, step)
            if self.wandb:
                self.wandb.log_figure(name, figure, step)

    def write_metrics(self):
        """Write all rows; the columns are those of the newest row, and NaN where an earlier row lacks one."""
        columns = dict.fromkeys(name for row in reversed(self.rows) for name in row)

        def write(path):
            with open(path, "w", newline="") as file:
                writer = csv.DictWriter(file, columns, restval="nan")
                writer.writeheader()
                writer.writerows(self.rows)

        replace_file(self.run_dir / METRICS, write)

    def seconds(self):
        """The duration of the run, including the time before it was resumed."""
        return time.monotonic() - self.started

    def close(self):
        """Draw the curves, also after an error."""
        if not self.enabled:
            return
        self.bar.close()
        self.tensorboard.close()
        if self.rows:
            from utils.curves import plot_curves
            from utils.figures import save

            flags = read_config(self.run_dir)["flags"]
            title = f"{flags['name']}: {flags['model_type']} on {flags['dataset']}"
            save(plot_curves(read_metrics(self.run_dir), title), self.run_dir / CURVES)
        if self.wandb:
            self.wandb.finish()

    def summarise(self, best_accuracy, best_step):
        """Print the results of the run and the paths of its files."""
        if not self.enabled:
            return
        last = ""
        if self.rows:
            top1, top5 = (
                100 * float(self.rows[-1].get(f"test_{name}", "nan")) for name in ("accuracy", "top5_accuracy")
            )
            shows_top5 = self.num_classes > FEW_CLASSES and not math.isnan(top5)
            last = f"test accuracy {top1:.2f} %, {f'top-5 {top5:.2f} %, ' if shows_top5 else ''}"
        self.bar.close()
        self.say(
            f"\n{last}best {100 * best_accuracy:.2f} % at step {best_step}\n"
            f"  weights      {self.run_dir / BEST}\n"
            f"               {self.run_dir / LAST}\n"
            f"  metrics      {self.run_dir / METRICS}\n"
            f"  curves       {self.run_dir / CURVES}\n"
            f"  TensorBoard  tensorboard --logdir {self.run_dir}"
        )


def rows_until(path, step):
    """The rows of an existing metrics.csv up to the checkpoint at `step` from which the run resumes."""
    if not step or not path.exists():
        return []
    return [row for row in read_rows(path) if int(row["step"]) <= step]
