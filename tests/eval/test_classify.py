"""Top-1 and top-5 of a classifier against a sort of each image's scores, and what is refused."""

from copy import copy

import numpy as np
import pytest

from fkd_ssl.errors import RequestError
from fkd_ssl.eval import classify


@pytest.mark.parametrize("classes", [2, 3, 12])
def test_accuracy_is_that_of_a_stable_sort(make_set, monkeypatch: pytest.MonkeyPatch, classes: int) -> None:
    generator = np.random.default_rng(0)
    found = make_set("val", 10)
    images = copy(found)
    images.labels, images.classes = generator.integers(0, classes, len(found)), [*map(str, range(classes))]
    scores = generator.integers(0, 4, (len(images), classes)).astype(np.float32)  # many are equal
    monkeypatch.setattr(classify, "extract", lambda *args, **options: (scores, images.labels))
    got = classify.evaluate(lambda pixels: pixels, images, pixels=32, classes=classes)
    ranked = [sorted(range(classes), key=lambda k, row=row: (-row[k], k)) for row in scores.tolist()]
    right = [label in order[:5] for label, order in zip(images.labels.tolist(), ranked, strict=True)]
    assert got["top5"] == pytest.approx(100 * np.mean(right))
    assert got["correct"].tolist() == [order[0] == label for label, order in zip(images.labels.tolist(), ranked, strict=True)]
    assert got["top1"] == pytest.approx(100 * np.mean(got["correct"]))


def test_what_is_refused(make_set) -> None:
    images = make_set("val")
    with pytest.raises(RequestError, match="has 4 class folders, but the classifier has 5 classes"):
        classify.evaluate(lambda pixels: pixels, images, pixels=32, classes=5)
    images.labels -= 1
    with pytest.raises(RequestError, match="images are outside any class folder"):
        classify.evaluate(lambda pixels: pixels, images, pixels=32, classes=4)
