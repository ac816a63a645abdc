import numpy as np
import pytest

from components.datasets.synthetic_garments import OUTLINES, draw


@pytest.mark.parametrize("name", OUTLINES)
def test_drawing_is_an_image_that_the_generator_decides(name):
    image = draw(np.random.default_rng(3), name)
    assert image.shape == (28, 28, 1)
    assert image.dtype == np.uint8
    assert 50 < np.count_nonzero(image > 60) < 600
    np.testing.assert_array_equal(image, draw(np.random.default_rng(3), name))
    assert not np.array_equal(image, draw(np.random.default_rng(4), name))


def test_classes_are_fashion_mnists(synthetic_store, refs):
    from ridgeline.artifacts.dataset import Dataset

    facts = synthetic_store.open(refs["ingest"], Dataset).facts
    assert facts.class_names == tuple(OUTLINES)
    assert facts.class_names[0] == "T-shirt/top"
    assert facts.class_names[9] == "Ankle boot"
    assert facts.synthetic
