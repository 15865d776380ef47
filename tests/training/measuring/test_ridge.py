"""The leave-one-out error of ridge regression against one fit per image."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge

from bnfinetune.training.measuring.ridge import leave_one_out


@pytest.mark.parametrize(("images", "width"), [(12, 5), (12, 40)])
def test_equals_one_fit_for_every_image(images, width):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(images, width)) * rng.uniform(0.1, 10, width) + 3
    labels = F.one_hot(torch.arange(images) % 3)
    x = (features - features.mean(0)) / features.std(0, ddof=1)
    y = labels.double().numpy() - labels.double().numpy().mean(0)
    for strength in (1.0, 30.0):
        left = []
        for out in range(images):
            others = np.arange(images) != out
            # the centre stays that of all images, as the leverage 1 / n of the intercept has it
            fit = Ridge(alpha=strength).fit(x[others], y[others])
            left.append(y[out] - fit.predict(x[out : out + 1])[0])
        expected = np.square(left).mean() / np.square(y).mean()
        found = leave_one_out(torch.from_numpy(features), labels, [strength])
        assert found.error == pytest.approx(expected, rel=1e-6)
        np.testing.assert_allclose(found.predictions, labels.numpy() - np.array(left), rtol=1e-6)


def test_tells_features_that_know_the_classes_from_those_that_do_not():
    generator = torch.Generator().manual_seed(0)
    labels = F.one_hot(torch.arange(60) % 4)
    noise = torch.randn(60, 20, generator=generator)
    assert leave_one_out(noise, labels).error > 0.9
    assert leave_one_out(torch.cat([noise, 5.0 * labels], 1), labels).error < 0.2
