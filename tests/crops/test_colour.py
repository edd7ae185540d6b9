"""The colour matrix against torchvision's operations, one at a time, and against a float oracle for every order."""

import colorsys
import math
from itertools import permutations

import numpy as np
import pytest
import torch
from torchvision.transforms import functional

from fkd_ssl.crops import box_record, colour, replay
from fkd_ssl.crops.operations import GREY, JITTER

LUMA = np.array([0.299, 0.587, 0.114])


@pytest.fixture
def muted(smooth) -> np.ndarray:
    """An image of medium colours, so that nothing clips, of the output's size, so that replay does not resize."""
    pixels = smooth(5, 64, 64).astype(float)
    return (128 + (pixels - 128) * 0.35).round().astype(np.uint8)


def jittered(order: int = 0, *, flags: int = JITTER, **factors: float) -> np.ndarray:
    record = box_record(0, 0, 64, 64)
    record["flags"], record["order"] = flags, order
    for name, value in factors.items():
        record[name] = value
    return record


def chw(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def difference(ours: np.ndarray, theirs: torch.Tensor) -> int:
    return int(np.abs(ours[0].astype(int) - theirs.numpy().astype(int)).max())


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
@pytest.mark.parametrize("factor", [0.5, 0.8, 1.25, 1.5])
def test_each_operation_agrees_with_torchvisions(muted, name, factor):
    theirs = getattr(functional, f"adjust_{name}")(chw(muted), factor)
    assert theirs.min() > 0
    assert theirs.max() < 255
    assert difference(replay(muted, jittered(**{name: factor}), 64), theirs) <= 1


def test_greyscale_agrees_with_torchvisions(muted):
    ours = replay(muted, jittered(flags=GREY), 64)
    assert difference(ours, functional.rgb_to_grayscale(chw(muted), 3)) <= 1
    assert (ours[0, 0] == ours[0, 1]).all()
    assert (ours[0, 1] == ours[0, 2]).all()


def test_factors_count_only_with_their_flag(muted):
    plain = replay(muted, box_record(0, 0, 64, 64), 64)
    ignored = jittered(flags=0, brightness=0.5, contrast=0.5, saturation=0.2, hue=0.3)
    np.testing.assert_array_equal(replay(muted, ignored, 64), plain)
    np.testing.assert_array_equal(plain[0], chw(muted).numpy())
    for order in range(24):
        np.testing.assert_array_equal(replay(muted, jittered(order), 64), plain)


@pytest.mark.parametrize("hue", [-0.4, -0.2, -0.1, 0.05, 0.1, 0.2])
def test_hue_keeps_the_luma(muted, hue):
    turned = replay(muted, jittered(hue=hue), 64)[0].astype(float)
    luma = np.tensordot(LUMA, turned, 1) - muted.astype(float) @ LUMA
    assert np.abs(luma).max() <= 1
    assert np.abs(turned - chw(muted).numpy()).max() > 2


@pytest.mark.parametrize("hue", [-0.2, -0.1, -0.05, 0.05, 0.1, 0.2])
@pytest.mark.parametrize("start", np.linspace(0, 1, 12, endpoint=False))
def test_hue_turns_as_torchvisions_does(start, hue):
    rgb = np.array(colorsys.hsv_to_rgb(start, 0.4, 0.6)) * 255
    image = np.broadcast_to(rgb.round().astype(np.uint8), (64, 64, 3)).copy()
    record = jittered(hue=hue)
    turns = []
    for pixels in (replay(image, record, 64)[0], functional.adjust_hue(chw(image), float(record["hue"][0])).numpy()):
        turned = colorsys.rgb_to_hsv(*(pixels[:, 0, 0] / 255))[0]
        turns.append((turned - start + 0.5) % 1 - 0.5)
    assert abs(turns[1] - hue) < 0.02
    assert np.sign(turns[0]) == np.sign(hue)
    assert abs(turns[0] - hue) < 0.09  # a rotation in YIQ differs from one in HSV


def test_half_a_turn_of_hue_and_back(muted):
    there = colour.matrix(*jittered(hue=0.5)[0].item()[4:10], mean=(0, 0, 0)).astype(float)[:, :3]
    np.testing.assert_allclose(there @ there, np.eye(3), atol=1e-5)


def oracle(image: np.ndarray, order: tuple[int, ...], factors: dict[str, float], grey: bool) -> np.ndarray:
    """Applies the operations in order to float pixels [n, 3], with means computed when needed, without clamping."""
    yiq = np.array([LUMA, [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
    x = image.reshape(-1, 3).astype(np.float64)
    for operation in order:
        if operation == 0:
            x = x * factors["brightness"]
        elif operation == 1:
            pivot = (x @ LUMA).mean()
            x = pivot + (x - pivot) * factors["contrast"]
        elif operation == 2:
            luma = (x @ LUMA)[:, None]
            x = luma + (x - luma) * factors["saturation"]
        else:
            angle = 2 * np.pi * factors["hue"]
            cos, sin = np.cos(angle), np.sin(angle)
            turn = np.array([[1, 0, 0], [0, cos, sin], [0, -sin, cos]])
            x = x @ (np.linalg.inv(yiq) @ turn @ yiq).T
    return np.repeat((x @ LUMA)[:, None], 3, axis=1) if grey else x


@pytest.mark.parametrize("grey", [False, True])
def test_every_order_composes_as_the_operations_in_turn(muted, grey):
    values = {"brightness": 1.2, "contrast": 0.7, "saturation": 1.35, "hue": 0.08}
    matrices = []
    for k, order in enumerate(permutations(range(4))):
        (record,) = jittered(k, flags=JITTER | GREY if grey else JITTER, **values)
        exact = {name: float(record[name]) for name in values}
        expected = oracle(muted, order, exact, grey)
        mean = muted.reshape(-1, 3).astype(float).mean(axis=0)
        matrix = colour.matrix(*record.item()[4:10], mean=tuple(mean)).astype(float)
        found = muted.reshape(-1, 3).astype(float) @ matrix[:, :3].T + matrix[:, 3]
        np.testing.assert_allclose(found, expected, atol=1e-3)
        pixels = replay(muted, np.array([record]), 64)[0].transpose(1, 2, 0).reshape(-1, 3)
        assert np.abs(pixels - expected.clip(0, 255)).max() <= 1
        matrices.append(matrix)
    # the operations commute: nothing is clamped, contrast's pivot is the mean grey, saturation and hue keep grey
    np.testing.assert_allclose(matrices, np.broadcast_to(matrices[0], (24, 3, 4)), atol=1e-4)


def test_order_of_the_permutations_is_pinned():
    assert list(colour.OPERATION_ORDERS) == list(permutations(range(4)))
    assert colour.OPERATION_ORDERS[1] == (colour.BRIGHTNESS, colour.CONTRAST, colour.HUE, colour.SATURATION)


def test_matrices_of_single_operations():
    mean = (100.0, 50.0, 200.0)
    grey = float(np.dot(LUMA, mean))
    half = colour.matrix(*jittered(brightness=0.5)[0].item()[4:10], mean=mean)
    np.testing.assert_allclose(half, np.hstack([np.eye(3) / 2, np.zeros((3, 1))]))
    half = colour.matrix(*jittered(contrast=0.5)[0].item()[4:10], mean=mean)
    np.testing.assert_allclose(half, np.hstack([np.eye(3) / 2, np.full((3, 1), grey / 2)]), rtol=1e-6)
    none = colour.matrix(*jittered(saturation=0.0)[0].item()[4:10], mean=mean)
    np.testing.assert_allclose(none, np.hstack([np.tile(LUMA, (3, 1)), np.zeros((3, 1))]), rtol=1e-6)
    assert half.dtype == np.float32


def test_contrast_turns_about_the_mean_after_earlier_operations():
    """brightness 0.5, then contrast 0: every pixel becomes half the mean grey."""
    record = jittered(0, brightness=0.5, contrast=0.0)[0]
    matrix = colour.matrix(*record.item()[4:10], mean=(100.0, 100.0, 100.0))
    np.testing.assert_allclose(matrix, np.hstack([np.zeros((3, 3)), np.full((3, 1), 50.0)]), atol=1e-5)


def test_results_are_clamped():
    image = np.zeros((64, 64, 3), dtype=np.uint8)
    image[:, 32:] = 250
    bright = replay(image, jittered(brightness=1.5), 64)
    assert set(np.unique(bright)) == {0, 255}
    contrasted = replay(image, jittered(contrast=2.0), 64)
    assert set(np.unique(contrasted)) == {0, 255}


def test_matrices_of_many_crops_have_the_bits_of_each():
    rng = np.random.default_rng(0)
    records = np.repeat(box_record(0, 0, 4, 4), 4000)
    records["order"], records["flags"] = np.arange(4000) % 24, rng.integers(0, 16, 4000)
    for name in ("brightness", "contrast", "saturation"):
        records[name] = rng.uniform(0, 3, 4000)
    records["hue"] = rng.uniform(-0.5, 0.5, 4000)
    records["hue"][:2], records["brightness"][2:4], records["contrast"][4:6] = (-0.5, 0.5), (0, 16), (0, 16)
    linear, offsets = colour.matrices(
        *(
            records[name].astype(float) if name != "flags" and name != "order" else records[name]
            for name in records.dtype.names[4:10]
        )
    )
    assert (linear.dtype, offsets.dtype) == (np.float32, np.float64)
    for k, record in enumerate(records.tolist()):
        for channel, mean in enumerate(np.eye(3).tolist()):
            alone = colour.matrix(*record[4:10], mean=mean)
            np.testing.assert_array_equal(linear[k], alone[:, :3])
            np.testing.assert_array_equal(offsets[k, :, channel].astype(np.float32), alone[:, 3])


def test_every_hue_has_the_bits_of_pythons_cosine_and_sine():
    hues = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    hues = hues[np.abs(hues) <= 0.5].astype(np.float64)
    cos, sin = colour._cos_sin(hues)
    np.testing.assert_array_equal(cos, [math.cos(2 * math.pi * hue) for hue in hues.tolist()])
    np.testing.assert_array_equal(sin, [math.sin(2 * math.pi * hue) for hue in hues.tolist()])
