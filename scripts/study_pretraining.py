"""A pretraining on some of the classes of a data set, for studies that train on its other classes."""

import contextlib
from argparse import Namespace

from study import SCRATCH, Study, plan_final, run_study

from utils.errors import UserError
from utils.flag_types import positive_float
from utils.records.files import file_checksum
from utils.records.weights import LAST
from utils.study_records import read_record

SOURCE = ("airplane", "bird", "cat", "horse", "truck")  # two kinds of vehicles and three of animals, as the others
TARGET = ("automobile", "deer", "dog", "frog", "ship")
RATE, SEED = 3e-3, 0
EPOCHS, BATCH_SIZE = 20, 128


def add_pretraining_flags(group):
    """--source, --target and --pretraining_epochs."""
    for name, classes, what in (("source", SOURCE, "the pretraining"), ("target", TARGET, "the comparison")):
        text = f"The classes of {what}; default: {' '.join(classes)}."
        group.add_argument(f"--{name}", nargs="+", default=classes, metavar="CLASS", help=text)
    group.add_argument(
        "--pretraining_epochs",
        type=positive_float,
        default=EPOCHS,
        metavar="N",
        help="Passes of the pretraining over the images of its classes.",
    )


def check_classes(args):
    """Raise UserError if --source and --target have classes in common."""
    if common := set(args.source) & set(args.target):
        raise UserError(f"--source and --target have {', '.join(sorted(common))} in common; give different classes")


class Pretraining:
    """The training of a model on the --source classes, whose result is one of the study `name`."""

    def __init__(self, name, model, args, epochs):
        self.study = Study(
            name,
            {"pretraining": {}},
            reference="pretraining",
            recipe={**SCRATCH, "model_type": model, "classes": args.source},
            labels={"model": model, "classes": "source"},
        )
        own = {"epochs": epochs, "train_batch_size": BATCH_SIZE, "learning_rates": [RATE]}
        self.args = Namespace(**{**vars(args), **own, "seeds": [SEED]})
        self.planned = plan_final(self.study, self.args, "pretraining", RATE, SEED)
        self.weights = self.planned.run.folder / LAST

    @contextlib.contextmanager
    def trained(self):
        """Train unless there is a result; the body uses the weights. Raises UserError."""
        run_study(self.study, self.args)
        path, expected = self.planned.path, self.checksum()
        if self.weights.exists() and expected and file_checksum(self.weights) != expected:
            raise UserError(f"{self.weights} is not the file of {path}; remove one of them")
        try:
            yield
        except UserError as error:
            if self.weights.exists() or str(self.weights) not in str(error) or not path.exists():
                raise
            raise UserError(f"{self.weights} does not exist any more; remove {path} to pretrain again") from error

    def checksum(self):
        """That of the weights in the pretraining's result; None before there is one."""
        return read_record(self.planned.path)["weights"] if self.planned.path.exists() else None

    def recorded(self):
        """The flags that results have in place of the path: the run and the checksum are the same everywhere."""
        return {"pretrained_dir": f"{self.planned.run.folder.name}/{LAST}, XXH3 {self.checksum()}"}
