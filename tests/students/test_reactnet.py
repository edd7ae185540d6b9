"""ReActNet against its paper's equations in NumPy: signs, binary convolutions, their gradients, a whole block."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from fkd_ssl.students import ReActNet, Student, make_backbone
from fkd_ssl.students.reactnet import BinaryConv2d, Block, RSign, Sign, rprelu

Array = npt.NDArray[np.float64]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def convolve(x: Array, w: Array, stride: int, pad: int) -> Array:
    """A convolution as five sums."""
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    k, h, v = w.shape[-1], (x.shape[2] - w.shape[-1]) // stride + 1, (x.shape[3] - w.shape[-1]) // stride + 1
    out = np.zeros((len(x), len(w), h, v))
    for i in range(h):
        for j in range(v):
            patch = x[:, :, i * stride : i * stride + k, j * stride : j * stride + k]
            out[:, :, i, j] = np.einsum("bchw,ochw->bo", patch, w)
    return out


def binary(w: Array) -> Array:
    return np.where(w > 0, 1.0, -1.0) * np.abs(w).mean(axis=(1, 2, 3), keepdims=True)


class TestSign:
    def test_it_is_one_of_two_values(self) -> None:
        x = torch.tensor([-2.0, -0.1, 0.0, 0.1, 2.0])
        assert Sign.apply(x).tolist() == [-1, -1, -1, 1, 1]

    def test_its_gradient_is_the_quadratics(self) -> None:
        x = torch.tensor([-1.5, -1.0, -0.75, -0.25, 0.0, 0.25, 0.75, 1.0, 1.5], requires_grad=True)
        Sign.apply(x).backward(torch.full((9,), 3.0))
        expected = [0, 0, 3 * 0.5, 3 * 1.5, 3 * 2, 3 * 1.5, 3 * 0.5, 0, 0]
        assert x.grad is not None
        assert x.grad.tolist() == pytest.approx(expected)

    def test_that_is_the_slope_of_the_quadratic(self) -> None:
        """Finite differences of F(x) = 2x + x^2 below 0 and 2x - x^2 above, clamped at -1 and 1."""

        def quadratic(x: Array) -> Array:
            return np.where(x < -1, -1, np.where(x < 0, 2 * x + x * x, np.where(x < 1, 2 * x - x * x, 1)))

        x = numbers(200).requires_grad_()
        Sign.apply(x).sum().backward()
        at = x.detach().numpy()
        assert x.grad is not None
        np.testing.assert_allclose(x.grad, (quadratic(at + 1e-6) - quadratic(at - 1e-6)) / 2e-6, atol=1e-5)

    def test_the_threshold_is_learned_for_each_channel(self) -> None:
        sign = RSign(2).double()
        sign.shift.bias.data = torch.tensor([0.5, -0.5]).view(2, 1, 1).double()
        x = numbers(3, 2, 4, 4)
        expected = np.where(x.numpy() > np.array([-0.5, 0.5]).reshape(1, 2, 1, 1), 1, -1)
        assert np.array_equal(sign(x).detach(), expected)
        sign(x).sum().backward()
        assert sign.shift.bias.grad is not None
        assert (sign.shift.bias.grad != 0).all()

    def test_it_keeps_bfloat16(self) -> None:
        assert Sign.apply(torch.ones(3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_rprelu_is_shifted_on_both_axes() -> None:
    act = rprelu(3).double()
    for part, seed in zip(act, (1, 2, 3), strict=True):
        for parameter in part.parameters():
            parameter.data = numbers(*parameter.shape, seed=seed)
    gamma, beta, zeta = (next(part.parameters()).detach().numpy().reshape(1, 3, 1, 1) for part in act)
    x = numbers(2, 3, 4, 4)
    y = x.numpy() + gamma
    np.testing.assert_allclose(act(x).detach(), np.where(y > 0, y, beta * y) + zeta, rtol=1e-12)


class TestBinaryConv:
    @pytest.mark.parametrize(("kernel", "stride", "pad"), [(3, 1, 1), (3, 2, 1), (1, 1, 0)])
    def test_its_weights_are_signs_times_their_mean_size(self, kernel: int, stride: int, pad: int) -> None:
        conv = BinaryConv2d(4, 5, kernel, stride=stride, padding=pad, bias=False).double()
        x = torch.sign(numbers(2, 4, 6, 6))
        expected = convolve(x.numpy(), binary(conv.weight.detach().numpy()), stride, pad)
        np.testing.assert_allclose(conv(x).detach(), expected, rtol=1e-10, atol=1e-12)

    def test_the_gradient_passes_where_a_weight_is_at_most_one(self) -> None:
        conv = BinaryConv2d(2, 3, 3, padding=1, bias=False).double()
        conv.weight.data = 1.5 * numbers(3, 2, 3, 3)
        x, weight = torch.sign(numbers(2, 2, 5, 5)), numbers(2, 3, 5, 5, seed=4)
        (conv(x) * weight).sum().backward()
        plain = nn.Conv2d(2, 3, 3, padding=1, bias=False).double()
        (plain(x) * weight).sum().backward()
        assert conv.weight.grad is not None
        assert plain.weight.grad is not None
        inside = conv.weight.detach().abs() <= 1
        assert 0 < inside.sum() < inside.numel()
        torch.testing.assert_close(conv.weight.grad, plain.weight.grad * inside)


@pytest.mark.parametrize(("out_channels", "stride"), [(4, 1), (8, 2), (8, 1)])
@pytest.mark.parametrize("conv", [BinaryConv2d, nn.Conv2d])
def test_a_block_is_the_papers(out_channels: int, stride: int, conv: type[nn.Conv2d]) -> None:
    block = Block(4, out_channels, stride, conv).double().train()
    for k, parameter in enumerate(block.parameters()):
        parameter.data = 0.5 * numbers(*parameter.shape, seed=k)
    p = {key: value.numpy() for key, value in block.state_dict().items()}
    binarised = binary if conv is BinaryConv2d else np.asarray

    def norm(y: Array, name: str) -> Array:
        mean, var = (f(y, axis=(0, 2, 3), keepdims=True) for f in (np.mean, np.var))
        w, b = (p[f"{name}.{part}"].reshape(1, -1, 1, 1) for part in ("weight", "bias"))
        return np.asarray((y - mean) / np.sqrt(var + 1e-5) * w + b)

    def signs(y: Array, name: str) -> Array:
        return np.where(y + p[f"{name}.shift.bias"] > 0, 1.0, -1.0)

    def act(y: Array, name: str) -> Array:
        y = y + p[f"{name}.0.bias"]
        return np.asarray(np.where(y > 0, y, p[f"{name}.1.weight"].reshape(1, -1, 1, 1) * y) + p[f"{name}.2.bias"])

    x = numbers(2, 4, 6, 6, seed=99)
    short = x.numpy().reshape(2, 4, 3, 2, 3, 2).mean(axis=(3, 5)) if stride == 2 else x.numpy()
    y = act(norm(convolve(signs(x.numpy(), "sign1"), binarised(p["conv1.weight"]), stride, 1), "bn1") + short, "act1")
    halves = [
        norm(convolve(signs(y, "sign2"), binarised(p[f"conv2.{k}.weight"]), 1, 0), f"bn2.{k}") + y
        for k in range(out_channels // 4)
    ]
    np.testing.assert_allclose(block(x).detach(), act(np.concatenate(halves, axis=1), "act2"), rtol=1e-8, atol=1e-8)


class TestNetwork:
    def test_its_maps_shrink_as_mobilenets(self) -> None:
        network = ReActNet(width=0.125).eval()
        shapes = []
        for block in network.blocks:
            block.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[1:3])))
        with torch.no_grad():
            assert network(torch.zeros(1, 3, 224, 224)).shape == (1, 128)
        sides = [112, 56, 56, 28, 28, 14, 14, 14, 14, 14, 14, 7, 7]
        channels = [8, 16, 16, 32, 32, 64, 64, 64, 64, 64, 64, 128, 128]
        assert shapes == list(zip(channels, sides, strict=True))

    def test_the_two_steps_have_the_same_weights_by_the_same_names(self) -> None:
        torch.manual_seed(0)
        first = Student("reactnet_step1", 8, width=0.125)
        second = Student("reactnet", 8, width=0.125)
        second.load_state_dict(first.state_dict())
        images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
        with torch.no_grad():
            assert not torch.allclose(first.eval()(images), second.eval()(images))

    @pytest.mark.parametrize("name", ["reactnet", "reactnet_step1"])
    @pytest.mark.parametrize("pixels", [32, 33, 64])
    def test_every_parameter_learns(self, name: str, pixels: int) -> None:
        torch.manual_seed(0)
        backbone, _ = make_backbone(name, width=0.125, stem="small")
        backbone(torch.randn(4, 3, pixels, pixels)).square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in backbone.parameters())
