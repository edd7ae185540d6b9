"""SwAV against its algorithm written out in float64, and its checkpoint against the teacher that reads it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fkd_ssl.crops import RECIPES
from fkd_ssl.images import scan
from fkd_ssl.pretraining.swav import SwAV
from fkd_ssl.store import open_store
from fkd_ssl.store.write.precompute import precompute
from fkd_ssl.teachers import load_teacher

MEAN, STD = (0.485, 0.456, 0.406), (0.228, 0.224, 0.225)


def assignment(scores: Tensor, epsilon: float) -> Tensor:
    """Sinkhorn-Knopp in three iterations (arXiv 2006.09882, eq. 5): [B, K], each row a distribution."""
    q = torch.exp(scores / epsilon)
    for _ in range(3):
        q = q / q.sum(dim=0, keepdim=True)  # each prototype has the same share of the batch
        q = q / q.sum(dim=1, keepdim=True)  # each crop is one crop
    return q


def swapped(views: list[Tensor], earlier: list[Tensor] | None, temperature: float, epsilon: float) -> Tensor:
    """The multi-crop loss of scores [B, K] of each view, the first two large (eq. 6), written out."""
    losses = []
    for large in range(2):
        scores = views[large] if earlier is None else torch.cat([views[large], earlier[large]])
        q = assignment(scores.detach(), epsilon)[: len(views[large])]
        losses += [-(q * F.log_softmax(views[v] / temperature, 1)).sum(1).mean() for v in range(len(views)) if v != large]
    return torch.stack(losses).mean()


def batch_of(images: int, small: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"images": (2 * images, 3, 32, 32), "small_images": (small * images, 3, 16, 16)}
    return {key: torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for key, shape in shapes.items()}


def scores_of(module: SwAV, batch: dict[str, Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Scores of each view, large ones first, embeddings of the large crops, and unit prototypes, from the module's weights."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    features = torch.cat([module.backbone((part / 255 - mean) / std) for part in batch.values()])
    hidden = F.linear(features, module.projection_head.layers[0].weight)
    hidden = (hidden - hidden.mean(dim=0)) / (hidden.var(dim=0, unbiased=False) + 1e-5).sqrt()
    last = module.projection_head.layers[3]
    z = F.normalize(F.linear(hidden.clamp(min=0), last.weight, last.bias), dim=1)
    prototypes = F.normalize(module.prototypes.heads[0].weight, dim=1)
    count, small = len(batch["images"]), module.small_crops
    scores = z @ prototypes.T
    views = [*(scores[:count][k::2] for k in range(2)), *(scores[count:][k::small] for k in range(small))]
    return views, z[:count], prototypes


@pytest.mark.parametrize("small", [0, 3])
def test_the_step_is_swavs_algorithm(small: int, make_config: Any) -> None:
    torch.manual_seed(0)
    module = SwAV(make_config(method="swav", small_crops=small, queue=0, frozen_epochs=0, epsilon=0.04), 16)
    batch = batch_of(8, small)
    if not small:
        del batch["small_images"]
    views, _, _ = scores_of(module, batch)
    expected = swapped(views, None, 0.1, 0.04)
    weights = [module.backbone.conv1.weight, module.projection_head.layers[3].weight]
    gradients = torch.autograd.grad(expected, weights)
    loss = module.training_step(batch, 0)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    loss.backward()
    for weight, gradient in zip(weights, gradients, strict=True):
        assert gradient.abs().max() > 1e-5
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-2, atol=1e-4)
    assert module.prototypes.heads[0].weight.grad.abs().sum() > 0
    torch.testing.assert_close(module.prototypes.heads[0].weight.detach().norm(dim=1), torch.ones(12))


def test_the_queue_fills_from_its_epoch_on_and_counts_once_it_is_full(make_config: Any, monkeypatch: Any) -> None:
    torch.manual_seed(0)
    module = SwAV(make_config(method="swav", queue=16, queue_epoch=2), 32)  # 4 steps an epoch
    assert (module.queue, module.queue_step) == (16, 8)
    batch = batch_of(8, 2)
    embeddings: list[Tensor] = []
    for step in range(7, 11):
        monkeypatch.setattr(SwAV, "global_step", step)
        views, z, prototypes = scores_of(module, batch)
        earlier = None
        if step >= 10:  # two batches of eight fill the queue at steps 8 and 9
            earlier = [torch.cat([e[k::2] for e in embeddings[-2:]]) @ prototypes.T for k in range(2)]
        with torch.no_grad():
            loss = module.training_step(batch, 0)
        torch.testing.assert_close(loss, swapped(views, earlier, 0.1, 0.05).detach(), rtol=1e-4, atol=1e-5)
        if step >= 8:
            embeddings.append(z.detach())
        with torch.no_grad():
            module.projection_head.layers[3].weight.add_(0.02)  # so that the next embeddings differ


def test_prototypes_stay_as_they_were_drawn_at_first(make_config: Any, monkeypatch: Any) -> None:
    torch.manual_seed(0)
    module = SwAV(make_config(method="swav", frozen_epochs=1.5), 16)
    for step, moves in ((0, False), (2, False), (3, True)):
        monkeypatch.setattr(SwAV, "global_step", step)
        module.zero_grad()
        module.training_step(batch_of(8, 2), 0).backward()
        assert (module.prototypes.heads[0].weight.grad is not None) == moves
        assert module.backbone.conv1.weight.grad is not None


def test_the_checkpoint_is_swavs_and_loads_as_a_teacher(trained: Any, make_config: Any) -> None:
    saved = torch.load(trained("swav"), weights_only=True)
    assert (saved["epoch"], saved["arch"]) == (3, "resnet18")
    state = {key.removeprefix("module."): value for key, value in saved["state_dict"].items()}
    assert all(key.startswith("module.") for key in saved["state_dict"])
    others = {key for key in state if key.startswith(("projection_head", "prototypes"))}
    norm = {f"projection_head.1.{key}" for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    layers = {f"projection_head.{layer}.{key}" for layer in (0, 3) for key in ("weight", "bias")}
    assert others == norm | layers | {"prototypes.weight"}
    assert state["prototypes.weight"].shape == (12, 32)
    teacher = load_teacher("swav", checkpoint=trained("swav"))
    assert teacher.info.network == "resnet18, MLP 512-2048-32 with BatchNorm, 12 prototypes"
    module = SwAV(make_config(method="swav"), 16).eval()
    module.backbone.load_state_dict({key: value for key, value in state.items() if key not in others})
    head = {key.removeprefix("projection_head."): value for key, value in state.items() if key.startswith("projection_head.")}
    assert not head.pop("0.bias").any()
    module.projection_head.layers.load_state_dict(head)
    images = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = F.normalize(module.projection_head(module.backbone(module.normalised(images))), dim=1)
    torch.testing.assert_close(teacher.embed(images).clone(), expected, rtol=1e-4, atol=1e-5)


def test_a_store_with_prototypes_can_be_made_of_it(trained: Any, folder: Path, tmp_path: Path) -> None:
    teacher = load_teacher("swav", checkpoint=trained("swav"))
    precompute(scan(folder / "images"), tmp_path / "store", teacher, crops=2, recipe=RECIPES["swav"], pixels=16, codec="Flat")
    column = open_store(tmp_path / "store").column("swav")
    prototypes = torch.load(trained("swav"), weights_only=True)["state_dict"]["module.prototypes.weight"]
    assert list(column.info.arrays) == ["prototypes"]
    np.testing.assert_array_equal(column.info.arrays["prototypes"], prototypes.numpy())
