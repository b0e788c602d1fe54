"""Ten classes of small noisy pictures, and a recipe that splits a residual network by groups of them in a second."""

import numpy as np

from moeify.data.images import Images
from moeify.recipe.config import RunConfig
from moeify.tasks.images import ImagesTask

GROUPS = {"low": [0, 1, 2], "middle": [3, 4], "high": [5, 6, 7], "top": [8, 9]}
CONFIG = {
    "name": "pictures",
    "data": {"kind": "images", "source": "mnist", "categories": GROUPS, "validation": 0.2},
    "model": {"kind": "resnet", "width": 6, "blocks": 1, "stages": 2},
    "training": {"steps": 24, "rows": 20, "learning_rate": 0.02},
    "attribution": {"rows": 16, "rows_at_once": 32},
    "partition": {"multiple": 1, "min_units": 1},
    "rounds": [{"train": 6, "recover": 5, "separation": 0.25}, {"train": 3, "recover": 5, "separation": 0.35}],
    "controls": ["random", "told"],
    "evaluation": {"validation_rows": 12, "test_rows": 24, "rows_at_once": 48},
    "checkpoints": {"every": 8, "keep": 2},
    "tracking": {"every": 5},
}


def pictures_config(**changes: object) -> RunConfig:
    return RunConfig.model_validate({**CONFIG, **changes})


def drawn(each: int, seed: int, side: int = 8) -> Images:
    """So many pictures of each class: a wave of its own, and noise."""
    random = np.random.default_rng(seed)
    labels = np.arange(10 * each) % 10
    y, x = np.mgrid[:side, :side]
    angle = labels[:, None, None] * np.pi / 10
    waves = 128 + 80 * np.sin((x * np.cos(angle) + y * np.sin(angle)) * (1 + labels[:, None, None] % 3) / 2)
    noisy = waves + random.normal(0, 40, waves.shape)
    return Images(noisy.clip(0, 255).astype(np.uint8)[:, None], labels.astype(np.int64))


def pictures(config: RunConfig) -> ImagesTask:
    return ImagesTask(config, drawn(40, 0), drawn(20, 1))
