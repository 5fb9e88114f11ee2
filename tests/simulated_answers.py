"""Right and wrong answers of models whose true accuracy is known."""

import numpy as np


def solved(rng, shape, accuracy, correlation):
    """Chance of each problem to be answered right: beta-distributed with that intraclass correlation."""
    if correlation == 0:
        return np.full(shape, accuracy)
    total = (1 - correlation) / correlation
    return rng.beta(accuracy * total, (1 - accuracy) * total, size=shape)


def answers(rng, chances, samples):
    return (rng.random((*chances.shape, samples)) < chances[..., None]).astype(np.int8)


def pair(problems, samples, shift, seed):
    """Answers of two models to the same problems, one better by `shift`."""
    rng = np.random.default_rng(seed)
    chances = solved(rng, problems, 0.4, 0.3) * (1 - shift)
    return answers(rng, chances + shift, samples[0]), answers(rng, chances, samples[1])
