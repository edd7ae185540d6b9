import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fkd_ssl.errors import FkdError, RequestError
from fkd_ssl.teachers import Teacher, load_teacher


def make(network: nn.Module, **options: Any) -> Teacher:
    return Teacher(network, nn.Identity(), name="mine", network="test", **{"shape": (8,), **options})


class Pooled(nn.Module):
    """[B, 3, H, W] to [B, 8], with BatchNorm and dropout, which reveal train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Any:
        return self.body(x).mean(dim=(2, 3))


class Answer(nn.Module):
    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor) -> Any:
        return self.answer(x)


def test_it_is_frozen_and_stays_in_eval_mode(crops: Tensor) -> None:
    teacher = make(Pooled())
    before = teacher.embed(crops)
    nn.ModuleList([teacher]).train()
    teacher.train()
    assert not any(part.training for part in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert torch.equal(teacher.embed(crops), before)
    assert before.is_inference()


def test_targets_are_normalised_floats_of_any_size(crops: Tensor) -> None:
    teacher = make(Pooled())
    for images in (crops, crops[:, :, :17, :25], crops[:1].contiguous(memory_format=torch.channels_last)):
        targets = teacher.embed(images)
        assert targets.dtype == torch.float32
        assert targets.shape == (len(images), 8)
        torch.testing.assert_close(targets.norm(dim=1), torch.ones(len(images)))


def test_pixels_are_normalised_as_torchvision_does(crops: Tensor) -> None:
    seen: list[Tensor] = []

    def look(x: Tensor) -> Tensor:
        seen.append(x)
        return x.mean(dim=(2, 3))

    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    make(Answer(look), shape=(3,), mean=mean, std=std).features(crops)
    expected = torch.stack([(crops[:, c] / 255 - mean[c]) / std[c] for c in range(3)], dim=1)
    torch.testing.assert_close(seen[0], expected)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: (x.mean(dim=(2, 3)), x), r"its network gave tuple for 3 images, expected \[B, D\]"),
        (lambda x: x, r"gave \[3, 3, 32, 32\] for 3 images"),
        (lambda x: x.mean(dim=(2, 3))[:2], r"gave \[2, 3\] for 3 images"),
        (lambda x: x.mean(dim=(2, 3)) * float("nan"), r"NaN or infinity in fp32"),
        (lambda x: x.flatten(1)[:, :5], r"its network gave \[3, 5\] for 3 images, expected \[3, 8\]"),
    ],
)
def test_outputs_that_are_no_targets_are_refused(answer: Any, message: str, crops: Tensor) -> None:
    with pytest.raises(FkdError, match=message):
        make(Answer(answer)).embed(crops)


def test_inputs_that_are_no_crops_are_refused(crops: Tensor) -> None:
    with pytest.raises(FkdError, match=r"got torch\.float32 \[3, 3, 32, 32\], expected uint8 \[B, 3, H, W\]"):
        make(Pooled()).embed(crops.float())
    with pytest.raises(FkdError, match=r"got torch\.uint8 \[3, 32, 32\]"):
        make(Pooled()).features(crops[0])


def test_unknown_precisions_are_refused() -> None:
    with pytest.raises(RequestError, match=r"precision 'fp8': expected fp32 or bf16 or fp16"):
        make(Pooled(), precision="fp8")


def test_bf16_is_close_to_fp32(crops: Tensor, moco18: tuple[Path, Any]) -> None:
    exact = load_teacher("mocov2", checkpoint=moco18[0]).embed(crops)
    rough = load_teacher("mocov2", checkpoint=moco18[0], precision="bf16").embed(crops)
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    assert float((rough * exact).sum(dim=1).min()) > 0.995


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precisions_are_pytorchs_own_autocast(precision: Any, crops: Tensor, moco18: tuple[Path, Any]) -> None:
    """The same forward through torchvision's own network under torch.autocast, to the last bit."""
    from torchvision.models import resnet18

    teacher = load_teacher("mocov2", checkpoint=moco18[0], precision=precision)
    state = {key.removeprefix("module.encoder_q."): value for key, value in moco18[1].items() if "encoder_q." in key}
    network = resnet18(weights=None)
    network.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 128))
    network.load_state_dict(state)
    network = network.eval().to(memory_format=torch.channels_last)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) * 255 for values in (teacher.info.mean, teacher.info.std))
    pixels = ((crops - mean) / std).contiguous(memory_format=torch.channels_last)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    with torch.inference_mode(), torch.autocast("cpu", dtype=kind):
        expected = network(pixels)
    assert expected.dtype == kind  # otherwise nothing ran in this precision
    assert torch.equal(teacher.embed(crops), nn.functional.normalize(expected.float(), dim=1))


def test_fp32_stays_fp32_inside_a_students_autocast(crops: Tensor, moco18: tuple[Path, Any]) -> None:
    teacher = load_teacher("mocov2", checkpoint=moco18[0])
    alone = teacher.embed(crops)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = teacher.embed(crops)
        assert teacher.features(crops).dtype == torch.float32
    assert torch.equal(inside, alone)


def test_weights_are_channels_last(moco18: tuple[Path, Any]) -> None:
    kernels = [p for p in load_teacher("mocov2", checkpoint=moco18[0]).parameters() if p.ndim == 4]
    assert len(kernels) == 20
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_agrees_with_the_cpu(crops: Tensor, moco18: tuple[Path, Any]) -> None:
    teacher = load_teacher("mocov2", checkpoint=moco18[0])
    here = teacher.embed(crops)
    there = teacher.to("cuda").embed(crops)
    assert there.device.type == "cuda"
    assert float((there.cpu() * here).sum(dim=1).min()) > 0.9999


@pytest.mark.data
@pytest.mark.skipif("FKD_SSL_DATA" not in os.environ, reason="FKD_SSL_DATA is not set")
def test_the_real_teacher_tells_images_apart() -> None:
    from fkd_ssl.crops import centre, replay
    from fkd_ssl.images import read_image, scan

    data = Path(os.environ["FKD_SSL_DATA"])
    teacher = load_teacher("mocov2", checkpoint=data / "teachers" / "mocov2_r18_imagenette.pth.tar")
    assert (teacher.info.network, teacher.info.spec.size) == ("resnet18, MLP 512-512-128", 128)
    images = scan(data / "data" / "imagenette" / "val")
    pixels = [read_image(images.file(i)) for i in range(0, len(images), 100)]
    views = torch.stack([torch.from_numpy(replay(p, centre(*p.shape[:2], 64), 64)[0]) for p in pixels])
    targets = teacher.embed(views)
    flipped = teacher.embed(views.flip(3))
    same = (targets @ flipped.T).argmax(dim=1) == torch.arange(len(views))
    assert float(same.float().mean()) > 0.9


def test_a_compiled_teacher_gives_the_same_targets(crops: Tensor, moco18: tuple[Path, Any]) -> None:
    """With dynamo's tracing alone, which needs no compiler; the names of the weights stay."""
    teacher = load_teacher("mocov2", checkpoint=moco18[0])
    names, plain = list(teacher.state_dict()), teacher.embed(crops)
    teacher.compile(backend="eager")
    assert list(teacher.state_dict()) == names
    torch.testing.assert_close(teacher.embed(crops), plain, rtol=1e-5, atol=1e-6)


def test_a_teacher_that_cannot_be_compiled_is_refused(moco18: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from fkd_ssl.commands.resolve import compile_teachers

    def no_compiler(*_: Any) -> Any:
        raise RuntimeError("no C compiler")

    plain = Teacher.compile
    monkeypatch.setattr(Teacher, "compile", lambda self: plain(self, backend=no_compiler))
    with pytest.raises(RequestError, match=r"--compile: teacher mocov2: .*no C compiler; run without --compile"):
        compile_teachers([load_teacher("mocov2", checkpoint=moco18[0])], [32], 2)
