"""Targets that come from labels, against loops written out."""

import pytest
import torch

from fkd_ssl.training.targets import CalibratedTargets, LabelTargets, OnlineTargets, stored_targets

BATCH = {"images": torch.zeros(6, 3, 8, 8, dtype=torch.uint8), "labels": torch.tensor([2, 0, 1])}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_labels_are_smoothed_and_repeated_for_the_crops_of_an_image(smoothing: float) -> None:
    (found,) = LabelTargets(4, smoothing)(BATCH)
    expected = [[smoothing / 4 + (1 - smoothing) * (k == label) for k in range(4)] for label in (2, 2, 0, 0, 1, 1)]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert found.dtype == torch.float32


def test_smoothing_is_torchs() -> None:
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    (target,) = LabelTargets(4, 0.1)(BATCH)
    ours = -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()
    theirs = torch.nn.functional.cross_entropy(logits, BATCH["labels"].repeat_interleave(2), label_smoothing=0.1)
    torch.testing.assert_close(ours, theirs)


def test_doubtful_targets_become_smoothed_labels() -> None:
    sure, doubtful = [0.7, 0.1, 0.1, 0.1], [0.4, 0.3, 0.2, 0.1]
    targets = torch.tensor([sure, doubtful, sure, sure, doubtful, [0.5, 0.5, 0.0, 0.0]])
    calibrated = CalibratedTargets(stored_targets, 0.5, LabelTargets(4, 0.2))
    (found,) = calibrated({**BATCH, "targets": targets})
    expected = targets.clone()
    expected[1] = torch.tensor([0.05, 0.05, 0.85, 0.05])
    expected[4] = torch.tensor([0.05, 0.85, 0.05, 0.05])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(6))
    assert torch.equal(targets[1], torch.tensor(doubtful))  # the batch's targets are not changed


def test_every_teachers_targets_are_calibrated() -> None:
    targets = {"a": torch.full((6, 4), 0.25), "b": torch.eye(4)[[0, 1, 2, 3, 0, 1]]}
    a, b = CalibratedTargets(stored_targets, 0.5, LabelTargets(4))({**BATCH, "targets": targets})
    assert torch.equal(a, torch.eye(4)[[2, 2, 0, 0, 1, 1]])
    assert torch.equal(b, targets["b"])


def test_a_function_that_is_given_twice_runs_once() -> None:
    seen: list[int] = []

    class Teacher:
        def embed(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(len(images))
            return images.float().mean(dim=(2, 3))

    def ones(images: torch.Tensor) -> torch.Tensor:
        seen.append(-len(images))
        return torch.ones(len(images), 2)

    teacher = Teacher()
    one, other, two, more = OnlineTargets(ones, teacher.embed, ones, teacher.embed)(BATCH)
    assert sorted(seen) == [-6, 6]
    assert torch.equal(one, two)
    assert torch.equal(other, more)
    assert one.data_ptr() != two.data_ptr()  # an objective may change its own
    assert (one.shape, other.shape) == ((6, 2), (6, 3))
