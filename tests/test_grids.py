"""The grid of a sweep: its values, the names of its runs, and the best point."""

import pytest

from command_line import train_parser
from utils.errors import UserError
from utils.grids import (
    NOT_IN_GRIDS,
    best_point,
    check_grid,
    folder_name,
    grid_points,
    parse_grid,
    point_arguments,
    point_text,
)
from utils.sweeps import Run

PARSER = train_parser()


def test_values_are_read_as_the_training_reads_them():
    entries = ["learning_rate=1e-2,0.03", "horizontal_flip=true,false", "rand_augment=2 9,2 15", "keep_tokens=1,1.0"]
    grid = parse_grid([*entries, 'pretrained_dir="a, b.npz",c d.npz,-e=f.npz', "model_type=R50+ViT-B_16"], PARSER)
    assert grid == {
        "learning_rate": [0.01, 0.03],
        "horizontal_flip": [True, False],
        "rand_augment": [(2, 9), (2, 15)],
        "keep_tokens": [1, 1.0],
        "pretrained_dir": ["a, b.npz", "c d.npz", "-e=f.npz"],
        "model_type": ["R50-ViT-B_16"],
    }
    assert [type(value) for value in grid["keep_tokens"]] == [int, float]
    assert len(set(map(str, grid_points(grid)))) == 48
    for point in grid_points(grid):
        args = vars(PARSER.parse_args(["--name=x", *point_arguments(grid, point, PARSER)]))
        values = [tuple(args[name]) if isinstance(args[name], list) else args[name] for name in grid]
        assert [repr(value) for value in values] == [repr(value) for value in point]


@pytest.mark.parametrize(
    "entries, message",
    [
        (["learning_rate"], "--grid learning_rate: give a flag and its values, for example learning_rate=0.01,0.03"),
        (["learning_rate="], "give a flag and its values"),
        (["learning_rat=1"], "the training has no flag --learning_rat; did you mean learning_rate"),
        (["zzz=1"], "the training has no flag --zzz$"),
        (["learning_rate=1", "learning_rate=2"], "--grid learning_rate: the flag is given twice"),
        (["learning_rate=1,fast"], "--grid learning_rate: argument --learning_rate: fast is not a number above 0"),
        (["learning_rate=1,,2"], "--grid learning_rate=1,,2: a value is empty"),
        (["learning_rate=0.01,1e-2"], "--grid learning_rate: the value 1e-2 is given twice"),
        (["bf16=true,yes"], "--grid bf16=yes: the values of this flag are true and false"),
        (["bf16=true,true"], "the value true is given twice"),
        (["rand_augment=2"], "--grid rand_augment: argument --rand_augment: expected 2 arguments"),
        (['pretrained_dir="a,b'], '--grid pretrained_dir="a,b: '),
        (["optimizer=adamw,adm"], "--grid optimizer: argument --optimizer: unknown optimizer 'adm'; did you mean"),
        (["seed=1,2"], "--grid seed: this flag can't be in a grid; give --seeds"),
        (["num_workers=1,2"], "--grid num_workers: this flag can't be in a grid; it does not change what a run learns"),
        (["config=nowhere.json"], "--grid config: nowhere.json can't be read"),
    ],
)
def test_a_wrong_grid_is_one_line(entries, message):
    with pytest.raises(UserError, match=message) as error:
        parse_grid(entries, PARSER)
    assert "\n" not in str(error.value)


def test_what_does_not_change_a_run_is_not_in_a_grid():
    assert {"name", "seed", "output_dir", "resume", "mode", "help", "num_workers"} <= NOT_IN_GRIDS
    assert "config" not in NOT_IN_GRIDS


def test_names_follow_from_the_values():
    grid = {"learning_rate": [1e-5], "horizontal_flip": [True], "rand_augment": [(2, 9)]}
    [point] = grid_points(grid)
    assert folder_name(grid, point) == "learning_rate=1e-05-horizontal_flip=true-rand_augment=2_9"
    assert point_text(grid, point) == "learning_rate 1e-05, horizontal_flip true, rand_augment 2 9"


def test_values_that_are_not_suitable_for_a_folder_have_different_names():
    grid = {"pretrained_dir": ["a/b.npz", "a b.npz", "a_b.npz", "ä_b.npz", "x" * 300, "x" * 301]}
    names = [folder_name(grid, point) for point in grid_points(grid)]
    assert len(set(names)) == len(names)
    assert names[0] == "pretrained_dir=a_b.npz-3ddd4ccc"  # the same in every process
    assert names[2] == "pretrained_dir=a_b.npz"
    assert all(len(name) < 200 and name.isascii() and "/" not in name and " " not in name for name in names)


def runs_of(grid, *further):
    """Runs with seed 0 of all points."""
    return {
        (point, 0): Run([], PARSER.parse_args(["--name=x", *point_arguments(grid, point, PARSER), *further]))
        for point in grid_points(grid)
    }


def test_a_flag_without_effect_is_an_error(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"flags": {"bf16": true}}')
    grid = parse_grid(["bf16=true,false"], PARSER)
    check_grid(grid, runs_of(grid))
    with pytest.raises(UserError, match="--grid bf16=false has no effect: other flags set it to true"):
        check_grid(grid, runs_of(grid, f"--config={path}"))


@pytest.mark.parametrize("entry", ["val_split=0.1,0.2", "best_metric=accuracy,loss", "dataset=digits,cifar10"])
def test_runs_that_can_not_be_compared_are_an_error(entry):
    grid = parse_grid([entry], PARSER)
    with pytest.raises(UserError, match=r"runs with --\w+ \S+ and \S+ can't be compared; give one value for all runs"):
        check_grid(grid, runs_of(grid))


def test_the_best_point_has_the_best_mean_and_is_the_first_of_equal_ones():
    values = {("a",): [0.5, 0.9], ("b",): [0.7, 0.75], ("c",): [0.75, 0.7], ("d",): [0.95, 0.1]}
    assert best_point(values, "accuracy") == ("b",)
    assert best_point(values, "loss") == ("d",)
