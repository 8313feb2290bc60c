"""What trials of Ray Tune find by its name, and so does a checkpoint's config."""


def score(*, algorithm, result, **_):
    """The higher learning rate is the better one."""
    result["score"] = float(algorithm.config.lr)
