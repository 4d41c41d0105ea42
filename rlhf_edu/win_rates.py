"""Win rates: raw, with an interval, and controlled for length by the regression of AlpacaEval 2.

A preference is 1 where the model won a comparison, 0 where the baseline did, 0.5 for a tie; a judge's probability
in between is as good. Every column has one entry a prompt, in the same order; win rates are in percent.
"""

from collections.abc import Callable

import numpy as np
from scipy.special import expit

from .errors import UserError, numbers
from .training import rng

LENGTH, DIFFICULTY, BIAS = range(3)  # columns of the regression, and the order of its weights


def win_rate(preferences) -> float:
    """Percent of comparisons won: 1 a win, 0 a loss, 0.5 a tie."""
    return 100 * _preferences(preferences).mean().item()


def length_controlled_win_rate(preferences, model_lengths, baseline_lengths, difficulty=None) -> float:
    """The win rate that the model would have if its responses were as long as the baseline's.

    preferences, model_lengths, baseline_lengths: (prompts,), lengths in characters (AlpacaEval) or tokens, the same
    for both. difficulty: (prompts,) how much easier than the average prompt each is for all models (AlpacaEval
    publishes it, `prompt_difficulty` estimates it); None leaves the term out.
    Dubois et al. 2024, eq. 1: a logistic regression of the preferences, predicted at length difference 0.
    """
    preferences = _preferences(preferences)
    features = length_features(model_lengths, baseline_lengths, difficulty)
    if len(features) != len(preferences):
        raise UserError(
            f"{len(preferences)} preferences and {len(features)} lengths: every column needs one entry a prompt"
        )
    return predicted_win_rate(fit_logistic(preferences, features), features[:, DIFFICULTY])


def length_features(model_lengths, baseline_lengths, difficulty=None) -> np.ndarray:
    """(prompts, 3): tanh of the standardized length difference, the prompt's difficulty, 1.

    The difference is baseline - model, so that a judge who likes length gives a NEGATIVE weight. It is divided by
    its standard deviation (ddof 1) but not centred: 0 must mean "equally long". tanh: twice as long as very long
    is not twice as good.
    """
    columns = {"model lengths": model_lengths, "baseline lengths": baseline_lengths, "difficulty": difficulty}
    if difficulty is None:
        columns["difficulty"] = np.zeros_like(numbers("model lengths", model_lengths))
    columns = {name: numbers(name, column) for name, column in columns.items()}
    sizes = {column.shape for column in columns.values()}
    if len(sizes) > 1 or columns["difficulty"].ndim != 1:
        told = ", ".join(f"{c.size} {name}" for name, c in columns.items())
        raise UserError(f"{told}: every column needs one entry a prompt")
    difference = columns["baseline lengths"] - columns["model lengths"]
    if len(difference) < 2:
        raise UserError("a length-controlled win rate needs two prompts or more, better hundreds")
    spread = difference.std(ddof=1)
    if spread == 0 and difference[0] != 0:
        raise UserError(
            f"all {len(difference)} pairs differ in length by the same {abs(difference[0]):g}, so the effect of "
            "length cannot be told from the model's: compare responses of several lengths"
        )
    length = np.tanh(difference / spread) if spread else np.zeros_like(difference)
    return np.stack([length, columns["difficulty"], np.ones_like(length)], axis=1)


def fit_logistic(preferences, features, *, ridge: float = 1.0, steps: int = 100) -> np.ndarray:
    """Weights w (features,) that minimize cross-entropy(preferences, sigmoid(features @ w)) + ridge/2 |w|^2.

    preferences (rows,) may be probabilities; features (rows, features). Newton's method: the loss is convex, and
    the penalty keeps the weights finite where one side won everything. ridge 1 is scikit-learn's default C = 1.
    AlpacaEval's own fit differs: an L1 penalty chosen by cross-validation, and a few made-up rows of models that
    were told to be long or short.
    """
    x, p = numbers("features", features), numbers("preferences", preferences)
    if x.ndim != 2 or p.shape != x.shape[:1] or not 0 <= ridge < np.inf:
        raise UserError(
            f"preferences {p.shape}, features {x.shape}, ridge {ridge}: give (rows,), (rows, features) and 0 or more"
        )
    weights = np.zeros(x.shape[1])
    loss = _penalized(weights, x, p, ridge)
    for _ in range(steps):
        q = expit(x @ weights)
        gradient = x.T @ (q - p) + ridge * weights
        curvature = (x * (q * (1 - q))[:, None]).T @ x + ridge * np.eye(len(weights))
        try:
            step = np.linalg.solve(curvature, gradient)
        except np.linalg.LinAlgError as error:
            raise UserError(
                f"{len(x)} rows do not determine {len(weights)} weights without a penalty: take a ridge above 0"
            ) from error
        while (new := _penalized(weights - step, x, p, ridge)) > loss and np.abs(step).max() > 1e-12:
            step = step / 2  # a full step can overshoot
        weights, loss = weights - step, new
        if np.abs(step).max() < 1e-10:
            break
    return weights


def predicted_win_rate(weights, difficulty) -> float:
    """Percent: the mean over prompts of sigmoid(bias + weight * difficulty), that is, at length difference 0.

    weights: length, difficulty, bias. The mean is taken after the sigmoid, which is why difficulty matters.
    """
    weights = np.asarray(weights, dtype=float)
    return (
        100 * expit(weights[BIAS] + weights[DIFFICULTY] * np.asarray(difficulty, dtype=float)).mean().item()
    )


def prompt_difficulty(preferences, *, ridge: float = 1.0) -> np.ndarray:
    """(prompts,) how much easier than the average each prompt is, from preferences (models, prompts).

    One regression of all models against the same baseline: logit = strength of the model + ease of the prompt, each
    prompt's pulled towards 0. With few models it is noise: use five or more.
    """
    table = numbers("preferences", preferences)
    if table.ndim != 2 or not table.size or not 0 < ridge < np.inf:
        raise UserError(
            f"prompt_difficulty needs a table of preferences, one row a model and one column a prompt, and a ridge "
            f"above 0: these have shape {table.shape} and ridge {ridge}"
        )
    _preferences(table)
    strength, ease = np.zeros((len(table), 1)), np.zeros((1, table.shape[1]))
    for _ in range(200):  # Newton's step for all strengths, then for all prompts, and again
        moved = 0.0
        for effect, axis in ((strength, 1), (ease, 0)):
            q = expit(strength + ease)
            gradient = (q - table).sum(axis, keepdims=True) + ridge * effect
            step = gradient / ((q * (1 - q)).sum(axis, keepdims=True) + ridge)
            effect -= step
            moved = max(moved, float(np.abs(step).max()))
        if moved < 1e-9:
            break
    return (ease - ease.mean())[0]


def bootstrap(
    statistic: Callable[..., float], *columns, resamples: int = 500, seed: int = 0
) -> tuple[float, float, float]:
    """(value, low, high): statistic(*columns) and its 95 % interval over resampled prompts.

    columns: arrays whose first dimension is the prompts; several judgments of one prompt go into one row
    (prompts, judgments), since they are not independent.
    """
    arrays = [numbers("a column of a bootstrap", c) for c in columns]
    entries = [a.shape[0] if a.ndim else 0 for a in arrays]
    prompts = entries[0] if entries else 0
    if prompts < 2 or set(entries) != {prompts}:
        raise UserError(
            f"a bootstrap over prompts needs columns of one length, two prompts or more: these have "
            f"{', '.join(map(str, entries)) or 'no'} entries"
        )
    draws = rng(seed, 41).integers(prompts, size=(resamples, prompts))
    values = [statistic(*(a[rows] for a in arrays)) for rows in draws]
    return (float(statistic(*arrays)), *(float(v) for v in np.quantile(values, [0.025, 0.975])))


def _preferences(values) -> np.ndarray:
    try:
        values = np.asarray(values, dtype=float)
    except (TypeError, ValueError):
        values = np.array([])
    if not values.ndim or not values.size or not ((values >= 0) & (values <= 1)).all():
        raise UserError("preferences must be numbers from 0 (lost) to 1 (won), at least one")
    return values


def _penalized(weights, x, p, ridge: float) -> float:
    scores = x @ weights
    return float((np.logaddexp(0, scores) - p * scores).sum() + ridge / 2 * weights @ weights)
