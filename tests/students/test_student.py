"""Students: torchvision's classifiers without their last layers, and a projection head."""

import pytest
import torch
from torch import nn

from fkd_ssl.errors import RequestError
from fkd_ssl.options import Named
from fkd_ssl.students import Student, make_backbone
from fkd_ssl.students.backbones import MOMENTUM

# one of most families, the smallest that there is
DIMS = {
    "resnet18": 512,
    "mobilenet_v2": 1280,
    "mobilenet_v3_small": 576,
    "shufflenet_v2_x0_5": 1024,
    "squeezenet1_1": 512,
    "mnasnet0_5": 1280,
    "regnet_y_400mf": 440,
    "googlenet": 1024,
}
LARGE = {"efficientnet_b0": 1280, "densenet121": 1024, "convnext_tiny": 768, "swin_t": 768, "maxvit_t": 512}


@pytest.mark.parametrize("name", [*DIMS, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_features_are_pooled_and_of_the_families_dimension(name: str) -> None:
    backbone, dim = make_backbone(name)
    assert dim == {**DIMS, **LARGE}[name]
    with torch.no_grad():
        features = backbone.eval()(torch.randn(2, 3, 224, 224))
    assert features.shape == (2, dim)


def test_a_backbone_has_no_classifier_left_and_is_in_train_mode() -> None:
    backbone, _ = make_backbone("shufflenet_v2_x0_5")
    assert not any(isinstance(part, nn.Linear) for part in backbone.modules())
    assert all(part.training for part in backbone.modules())


def test_making_a_backbone_leaves_the_running_statistics_untouched() -> None:
    backbone, _ = make_backbone("shufflenet_v2_x0_5")
    norms = [part for part in backbone.modules() if isinstance(part, nn.BatchNorm2d)]
    assert norms
    for norm in norms:
        assert norm.num_batches_tracked is not None
        assert int(norm.num_batches_tracked) == 0


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "mnasnet0_5", "shufflenet_v2_x0_5"])
def test_running_statistics_forget_their_initial_values_within_fifty_steps(name: str) -> None:
    """torchvision's own momentum would leave 60 % (MobileNetV3) or 99 % (MNASNet) of the initial values after fifty steps."""
    backbone, _ = make_backbone(name)
    means: dict[str, torch.Tensor] = {}
    for path, part in backbone.named_modules():
        if isinstance(part, nn.BatchNorm2d):
            part.register_forward_pre_hook(lambda _, x, path=path: means.update({path: x[0].mean(dim=(0, 2, 3))}))
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for _ in range(50):
            backbone(images)
    for path, mean in means.items():  # the batch mean, as the initial values are 0
        torch.testing.assert_close(backbone.get_buffer(f"{path}.running_mean"), mean, rtol=0.01, atol=1e-6)


def test_a_module_of_the_users_gets_the_momentum_in_a_copy() -> None:
    own = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=0.01), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    backbone, dim = make_backbone(Named("object:Sequential", own, 32))
    assert dim == 4
    assert [part.momentum for part in (backbone[1], own[1])] == [MOMENTUM, 0.01]  # type: ignore[index]


def test_the_output_is_normalised_and_of_the_targets_dimension() -> None:
    student = Student("shufflenet_v2_x0_5", 24)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    output = student(images)
    assert output.shape == (4, 24)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output.norm(dim=1), torch.ones(4))


def test_features_are_the_backbones_of_normalised_pixels() -> None:
    student = Student("squeezenet1_1", 8).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    floats = (images.permute(0, 2, 3, 1).double() / 255 - mean.double()) / std.double()
    with torch.no_grad():
        expected = student.backbone(floats.permute(0, 3, 1, 2).float())
        torch.testing.assert_close(student.features(images), expected, rtol=1e-4, atol=1e-4)


def test_initial_weights_follow_the_global_seed_alone() -> None:
    weights = []
    for _ in range(2):
        torch.manual_seed(3)
        weights.append(Student("squeezenet1_1", 8).state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize(("asked", "meant"), [("resnet_18", "resnet18"), ("mobilenetv2", "mobilenet_v2")])
def test_an_unknown_name_is_refused_with_what_may_be_meant(asked: str, meant: str) -> None:
    with pytest.raises(RequestError, match=rf"student '{asked}': torchvision has no such classifier; did you mean .*{meant}"):
        make_backbone(asked)


def test_a_name_like_no_other_is_refused_without_a_guess() -> None:
    with pytest.raises(RequestError, match=r"student '0000': torchvision has no such classifier$"):
        make_backbone("0000")


def test_a_function_is_refused_with_what_to_do() -> None:
    with pytest.raises(RequestError, match=r"student 'mine:make': module:function cannot name a student: pass the module from"):
        make_backbone("mine:make")


def test_a_segmentation_network_is_no_student() -> None:
    with pytest.raises(RequestError, match="no such classifier"):
        make_backbone("fcn_resnet50")


def test_a_head_for_each_teacher_on_one_backbone() -> None:
    torch.manual_seed(0)
    student = Student("squeezenet1_1", 8, 24).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        first, second = student.embeddings(images)
        torch.testing.assert_close(student(images), first)
        features = student.features(images)
        hidden = torch.relu(features @ student.more_heads[0][0].weight.T + student.more_heads[0][0].bias)
        expected = hidden @ student.more_heads[0][2].weight.T + student.more_heads[0][2].bias
    torch.testing.assert_close(second, expected / expected.norm(dim=1, keepdim=True))
    assert (first.shape, second.shape, student.dims) == ((2, 8), (2, 24), [8, 24])


def test_a_student_of_one_teacher_is_what_it_was_before_there_could_be_several() -> None:
    weights = []
    for dims in ((8,), (8, 24)):
        torch.manual_seed(3)
        weights.append(Student("squeezenet1_1", *dims).state_dict())
    one, two = weights
    assert {key.partition(".")[0] for key in one} == {"backbone", "head"}
    assert {key.partition(".")[0] for key in two} == {"backbone", "head", "more_heads"}
    assert all(torch.equal(value, two[key]) for key, value in one.items())
