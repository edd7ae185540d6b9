import hashlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightly.utils.benchmarking import LinearClassifier
from torch.nn import functional

from fkd_ssl import crops, images
from fkd_ssl.errors import FkdError, ImageError, RequestError
from fkd_ssl.eval import features, linear, probe


def digest(module: torch.nn.Module) -> str:
    sha = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        sha.update(key.encode() + value.numpy().tobytes())
    return sha.hexdigest()


def run(model, train, val, **options):
    return linear.evaluate(
        **{
            "protocol": "moco",
            "model": model,
            "train": train,
            "val": val,
            "pixels": 16,
            "workers": 0,
            "progress": False,
            **options,
        }
    )


def test_it_learns_and_leaves_the_backbone_alone(make_set, backbone) -> None:
    train, val = make_set("train", per_class=8, seed=0), make_set("val", per_class=4, seed=1)
    backbone.train()
    before = digest(backbone)
    result = run(backbone, train, val, epochs=10, batch_size=8)
    assert result["top1"] == 100
    assert result["history"][-1]["loss"] < 0.5 * result["history"][0]["loss"]
    assert digest(backbone) == before
    assert backbone.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in backbone.parameters())
    assert result["correct"].dtype == np.bool_
    assert result["correct"].shape == (16,)
    assert result["best_top1"] == max(row["top1"] for row in result["history"])
    assert result["history"][result["best_epoch"] - 1]["top1"] == result["best_top1"]
    assert [row["epoch"] for row in result["history"]] == list(range(1, 11))
    assert result["notes"] == [
        "top5 is 100 by definition: there are 4 classes",
        "departs from the moco protocol: epochs 10 instead of 100",
        "departs from the moco protocol: batch_size 8 instead of 256",
    ]
    assert {key: result[key] for key in ("protocol", "lr", "momentum", "weight_decay", "feature_dim", "n_train")} == {
        "protocol": "moco",
        "lr": 30.0,
        "momentum": 0.9,
        "weight_decay": 0.0,
        "feature_dim": 16,
        "n_train": 32,
    }
    assert "1911.05722" in result["source"]


def test_it_is_sgd_on_the_recipes_crops_written_out_by_hand(make_set, backbone) -> None:
    """Three epochs of SGD with momentum in plain tensors on crops drawn here, compared with the probe's losses and weights."""
    train, val = make_set("train", per_class=3, seed=0), make_set("val", per_class=1, seed=1)
    backbone.eval()
    got = run(backbone, train, val, epochs=3, batch_size=5, lr=0.5, seed=4)

    weight = torch.empty(4, 16).normal_(0, 0.01, generator=torch.Generator().manual_seed(4))
    bias = torch.zeros(4)
    speed = [torch.zeros_like(weight), torch.zeros_like(bias)]
    order = torch.Generator().manual_seed(4)
    for epoch, rate in enumerate([0.5, 0.5, 0.005]):  # the milestones 60 and 80 of 100 both become 2 of 3
        losses = []
        for rows in torch.randperm(12, generator=order).split(5):
            views = []
            for row in rows.tolist():
                picture = images.read_image(train.file(row))
                key = crops.image_key(4, train.names[row])
                record = crops.draw(crops.RECIPES["fkd"], key, *picture.shape[:2], epoch, 1)
                views.append(torch.from_numpy(crops.replay(picture, record, 16)[0]))
            with torch.no_grad():
                x = backbone(torch.stack(views))
            target = functional.one_hot(torch.from_numpy(train.labels)[rows], 4).float()
            logits = x @ weight.T + bias
            losses.append(len(rows) * float(-(target * logits.log_softmax(1)).sum(1).mean()))
            error = (logits.softmax(1) - target) / len(rows)
            speed = [0.9 * speed[0] + error.T @ x, 0.9 * speed[1] + error.sum(0)]
            weight, bias = weight - rate * speed[0], bias - rate * speed[1]
        assert got["history"][epoch]["loss"] == pytest.approx(sum(losses) / 12, rel=1e-4)
        assert got["history"][epoch]["lr"] == pytest.approx(rate)
    values, _ = features.extract(backbone, val, pixels=16, workers=0, progress=False)
    predicted = (torch.from_numpy(values) @ weight.T + bias).argmax(1).numpy()
    np.testing.assert_array_equal(got["correct"], predicted == features.match_classes(train, val))


def test_the_same_seed_gives_the_same_probe_with_any_workers(make_set, backbone) -> None:
    train, val = make_set("train", per_class=3, seed=0), make_set("val", per_class=2, seed=1)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = run(backbone, train, val, epochs=2, batch_size=4, lr=1.0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    again = run(backbone, train, val, epochs=2, batch_size=4, lr=1.0, workers=2)
    assert again["history"] == first["history"]
    assert run(backbone, train, val, epochs=2, batch_size=4, lr=1.0, seed=1)["history"] != first["history"]


def test_a_callable_in_inference_mode_will_do(make_set) -> None:
    train, val = make_set("train", per_class=2, seed=0), make_set("val", per_class=1, seed=1)

    @torch.inference_mode()
    def colour(pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float().mean(dim=(2, 3)) / 255 - 0.5

    assert run(colour, train, val, epochs=20, batch_size=8)["top1"] == 100


def test_moco_is_the_published_protocol() -> None:
    moco = linear.PROTOCOLS["moco"]
    assert (moco.epochs, moco.batch_size, moco.lr, moco.momentum, moco.weight_decay) == (100, 256, 30.0, 0.9, 0.0)
    rates = [moco.rate(epoch) for epoch in range(100)]
    np.testing.assert_allclose(rates, [30.0] * 60 + [3.0] * 20 + [0.3] * 20)
    assert linear.RECIPE.scale == (0.08, 1.0)
    assert linear.RECIPE.ratio == (3 / 4, 4 / 3)
    assert (linear.RECIPE.flip, linear.RECIPE.jitter, linear.RECIPE.grey, linear.RECIPE.blur) == (0.5, 0.0, 0.0, 0.0)
    layer = probe.initial_layer(512, 400, seed=0)
    assert float(layer.weight.detach().std()) == pytest.approx(0.01, rel=0.02)
    assert float(layer.weight.detach().mean()) == pytest.approx(0, abs=1e-4)
    assert not layer.bias.any()


def test_swav_is_the_published_protocol() -> None:
    swav = linear.PROTOCOLS["swav"]
    assert (swav.epochs, swav.batch_size, swav.lr, swav.momentum, swav.weight_decay) == (100, 256, 0.3, 0.9, 1e-6)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    for epoch in range(100):
        assert swav.rate(epoch) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        scheduler.step()


def test_progress_goes_to_standard_error(make_set, backbone, capfd) -> None:
    train, val = make_set("train", per_class=1, seed=0), make_set("val", per_class=1, seed=1)
    run(backbone, train, val, epochs=2, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "moco epoch 2/2: lr 3, loss" in err
    assert "val top1" in err


def test_wrong_requests_are_named(make_set, backbone) -> None:
    train, val = make_set("train", per_class=2, classes=("blue", "red")), make_set("val", per_class=1)
    with pytest.raises(RequestError, match=r"no linear protocol 'mocco'.*; did you mean moco\?"):
        run(backbone, train, train, protocol="mocco")
    with pytest.raises(RequestError, match=r"no linear protocol 'x' \(known: moco, swav, simsiam, simclr\)"):
        run(backbone, train, train, protocol="x")
    with pytest.raises(RequestError, match="epochs must be at least 1, got 0"):
        run(backbone, train, train, epochs=0)
    with pytest.raises(RequestError, match="batch_size must be at least 1, got -4"):
        run(backbone, train, train, batch_size=-4)
    with pytest.raises(RequestError, match="lr must be positive, got nan"):
        run(backbone, train, train, lr=float("nan"))
    with pytest.raises(RequestError, match=r"have no image in \S+: 'green', 'sand'"):
        run(backbone, train, val)
    with pytest.raises(FkdError, match="returned a tuple of 1: expected one tensor"):
        run(lambda pixels: (pixels,), train, train)
    with pytest.raises(FkdError, match=r"diverged in epoch \d+: loss nan, learning rate 3e\+38, features of mean length"):
        run(lambda pixels: pixels.flatten(1).float() * 1e4, train, train, lr=3e38, epochs=3, batch_size=2)


def test_a_backbone_whose_features_change_size_is_named(make_set) -> None:
    train = make_set("train", per_class=1)
    sizes = iter([8, 9])
    with pytest.raises(FkdError, match="returned 8 dimensions, then 9"):
        run(lambda pixels: pixels.flatten(1)[:, : next(sizes)].float(), train, train, epochs=1)


def test_simsiam_is_the_published_protocol() -> None:
    simsiam = linear.PROTOCOLS["simsiam"]
    assert (simsiam.epochs, simsiam.batch_size, simsiam.lr, simsiam.momentum, simsiam.weight_decay) == (90, 4096, 1.6, 0.9, 0)
    assert (simsiam.lars, probe.TRUST, simsiam.small_start) == (True, 0.001, True)
    expected = [1.6 * 0.5 * (1 + np.cos(np.pi * epoch / 90)) for epoch in range(90)]  # its adjust_learning_rate
    np.testing.assert_allclose([simsiam.rate_at(step, 90 * 7) for step in range(0, 90 * 7, 7)], expected)
    assert simsiam.rate_at(6, 90 * 7) == simsiam.rate_at(0, 90 * 7)


def test_simclr_is_lightlys_classifier() -> None:
    simclr = linear.PROTOCOLS["simclr"]
    theirs = LinearClassifier(torch.nn.Identity(), batch_size_per_device=256, feature_dim=8, num_classes=3)
    theirs.trainer = SimpleNamespace(world_size=1, estimated_stepping_batches=50)
    (optimizer,), (schedule,) = theirs.configure_optimizers()
    settings = optimizer.param_groups[0]
    assert (simclr.momentum, simclr.weight_decay) == (settings["momentum"], settings["weight_decay"])
    for step in range(50):
        assert simclr.rate_at(step, 50) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule["scheduler"].step()
    assert (simclr.epochs, simclr.batch_size) == (90, 256)  # of its ImageNet benchmark
    layer, plain = probe.initial_layer(4096, 50, 0, small=False), torch.nn.Linear(4096, 50)
    for ours, torchs in zip(layer.parameters(), plain.parameters(), strict=True):
        assert ours.detach().abs().max() <= 4096**-0.5
        assert ours.std().item() == pytest.approx(torchs.std().item(), rel=0.3)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lars_is_apexs_without_clipping(weight_decay: float) -> None:
    """The published formula in numpy, over three steps of momentum SGD."""
    generator = np.random.default_rng(0)
    layer = probe.initial_layer(5, 3, 0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.6, momentum=0.9)
    values = [part.detach().double().numpy().copy() for part in layer.parameters()]
    speeds = [np.zeros_like(value) for value in values]
    for _ in range(3):
        gradients = [generator.normal(size=value.shape) for value in values]
        for part, gradient in zip(layer.parameters(), gradients, strict=True):
            part.grad = torch.from_numpy(gradient).float()
        probe.scale_gradients(layer, weight_decay)
        optimizer.step()
        for k, gradient in enumerate(gradients):
            length, slope = np.linalg.norm(values[k]), np.linalg.norm(gradient)
            if length and slope:
                gradient = (gradient + weight_decay * values[k]) * 0.001 * length / (slope + weight_decay * length + 1e-8)
            speeds[k] = 0.9 * speeds[k] + gradient
            values[k] = values[k] - 1.6 * speeds[k]
    for part, value in zip(layer.parameters(), values, strict=True):
        np.testing.assert_allclose(part.detach().numpy(), value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("protocol", ["moco", "swav", "simsiam", "simclr"])
def test_every_preset_runs_and_leaves_the_backbone_alone(make_set, backbone, protocol: str) -> None:
    train, val = make_set("train", per_class=4, seed=0), make_set("val", per_class=2, seed=1)
    backbone.train()
    before = digest(backbone)
    result = run(backbone, train, val, epochs=2, protocol=protocol)
    assert digest(backbone) == before
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert set(result["per_class"]) == {"blue", "green", "red", "sand"}
    assert sum(row["n"] * row["top1"] for row in result["per_class"].values()) == pytest.approx(8 * result["top1"])
    assert f"the batch size {result['batch_size']} exceeds the 16 training images: each epoch is one step" in result["notes"]


def test_a_published_rate_in_proportion_follows_the_batch(make_set, backbone) -> None:
    train, val = make_set("train", per_class=2, seed=0), make_set("val", per_class=1, seed=1)
    assert run(backbone, train, val, epochs=1, protocol="simsiam", batch_size=64)["lr"] == pytest.approx(0.1 * 64 / 256)
    assert run(backbone, train, val, epochs=1, protocol="simsiam", batch_size=64, lr=0.3)["lr"] == 0.3
    assert run(backbone, train, val, epochs=1, protocol="moco", batch_size=64)["lr"] == 30.0


def test_several_protocols_learn_from_one_pass_what_each_learns_alone(make_set, backbone) -> None:
    train, val = make_set("train", per_class=5, seed=0), make_set("val", per_class=2, seed=1)
    calls = []

    def counted(pixels: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixels))
        return backbone(pixels)

    options = {"epochs": 4, "seed": 3, "pixels": 16, "workers": 0, "progress": False}
    backbone.eval()
    together = linear.evaluate_together(["moco", "swav", "simsiam"], model=counted, train=train, val=val, **options)
    assert sum(calls) == 8 + 4 * 20
    for name, result in together.items():
        alone = run(backbone, train, val, protocol=name, **options)
        for ours, theirs in zip(result["history"], alone["history"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
        np.testing.assert_array_equal(result["correct"], alone["correct"])
    assert len({tuple(row["loss"] for row in result["history"]) for result in together.values()}) == 3


def test_batches_are_filled_from_what_the_model_gets_at_once(make_set, backbone, monkeypatch) -> None:
    """20 images, read 3 at a time, in batches of 7: steps of 7, 7 and 6 images, as if all were read at once."""
    train, val = make_set("train", per_class=5, seed=0), make_set("val", per_class=1, seed=1)
    backbone.eval()
    whole = run(backbone, train, val, epochs=3, batch_size=7, lr=1.0)
    monkeypatch.setattr(linear, "MAX_FORWARD", 3)
    parts = run(backbone, train, val, epochs=3, batch_size=7, lr=1.0)
    for ours, theirs in zip(parts["history"], whole["history"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_killed_probe_continues_to_what_it_would_have_come_to(make_set, backbone, tmp_path) -> None:
    train, val = make_set("train", per_class=3, seed=0), make_set("val", per_class=2, seed=1)
    backbone.eval()
    names, options = ["moco", "simsiam"], {"train": train, "val": val, "epochs": 5, "batch_size": 4, "lr": 1.0}
    options |= {"pixels": 16, "workers": 0, "progress": False}
    whole = linear.evaluate_together(names, model=backbone, **options)
    kept = {name: tmp_path / f"{name}.pt" for name in names}
    seen = []

    def killed(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixels))
        if sum(seen) > 8 + 2 * 12 + 4:  # val, two epochs, and a step of the third
            raise KeyboardInterrupt
        return backbone(pixels)

    with pytest.raises(KeyboardInterrupt):
        linear.evaluate_together(names, model=killed, kept=kept, **options)
    (tmp_path / "simsiam.pt").unlink()  # one of them starts again
    seen = [-1000]
    again = linear.evaluate_together(names, model=killed, kept=kept, **options)
    assert sum(seen) == -1000 + 8 + 5 * 12
    for name in names:
        assert again[name]["history"] == whole[name]["history"]
        np.testing.assert_array_equal(again[name]["correct"], whole[name]["correct"])
    seen = [-1000]
    done = linear.evaluate_together(names, model=killed, kept=kept, **options)
    assert sum(seen) == -1000 + 8
    assert done["moco"]["history"] == whole["moco"]["history"]


def test_what_was_kept_of_another_training_is_refused_and_left_alone(make_set, backbone, tmp_path) -> None:
    train, val = make_set("train", per_class=2, seed=0), make_set("val", per_class=1, seed=1)
    kept = {"moco": tmp_path / "probe.pt"}
    run(backbone, train, val, epochs=1, kept=kept, identity="a")
    before = kept["moco"].read_bytes()
    for change in ({"identity": "b"}, {"identity": "a", "epochs": 2}, {"identity": "a", "seed": 1}):
        with pytest.raises(RequestError, match=r"probe\.pt: made with another model, other images or other settings"):
            run(backbone, train, val, kept=kept, **{"epochs": 1, **change})
    assert kept["moco"].read_bytes() == before
    kept["moco"].write_bytes(before[:200])
    with pytest.raises(RequestError, match=r"probe\.pt: damaged; delete it to train from the start"):
        run(backbone, train, val, kept=kept, epochs=1, identity="a")


@pytest.mark.parametrize(
    "damage",
    [
        {"momentum": []},
        {"momentum": [torch.zeros(2), torch.zeros(3)]},
        {"history": [1, 2]},
        {"history": []},
        {"history": [dict.fromkeys(("epoch", "lr", "loss", "train_top1", "top1"), 1.0)] * 9},
        {"layer": {}},
        {"sample": None},
    ],
)
def test_a_kept_probe_that_is_damaged_is_said_so(make_set, backbone, tmp_path, damage) -> None:
    train, val = make_set("train", per_class=2, seed=0), make_set("val", per_class=1, seed=1)
    kept = {"moco": tmp_path / "probe.pt"}
    run(backbone, train, val, epochs=2, kept=kept)
    torch.save({**torch.load(kept["moco"], weights_only=True), **damage}, kept["moco"])
    with pytest.raises(RequestError, match=r"probe\.pt: damaged; delete it to train from the start"):
        run(backbone, train, val, epochs=2, kept=kept)


def test_a_function_that_was_rewritten_does_not_continue(make_set, backbone, tmp_path) -> None:
    train, val = make_set("train", per_class=2, seed=0), make_set("val", per_class=1, seed=1)
    kept = {"moco": tmp_path / "probe.pt"}
    backbone.eval()
    run(backbone, train, val, epochs=2, kept=kept)
    with pytest.raises(RequestError, match=r"probe\.pt: made with another model"):
        run(lambda pixels: 3 * backbone(pixels), train, val, epochs=2, kept=kept)
    run(lambda pixels: (1 + 1e-6) * backbone(pixels), train, val, epochs=2, kept=kept)  # last bits


def test_protocols_of_other_lengths_continue_from_other_epochs(make_set, backbone, tmp_path, monkeypatch) -> None:
    """One is finished before the other continues; steps in which no probe learns read nothing."""
    train, val = make_set("train", per_class=2, seed=0), make_set("val", per_class=1, seed=1)
    backbone.eval()
    for name, epochs in (("moco", 6), ("simclr", 3)):
        monkeypatch.setitem(linear.PROTOCOLS, name, replace(linear.PROTOCOLS[name], epochs=epochs, milestones=(), lr=0.1))
    whole = run(backbone, train, val)
    kept = {name: tmp_path / name for name in ("moco", "simclr")}
    seen: list[int] = []

    def killed(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixels))
        if sum(seen) > 4 + 5 * 8:
            raise KeyboardInterrupt
        return backbone(pixels)

    with pytest.raises(KeyboardInterrupt):
        run(killed, train, val, kept=kept)
    seen[:] = [-1000]
    options = {"pixels": 16, "workers": 0, "progress": False}
    both = linear.evaluate_together(["moco", "simclr"], model=killed, train=train, val=val, kept=kept, **options)
    assert sum(seen) == -1000 + 4 + (3 + 1) * 8
    assert both["moco"]["history"] == whole["history"]
    assert len(both["simclr"]["history"]) == 3


def test_a_probe_whose_last_step_breaks_it_is_no_result(make_set, backbone, tmp_path) -> None:
    train, val = make_set("train", per_class=2, seed=0), make_set("val", per_class=1, seed=1)
    kept = {"moco": tmp_path / "probe.pt"}
    with pytest.raises(FkdError, match=r"the probe moco diverged in epoch 1: .*; give a lower lr"):
        run(lambda pixels: pixels.flatten(1).float() * 1e4, train, val, lr=3e38, epochs=1, kept=kept)
    assert not kept["moco"].exists()


def test_damaged_images_are_left_out_of_training_and_scoring(make_set, backbone, capsys, monkeypatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    train, val = make_set("train", per_class=4, seed=1), make_set("val", per_class=3, seed=2)
    common: dict[str, Any] = {"epochs": 3, "batch_size": 5, "lr": 1.0}
    damaged = {train.file(2), train.file(7), val.file(0)}
    for path in damaged:
        path.write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"not a readable image: unknown image format$"):
        run(backbone, train, val, **common)
    skipped: set[str] = set()
    found = run(backbone, train, val, skipped=skipped, workers=1, progress=True, **common)
    assert f"moco epoch 3/3: 100%|██████████| {3 * len(train)}/{3 * len(train)} " in capsys.readouterr().err
    assert skipped == {f"{path}: not a readable image: unknown image format" for path in damaged}
    assert (found["n_train"], found["n_val"], len(found["correct"])) == (len(train) - 2, len(val) - 1, len(val) - 1)
    assert [row["images"] for row in found["history"]] == [len(train) - 2] * 3
    for index in range(len(train)):
        train.file(index).write_bytes(b"no picture")
    with pytest.raises(ImageError, match="none of the training images can be read"):
        run(backbone, train, val, skipped=set(), **common)
