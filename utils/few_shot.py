"""Few-shot classification: which training images are the shots, and simple classifiers of their features.

A classifier is a function of training features (n, d), their labels int64 (n,), each of 0, ..., classes - 1 among
them, and test features (m, d). It returns the predicted labels (m,).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier

from utils.errors import UserError

# The constants of big_vision/evaluators/fewshot_lsr.py.
STD_EPSILON = 1e-5
BIAS = 100.0  # a constant feature, so large that the L2 penalty on its weight hardly matters
L2 = 2.0**10

L2_GRID = 2.0 ** np.arange(-4, 21, 2)
FOLDS = 5
NEIGHBOURS = 10


def check_shots(labels, classes, shots):
    """Raises UserError if there is one class only, or if a class has fewer than `shots` images."""
    if len(classes) < 2:
        raise UserError(f"the data set has one class only, {classes[0]!r}; few-shot classification needs two")
    counts = np.bincount(labels, minlength=len(classes))
    smallest = counts.argmin()
    if counts[smallest] < shots:
        raise UserError(
            f"class {classes[smallest]!r} has {counts[smallest]} training images, too few for --shots {shots}; "
            f"give at most {counts[smallest]}"
        )


def standardise(train, test):
    """Both in float64, shifted and scaled by the mean and the standard deviation of the training features."""
    train, test = train.astype(np.float64), test.astype(np.float64)
    mean, std = train.mean(axis=0), train.std(axis=0) + STD_EPSILON
    return (train - mean) / std, (test - mean) / std


def ridge_inputs(train, test):
    """Both standardised, with the constant feature as the last column."""
    return (np.pad(x, ((0, 0), (0, 1)), constant_values=BIAS) for x in standardise(train, test))


def solve_ridge(x, targets, strengths):
    """The w (d, classes) that minimises |x w - targets|^2 + strength |w|^2, for each of `strengths`.

    One eigendecomposition serves all of them: that of x^T x, or with fewer examples than features of x x^T, by which
    w = x^T (x x^T + strength)^-1 targets.
    """
    few = x.shape[0] < x.shape[1]
    eigenvalues, vectors = np.linalg.eigh(x @ x.T if few else x.T @ x)
    left = x.T @ vectors if few else vectors
    right = vectors.T @ (targets if few else x.T @ targets)
    return [(left / (eigenvalues + strength)) @ right for strength in strengths]


def ridge_predictions(train, labels, test, strengths):
    """Predictions (m,) for each of `strengths`; the targets are 1 for the class of an example and -1 for the others."""
    x, x_test = ridge_inputs(train, test)
    targets = 2.0 * np.eye(labels.max() + 1)[labels] - 1.0
    return [(x_test @ w).argmax(axis=1) for w in solve_ridge(x, targets, strengths)]


def ridge(train, labels, test):
    """Ridge regression as in big_vision's few-shot evaluation."""
    return ridge_predictions(train, labels, test, [L2])[0]


def tuned_ridge(train, labels, test):
    """The same with the L2 strength of `choose_l2`."""
    return ridge_predictions(train, labels, test, [choose_l2(train, labels)])[0]


def choose_l2(train, labels):
    """The strength of L2_GRID with the best accuracy in cross-validation; of several, the largest."""
    correct = np.zeros(len(L2_GRID))
    for fitted, held_out in StratifiedKFold(FOLDS).split(train, labels):
        predictions = ridge_predictions(train[fitted], labels[fitted], train[held_out], L2_GRID)
        correct += [np.count_nonzero(predicted == labels[held_out]) for predicted in predictions]
    return L2_GRID[np.flatnonzero(correct == correct.max())[-1]]


def linear_probe(train, labels, test):
    """Multinomial logistic regression on standardised features, with scikit-learn's default L2 penalty."""
    x, x_test = standardise(train, test)
    return LogisticRegression(max_iter=1000).fit(x, labels).predict(x_test)


def nearest_neighbours(train, labels, test):
    """The NEIGHBOURS nearest training examples by cosine distance, with votes inverse to the distance."""
    count = min(NEIGHBOURS, len(train))
    return KNeighborsClassifier(count, weights="distance", metric="cosine").fit(train, labels).predict(test)


class Classifier(NamedTuple):
    """A row of the results."""

    predict: Callable
    min_shots: int = 1


CLASSIFIERS = {
    "ridge regression": Classifier(ridge),
    "ridge regression, L2 by cross-validation": Classifier(tuned_ridge, min_shots=FOLDS),
    "linear probe": Classifier(linear_probe),
    "nearest neighbours": Classifier(nearest_neighbours),
}
