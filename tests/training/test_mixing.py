"""Mixup and CutMix, tested with pixels that identify their crop."""

from typing import Any

import pytest
import torch

from fkd_ssl.training.mixing import Mixing, rectangle

B, P = 12, 20


def batch() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Returns crops whose pixels all equal the crop's number, and their one-hot targets."""
    images = (
        torch.arange(B, dtype=torch.uint8).view(B, 1, 1, 1).expand(B, 3, P, P).contiguous(memory_format=torch.channels_last)
    )
    return images, [torch.eye(B)]


def drawn(seed: int, mixup: float, cutmix: float) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    images, (targets,) = Mixing(mixup, cutmix)(*batch())
    return images, targets


class TestBoth:
    @pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
    @pytest.mark.parametrize("seed", range(8))
    def test_pixels_and_targets_are_mixed_alike(self, mixup: float, cutmix: float, seed: int) -> None:
        """The mean pixel of a crop is the mean of both crops' numbers, weighted by the shares in its target."""
        images, targets = drawn(seed, mixup, cutmix)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(B))
        torch.testing.assert_close(images.float().mean(dim=(1, 2, 3)), targets @ torch.arange(B, dtype=torch.float32))
        assert ((targets > 0).sum(dim=1) <= 2).all()

    @pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0)])
    def test_the_share_is_one_for_the_batch_and_every_crop_gives_and_takes(self, mixup: float, cutmix: float) -> None:
        _, targets = drawn(3, mixup, cutmix)
        torch.testing.assert_close(targets.sum(dim=0), torch.ones(B))
        own = targets.diag()
        assert own[own < 1].unique().numel() == 1
        assert (own < 1).sum() >= B - 3  # a permutation has few fixed points

    def test_a_seed_draws_the_same(self) -> None:
        for one, other in zip(drawn(5, 0.8, 1.0), drawn(5, 0.8, 1.0), strict=True):
            assert torch.equal(one, other)

    def test_chance_decides_between_them(self) -> None:
        kinds = {drawn(seed, 0.8, 1.0)[0].dtype for seed in range(8)}
        assert kinds == {torch.float32, torch.uint8}

    def test_several_teachers_targets_are_mixed_alike(self) -> None:
        images, _ = batch()
        torch.manual_seed(0)
        _, (a, b) = Mixing(0.8, 0.0)(images, [torch.eye(B), 2 * torch.eye(B)])
        assert torch.equal(b, 2 * a)

    def test_what_came_in_stays_as_it_is(self) -> None:
        images, (targets,) = batch()
        before = images.clone(), targets.clone()
        torch.manual_seed(1)
        Mixing(0.0, 1.0)(images, [targets])
        assert torch.equal(images, before[0])
        assert torch.equal(targets, before[1])


class TestCutMix:
    def test_it_is_one_rectangle_of_another_crop_in_the_same_place_in_all(self) -> None:
        images, targets = drawn(0, 0.0, 1.0)
        assert images.dtype == torch.uint8
        assert images.is_contiguous(memory_format=torch.channels_last)
        foreign = images != torch.arange(B, dtype=torch.uint8).view(B, 1, 1, 1)
        moved = foreign.flatten(1).any(dim=1)
        assert (foreign[moved] == foreign[moved][0]).all()
        rows, columns = foreign[moved][0, 0].any(dim=1), foreign[moved][0, 0].any(dim=0)
        assert torch.equal(foreign[moved][0, 0], rows[:, None] & columns[None, :])
        torch.testing.assert_close(targets.diag()[moved], 1 - foreign[moved].float().mean(dim=(1, 2, 3)))

    def test_the_rectangle_has_the_papers_area_away_from_the_edges(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch, "randint", lambda high, _: torch.tensor(high // 2))
        assert rectangle(100, 200, 0.75) == (25, 75, 50, 150)  # a quarter of the area

    def test_and_is_cut_at_the_edges(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch, "randint", lambda high, _: torch.tensor(0))
        assert rectangle(100, 200, 0.75) == (0, 25, 0, 50)

    @pytest.mark.parametrize("share", [0.0, 1.0])
    def test_all_and_nothing(self, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
        fixed: Any = lambda high, _: torch.tensor(high // 2)  # noqa: E731
        monkeypatch.setattr(torch, "randint", fixed)
        top, bottom, left, right = rectangle(20, 20, share)
        assert (bottom - top) * (right - left) == (1 - share) * 400
