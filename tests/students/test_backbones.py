"""Backbones by name, their stems and widths, and their size."""

import sys
from typing import Any

import pytest
import torch
from torch import nn

from fkd_ssl.errors import RequestError
from fkd_ssl.students import check_student, make_backbone, measure


@pytest.mark.parametrize("name", ["timm/resnet18", "timm/mobilenetv3_small_050", "timm/vit_tiny_patch16_224"])
def test_timms_networks_are_students(name: str) -> None:
    backbone, dim = make_backbone(name)
    assert backbone.training
    with torch.no_grad():
        assert backbone.eval()(torch.zeros(2, 3, 64, 64)).shape == (2, dim)
    check_student(name, 64)


def test_timms_and_torchvisions_resnet_are_of_one_size() -> None:
    sizes = [measure(make_backbone(name)[0], 64) for name in ("resnet18", "timm/resnet18")]
    assert sizes[0] == sizes[1]


def test_an_unknown_name_of_timms_is_refused() -> None:
    with pytest.raises(RequestError, match=r"student 'timm/resnet_18': timm has no such model; did you mean .*resnet18"):
        make_backbone("timm/resnet_18")


def test_without_timm_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(RequestError, match=r"timm is not installed .*: pip install 'fkd_ssl\[timm\]'"):
        make_backbone("timm/resnet18")


class TestSmallStems:
    @pytest.mark.parametrize(
        ("name", "ratio"),
        [("resnet18", 4), ("mobilenet_v2", 2), ("shufflenet_v2_x0_5", 4), ("timm/resnet18", 4), ("reactnet_step1", 2)],
    )
    def test_the_first_layers_keep_the_size(self, name: str, ratio: int) -> None:
        """The last feature map is larger by the removed strides."""

        def sides(stem: str) -> list[int]:
            network, _ = make_backbone(name, stem=stem)
            found = []
            for part in network.modules():
                if isinstance(part, nn.Conv2d):
                    part.register_forward_hook(lambda module, inputs, output: found.append(output.shape[-1]))
            with torch.no_grad():
                network.eval()(torch.zeros(1, 3, 64, 64))
            return found

        standard, small = sides("standard"), sides("small")
        assert small[0] == 64
        assert small[-1] == ratio * standard[-1]
        assert len(small) == len(standard)

    def test_all_other_weights_have_their_shapes(self) -> None:
        standard, small = (make_backbone("resnet18", stem=stem)[0].state_dict() for stem in ("standard", "small"))
        assert standard.keys() == small.keys()
        assert [key for key in small if small[key].shape != standard[key].shape] == ["conv1.weight"]
        assert small["conv1.weight"].shape == (64, 3, 3, 3)

    def test_a_network_without_such_a_layer_is_refused(self) -> None:
        with pytest.raises(RequestError, match=r"has no small stem: its first layer is not a convolution of up to 7 px"):
            make_backbone("timm/vit_tiny_patch16_224", stem="small")

    def test_another_stem_is_refused(self) -> None:
        with pytest.raises(RequestError, match=r"stem 'tiny' is unknown; expected standard or small"):
            make_backbone("resnet18", stem="tiny")


class TestWidths:
    @pytest.mark.parametrize(("name", "width", "dim"), [("reactnet", 0.25, 256), ("mobilenet_v2", 0.5, 1280)])
    def test_a_narrow_network_is_smaller(self, name: str, width: float, dim: int) -> None:
        narrow, found = make_backbone(name, width=width)
        assert found == dim
        assert measure(narrow, 32).parameters < 0.6 * measure(make_backbone(name)[0], 32).parameters

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"name": "resnet18", "width": 0.5}, r"width 0\.5: student 'resnet18' has one width; choose reactnet, "),
            ({"name": "reactnet", "width": 0.0}, r"width 0\.0: must be between 0 and 4"),
        ],
    )
    def test_what_has_no_such_width_is_refused(self, options: dict[str, Any], said: str) -> None:
        with pytest.raises(RequestError, match=said):
            make_backbone(**options)


class TestSize:
    def test_of_a_network_written_out(self) -> None:
        network = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(8 * 16 * 16, 5))
        size = measure(network, 32)
        assert size.parameters == 3 * 8 * 9 + 8 + 8 * 256 * 5 + 5
        assert size.multiply_adds == 3 * 8 * 9 * 256 + 8 * 256 * 5
        assert network.training

    def test_resnet18_is_what_the_paper_says(self) -> None:
        """1.8 x 10^9 (He et al., arXiv 1512.03385, table 1), 11.69 M with its classifier."""
        size = measure(make_backbone("resnet18")[0], 224)
        assert size.multiply_adds == pytest.approx(1.8e9, rel=0.02)
        assert size.parameters == 11_689_512 - 513_000
        assert str(size) == "11.18 M parameters, 1,813.6 M multiply-adds per image"

    def test_reactnet_a_is_what_the_paper_says(self) -> None:
        """4.82 x 10^9 binary and 0.12 x 10^8 real ones, the classifier's 1024 x 1000 among them (arXiv 2003.03488, table 1)."""
        size = measure(make_backbone("reactnet")[0], 224)
        assert size.binary_multiply_adds == pytest.approx(4.82e9, rel=2e-3)
        assert size.multiply_adds + 1024 * 1000 == pytest.approx(0.12e8, rel=2e-2)
        assert "M binary ones per image" in str(size)
        assert measure(make_backbone("reactnet_step1")[0], 224).binary_multiply_adds == 0


def test_a_student_that_cannot_take_such_crops_is_refused() -> None:
    with pytest.raises(RequestError, match=r"student 'vit_b_32': cannot take crops of 64 px"):
        check_student("vit_b_32", 64)
    with pytest.raises(
        RequestError, match=r"head 'simreq' is unknown; expected mocov2, simreg, classifier; did you mean simreg"
    ):
        check_student("squeezenet1_1", 64, head="simreq")
