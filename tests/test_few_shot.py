"""Few-shot evaluation: features of every kind of model, the shots, the classifiers and scripts/few_shot.py."""

import csv
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from helpers import CPU, DIGITS_RUN, ROOT, load_data, make_shallow, random_model, truncate, write_images, write_run
from inference import SavedModel
from synthetic import make_checkpoint
from utils.data.loading import TensorImages
from utils.data.splits import draw_per_class
from utils.errors import UserError
from utils.features import extract_features, without_classifier
from utils.few_shot import (
    BIAS,
    L2,
    L2_GRID,
    check_shots,
    choose_l2,
    linear_probe,
    nearest_neighbours,
    ridge,
    ridge_inputs,
    solve_ridge,
    tuned_ridge,
)
from utils.few_shot_figure import plot_over_images
from utils.parallel.processes import Processes, one_process

sys.path.insert(0, str(ROOT / "scripts"))
import few_shot

FLAGS = Namespace(eval_batch_size=4, fp16=False, bf16=False)
KINDS = {
    "ViT": ("ViT-Nano_4", {}),
    "BN": ("ViT-Nano_4", {"norm_type": "BN"}),
    "hybrid": ("R26-ViT-Mini_4", {}),
    "CNN": ("ResNet-Mini_Flops", {}),
    "Conformer": ("Conformer-Mini_4", {}),
}


def saved_model(model, img_size=16):
    return SavedModel(model.eval(), ["cat", "dog", "emu"], img_size, {}, "a model")


def noise_images(count=10, seed=0):
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (count, 3, 12, 12), dtype=np.uint8)
    return TensorImages(images, random.integers(0, 3, count), ["cat", "dog", "emu"], CPU)


def gaussian_features(per_class=10, classes=4, dim=6, noise=2.5, seed=0):
    """Features (n, dim) of overlapping classes with different scales, their labels, and as many for testing."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((classes, dim))
    labels = np.repeat(np.arange(classes), per_class)
    scales = 10.0 ** np.linspace(-2, 2, dim)
    train, test = ((centres[labels] + noise * random.standard_normal((len(labels), dim)) + 3) * scales for _ in "12")
    return train.astype(np.float32), labels, test.astype(np.float32)


# Features


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_computes_the_logits_from_the_features(kind):
    name, keywords = KINDS[kind]
    model = random_model(name, 16, 3, **keywords)
    assert_head_computes_logits(model)


def test_the_features_of_a_head_with_pre_logits_are_behind_its_tanh():
    model = random_model("ViT-Nano_4", 16, 3)
    arrays = model.export_npz()
    arrays |= make_checkpoint({"pre_logits/kernel": (64, 64), "pre_logits/bias": (64,)})
    model.load_from(arrays, head="keep")
    assert np.abs(assert_head_computes_logits(model)).max() <= 1


def assert_head_computes_logits(model):
    """Checks the features of ten images against the model's logits, and returns them."""
    saved, data = saved_model(model), noise_images()
    with torch.no_grad():
        logits = torch.cat([model(images) for images, _ in data.eval_batches((16, 16), 10, one_process())])
    features, labels = extract_features(saved, data, FLAGS, one_process())
    head = getattr(model.head, "fc", model.head)
    expected = features @ head.weight.detach().flatten(1).numpy().T + head.bias.detach().numpy()
    np.testing.assert_allclose(expected, logits, rtol=1e-4, atol=1e-4 * logits.abs().max())
    assert (features.dtype, labels.dtype, labels.tolist()) == (np.float32, np.int64, data.labels.tolist())
    assert (features.std(axis=0) > 0).mean() > 0.8  # the others are channels that ReLU sets to 0
    return features


def test_the_copy_without_classifier_shares_the_weights_and_leaves_the_model_as_it_was():
    model = random_model("ViT-Nano_4", 16, 3)
    copied = without_classifier(model)
    ours = {id(weight) for name, weight in model.named_parameters() if not name.startswith("head.")}
    assert {id(weight) for weight in copied.parameters()} == ours
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model.head(copied(images)), model(images))


def test_each_process_computes_its_share_of_the_features(monkeypatch):
    """Their sum over the processes is what a single process computes, in the order of the data set."""
    make_shallow(monkeypatch)
    saved, data = saved_model(random_model("ViT-Nano_4", 16, 3)), noise_images()
    whole, _ = extract_features(saved, data, FLAGS, one_process())
    shares = [extract_features(saved, data, FLAGS, Processes(rank, 3, rank, CPU))[0] for rank in range(3)]
    np.testing.assert_allclose(sum(shares), whole, rtol=1e-5, atol=1e-5)
    assert [np.flatnonzero(share.any(axis=1)).tolist() for share in shares] == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]


def test_features_in_16_bits_are_float32_and_similar():
    saved, data = saved_model(random_model("ViT-Nano_4", 16, 3)), noise_images()
    exact, _ = extract_features(saved, data, FLAGS, one_process())
    flags = Namespace(eval_batch_size=4, fp16=False, bf16=True, fp16_opt_level="O2")
    rounded, _ = extract_features(saved, data, flags, one_process())
    assert rounded.dtype == np.float32
    assert 0 < np.abs(rounded - exact).max() < 0.1 * np.abs(exact).max()


def test_unreadable_images_have_no_features(image_folder, monkeypatch):
    make_shallow(monkeypatch)
    saved = saved_model(random_model("ViT-Nano_4", 16, 2))
    whole, labels = extract_features(saved, load_data("imagefolder", "train", image_folder), FLAGS, one_process())
    truncate(image_folder / "train" / "cat" / "002.png", 0.1)
    data = load_data("imagefolder", "train", image_folder, skip_broken=True)
    features, kept = extract_features(saved, data, FLAGS, one_process())
    np.testing.assert_allclose(features, np.delete(whole, 2, axis=0), rtol=1e-5, atol=1e-5)
    assert kept.tolist() == np.delete(labels, 2).tolist()


def test_features_that_are_not_finite_are_an_error():
    model = random_model("ViT-Nano_4", 16, 3)
    model.norm.bias.data[0] = torch.nan
    with pytest.raises(UserError, match="a model has features that are infinite or NaN"):
        extract_features(saved_model(model), noise_images(), FLAGS, one_process())


# Shots


def test_fewer_shots_are_a_part_of_more_shots():
    labels = np.random.default_rng(0).integers(0, 5, 200)
    many = draw_per_class(labels, 20, seed=3)
    for shots in (1, 5, 20):
        drawn = draw_per_class(labels, shots, seed=3)
        assert len(set(drawn)) == 5 * shots
        assert np.bincount(labels[drawn]).tolist() == [shots] * 5
        assert set(drawn) <= set(many)


def test_the_shots_of_a_class_depend_on_seed_and_class_alone():
    """Not on the images of other classes; and they are drawn at random."""
    first, second = np.repeat([0, 1, 2], 30), np.repeat([0, 1, 2], [30, 50, 30])
    drawn, others = draw_per_class(first, 8, seed=1), draw_per_class(second, 8, seed=1)
    assert (drawn[:8] == others[:8]).all()
    assert (drawn[16:] - 60 == others[16:] - 80).all()
    assert drawn[:8].tolist() != (drawn[16:] - 60).tolist()
    assert drawn.tolist() != draw_per_class(first, 8, seed=2).tolist()
    frequencies = np.bincount(np.concatenate([draw_per_class(first, 8, number)[:8] for number in range(600)]))
    assert len(frequencies) == 30
    assert 100 < frequencies.min() <= frequencies.max() < 220  # 160 on average


def test_too_few_images_or_classes_are_an_error_that_names_the_class():
    labels = np.repeat([0, 1, 2], [9, 4, 6])
    check_shots(labels, ["cat", "dog", "emu"], 4)
    with pytest.raises(UserError, match="class 'dog' has 4 training images, too few for --shots 5; give at most 4"):
        check_shots(labels, ["cat", "dog", "emu"], 5)
    with pytest.raises(UserError, match="one class only, 'cat'"):
        check_shots(labels[:9], ["cat"], 1)


# Classifiers


def reference_inputs():
    """scikit-learn's standardisation, and the constant feature."""
    return make_pipeline(
        StandardScaler(), FunctionTransformer(lambda x: np.pad(x, ((0, 0), (0, 1)), constant_values=100))
    )


@pytest.mark.parametrize("per_class, dim", [(10, 6), (2, 30)], ids=["more examples", "more features"])
def test_ridge_regression_is_the_closed_form(per_class, dim):
    """Against numpy's least squares of the equations extended by sqrt(strength) w = 0, and scikit-learn's Ridge."""
    train, labels, test = gaussian_features(per_class, dim=dim)
    x, _ = ridge_inputs(train, test)
    targets = np.where(labels[:, None] == np.arange(4), 1.0, -1.0)
    strengths = [0.5, 30.0, L2]
    for strength, found in zip(strengths, solve_ridge(x, targets, strengths), strict=True):
        rows = np.concatenate([x, strength**0.5 * np.eye(dim + 1)])
        expected = np.linalg.lstsq(rows, np.concatenate([targets, np.zeros((dim + 1, 4))]), rcond=None)[0]
        np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9)
        fitted = Ridge(alpha=strength, fit_intercept=False).fit(x, targets)
        np.testing.assert_allclose(found, fitted.coef_.T, rtol=1e-6, atol=1e-9)


def test_the_inputs_of_ridge_regression_have_mean_0_deviation_1_and_a_constant():
    train, _, test = gaussian_features()
    train[:, 2] = 0.1  # does not vary, as an inactive channel
    test[:, 2] = 0.1
    x, x_test = ridge_inputs(train, test)
    np.testing.assert_allclose(x.mean(axis=0), [*[0] * 6, BIAS], atol=1e-9)
    deviations = train.astype(float).std(axis=0)
    np.testing.assert_allclose(x.std(axis=0), [*(deviations / (deviations + 1e-5)), 0], atol=1e-9)
    np.testing.assert_allclose(x_test[:, 0], (test[:, 0] - train[:, 0].mean(dtype=float)) / (deviations[0] + 1e-5))
    assert np.abs(x_test[:, 2]).max() < 1e-6


@pytest.mark.parametrize("per_class, dim", [(10, 6), (2, 30)])
def test_ridge_regression_predicts_as_scikit_learn(per_class, dim):
    train, labels, test = gaussian_features(per_class, dim=dim)
    reference = make_pipeline(*reference_inputs(), RidgeClassifier(alpha=1024, fit_intercept=False))
    assert (ridge(train, labels, test) == reference.fit(train.astype(float), labels).predict(test)).all()


@pytest.mark.parametrize("seed", [0, 3])  # with seed 3 two strengths are equally good
def test_the_strength_is_that_of_scikit_learns_grid_search(seed):
    train, labels, test = gaussian_features(per_class=12, dim=40, noise=2, seed=seed)
    pipeline = make_pipeline(*reference_inputs(), RidgeClassifier(fit_intercept=False))
    search = GridSearchCV(pipeline, {"ridgeclassifier__alpha": L2_GRID}, cv=StratifiedKFold(5), scoring=count_correct)
    scores = search.fit(train.astype(float), labels).cv_results_["mean_test_score"]
    expected = L2_GRID[scores >= scores.max() - 1e-9].max()
    assert choose_l2(train, labels) == expected
    pipeline.set_params(ridgeclassifier__alpha=expected).fit(train.astype(float), labels)
    assert (tuned_ridge(train, labels, test) == pipeline.predict(test)).all()


def count_correct(estimator, features, labels):
    return (estimator.predict(features) == labels).sum()


def test_the_linear_probe_is_logistic_regression_on_standardised_features():
    train, labels, test = gaussian_features()
    reference = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    predicted = linear_probe(train, labels, test)
    assert (predicted == reference.fit(train.astype(float), labels).predict(test.astype(float))).all()
    assert (predicted == labels).mean() > 0.3  # 0.25 by chance


def test_nearest_neighbours_vote_by_cosine_distance():
    train, labels, test = gaussian_features()
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train.astype(float), test.astype(float))]
    distances = 1 - unit[1] @ unit[0].T
    expected = []
    for row in distances:
        nearest = np.argsort(row)[:10]
        expected.append(np.bincount(labels[nearest], weights=1 / row[nearest]).argmax())
    assert (nearest_neighbours(train, labels, test) == expected).all()


def test_with_one_shot_the_nearest_example_decides():
    """With fewer examples than neighbours, too."""
    train, labels, test = gaussian_features(per_class=1, classes=3)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test)]
    assert nearest_neighbours(train, labels, test).tolist() == (unit[1] @ unit[0].T).argmax(axis=1).tolist()


# The script


def test_the_script_reports_the_accuracy_on_the_whole_test_set(tmp_path, run_main, monkeypatch):
    """One of its figures is that of scikit-learn's Ridge on the same images; the table has means and ranges."""
    make_shallow(monkeypatch)
    model, path = write_run(tmp_path / "run", {**DIGITS_RUN, "img_size": 8, "mean_std": "imagenet"})
    output = tmp_path / "results"
    given = ["--checkpoint", path, "--dataset", "digits", "--eval_batch_size", 360, "--output_dir", output]
    printed = run_main(few_shot, *given, "--shots", 5, 1, "--seeds", 0, 4)
    with open(output / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(row["classifier"], int(row["shots"]), int(row["seed"])): float(row["test_accuracy"]) for row in rows}
    names = ["ridge regression", "linear probe", "nearest neighbours"]
    expected = {(name, shots, number) for name in names for shots in (1, 5) for number in (0, 4)}
    assert found.keys() == expected | {("ridge regression, L2 by cross-validation", 5, number) for number in (0, 4)}

    train, test = (load_data("digits", split, mean_std="imagenet") for split in ("train", "test"))
    rows = draw_per_class(train.labels.numpy(), 5, seed=4)
    with torch.no_grad():
        model.head = torch.nn.Identity()
        features, test_features = (model(data.resized(data.images, (8, 8))).double().numpy() for data in (train, test))
    reference = make_pipeline(*reference_inputs(), RidgeClassifier(alpha=1024, fit_intercept=False))
    accuracy = reference.fit(features[rows], train.labels[rows]).score(test_features, test.labels)
    assert found["ridge regression", 5, 4] == pytest.approx(accuracy, abs=1.5 / 360)

    low, high = sorted(100 * found["linear probe", 1, number] for number in (0, 4))
    assert f"| linear probe | {(low + high) / 2:.1f} % ({low:.1f} to {high:.1f}) |" in printed
    assert "| classifier | 1 shot | 5 shots |" in printed
    assert "| ridge regression, L2 by cross-validation |  |" in printed
    assert (output / "table.md").read_text() in printed
    assert (output / "accuracy.png").exists()


def folder_run(tmp_path, image_folder):
    """The flags for a small model and the image folder."""
    _, path = write_run(tmp_path / "run", {**DIGITS_RUN, "model_type": "ViT-Nano_4", "dataset": "imagefolder"})
    flags = ["--checkpoint", path, "--dataset", "imagefolder", "--data_dir", image_folder, "--num_workers", 0]
    return [*flags, "--output_dir", tmp_path / "results"]


def test_the_results_name_the_validation_images(image_folder, tmp_path, run_main, monkeypatch):
    make_shallow(monkeypatch)
    flags = folder_run(tmp_path, image_folder)
    figures = []
    monkeypatch.setattr(few_shot, "save", lambda figure, path: figures.append(figure))
    printed = run_main(few_shot, *flags, "--shots", 1)
    assert "8 validation images" in printed
    assert (tmp_path / "results" / "table.csv").read_text().startswith("classifier,shots,seed,val_accuracy\n")
    assert figures[0].axes[0].get_ylabel() == "validation accuracy (%)"


def test_only_images_that_are_drawn_are_decoded(image_folder, tmp_path, run_main, monkeypatch, capsys):
    """An unreadable one is an error if it is drawn, also with --skip_broken: a class would have fewer shots."""
    make_shallow(monkeypatch)
    flags = [*folder_run(tmp_path, image_folder), "--seeds", 0]
    cats = draw_per_class(np.repeat([0, 1], 8), 8, seed=0)[:8]
    for cat in cats[2:]:
        truncate(image_folder / "train" / "cat" / f"{cat:03d}.png", 0.1)
    assert "| classifier | 2 shots |" in run_main(few_shot, *flags, "--shots", 2)
    with pytest.raises(SystemExit):
        run_main(few_shot, *flags, "--shots", 3)
    assert f"cat/{cats[2]:03d}.png is not a readable image" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_main(few_shot, *flags, "--shots", 4, "--skip_broken")
    assert "error: 2 of the training images that were drawn can't be read" in capsys.readouterr().err


def test_wrong_flags_are_errors_before_any_feature(image_folder, tmp_path, main_fails, monkeypatch):
    monkeypatch.setattr(few_shot, "extract_features", None)
    write_images(image_folder / "train" / "emu", [(20, 20)] * 3)
    flags = folder_run(tmp_path, image_folder)
    assert "class 'emu' has 3 training images, too few for --shots 5" in main_fails(few_shot, *flags, "--shots", 1, 5)
    assert "0 is not a whole number above 0" in main_fails(few_shot, *flags, "--shots", 0)
    assert "can't be created" in main_fails(few_shot, *flags, "--output_dir", __file__)


def test_the_figure_has_a_line_and_a_band_per_classifier():
    accuracies = {"ridge regression": {1: {0: 0.2, 1: 0.4}, 5: {0: 0.5, 1: 0.6}}, "tuned": {5: {0: 0.7, 1: 0.7}}}
    [axes] = plot_over_images(accuracies, "title", "test").axes
    first, second = axes.get_lines()
    assert (first.get_xdata().tolist(), second.get_xdata().tolist()) == ([1, 5], [5])
    assert first.get_ydata().tolist() == pytest.approx([30, 55])
    band = axes.collections[0].get_paths()[0].vertices
    assert sorted({round(y) for x, y in band if x == 1}) == [20, 40]
    assert axes.get_xscale() == "log"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "5"]
