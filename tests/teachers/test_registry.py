import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fkd_ssl.errors import CheckpointError, FkdError, RequestError
from fkd_ssl.teachers import FAMILIES, PRESETS, Teacher, load_teacher
from fkd_ssl.teachers.state_dicts import weights_digest

MODULE = """
import torch
from torch import nn
from fkd_ssl.teachers import Teacher

class Net(nn.Module):
    pixels = 32
    def __init__(self, width=6):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 5)
    def forward(self, x):
        return self.conv(x).mean(dim=(2, 3))

def plain():
    return Net()
def weights(checkpoint=None):
    net = Net()
    if checkpoint is not None:
        net.load_state_dict(torch.load(checkpoint, weights_only=True))
    return net
def needs(checkpoint):
    return Net()
def teacher():
    return Teacher(Net(), nn.Identity(), name="special", shape=(6,), network="net", licence="mine", precision="bf16")
def fails():
    raise OSError("disk on fire")
def number():
    return 7
def softmaxed():
    network = nn.Sequential(Net(), nn.Softmax(dim=1))
    network.kind = "distribution"
    return network
def maps():
    return nn.Conv2d(3, 6, 5)
def picky():
    return nn.Linear(7, 7)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "own_teachers.py").write_text(MODULE)
    (tmp_path / "broken_teachers.py").write_text("1 / 0\n")
    (tmp_path / "needy_teachers.py").write_text("import surely_not_installed\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    yield tmp_path
    for name in ("own_teachers", "broken_teachers", "needy_teachers"):
        sys.modules.pop(name, None)


def test_a_network_of_ones_own_becomes_a_teacher(here: Path, crops: Any) -> None:
    teacher = load_teacher("own_teachers:plain")
    assert (teacher.info.name, teacher.info.spec.size, teacher.feature_dim, teacher.info.pixels) == ("plain", 6, 6, 32)
    assert (teacher.info.source, teacher.info.network) == ("own_teachers:plain", "Net")
    assert teacher.info.checkpoint_sha256 == weights_digest(teacher.backbone)  # a changed function gives another teacher
    torch.testing.assert_close(teacher.embed(crops).norm(dim=1), torch.ones(3))
    pixels = (crops / 255 - torch.tensor(teacher.info.mean).view(3, 1, 1)) / torch.tensor(teacher.info.std).view(3, 1, 1)
    torch.testing.assert_close(teacher.features(crops).clone(), teacher.backbone(pixels), rtol=1e-4, atol=1e-5)


def test_a_checkpoint_is_handed_to_the_function_and_noted(here: Path) -> None:
    from fkd_ssl.checkpoints import digest

    wanted = {"conv.weight": torch.ones(6, 3, 5, 5), "conv.bias": torch.zeros(6)}
    torch.save(wanted, here / "mine.pth")
    teacher = load_teacher("own_teachers:weights", checkpoint="mine.pth")
    assert torch.equal(teacher.backbone.conv.weight, wanted["conv.weight"])  # type: ignore[union-attr]
    assert (teacher.info.checkpoint, teacher.info.checkpoint_sha256) == ("mine.pth", digest(here / "mine.pth"))


def test_a_teacher_of_ones_own_is_taken_as_it_is(here: Path) -> None:
    teacher = load_teacher("own_teachers:teacher")
    assert isinstance(teacher, Teacher)
    assert (teacher.info.name, teacher.info.licence, teacher.info.precision) == ("special", "mine", "bf16")
    assert load_teacher("own_teachers:teacher", precision="fp16").info.precision == "fp16"


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("own_teachers:plane", RequestError, r"has no function 'plane'; did you mean own_teachers:plain\?"),
        ("own_techers:plain", RequestError, r"No module named 'own_techers' \(the current folder is on the path\)"),
        ("own_teachers:", RequestError, r"has no function ''"),
        (":plain", RequestError, r"teacher :plain: Empty module name"),
        ("needy_teachers:x", RequestError, r"No module named 'surely_not_installed'"),
        ("broken_teachers:x", FkdError, r"its module failed: ZeroDivisionError: division by zero"),
        ("own_teachers:fails", FkdError, r"OSError: disk on fire"),
        ("own_teachers:needs", FkdError, r"needs.*checkpoint"),
        ("own_teachers:number", FkdError, r"returned a int, expected a torch\.nn\.Module or a Teacher"),
        ("own_teachers:softmaxed", FkdError, r"returns probabilities, expected logits"),
        ("own_teachers:maps", FkdError, r"gives \[2, 6, 220, 220\] for .* expected one tensor \[2, D\]"),
        ("own_teachers:picky", FkdError, r"fails on \[2, 3, 224, 224\] floats: RuntimeError"),
    ],
)
def test_what_can_go_wrong_with_ones_own(here: Path, name: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        load_teacher(name)


def test_a_checkpoint_that_is_not_wanted_or_not_there(here: Path) -> None:
    with pytest.raises(RequestError, match=r"its function takes no checkpoint=; leave out --checkpoint"):
        load_teacher("own_teachers:plain", checkpoint="own_teachers.py")
    with pytest.raises(RequestError, match=r"gone\.pth: not found"):
        load_teacher("own_teachers:weights", checkpoint="gone.pth")


@pytest.mark.parametrize(("name", "near"), [("mocov3", "mocov2"), ("swaw", "swav"), ("swav_r50w4_800ep", "swav_r50w4_400ep")])
def test_a_misspelt_name_is_answered_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(RequestError, match=rf"{name}.*did you mean {near}\?"):
        load_teacher(name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_needs_a_checkpoint(family: str) -> None:
    with pytest.raises(RequestError, match=rf"teacher {family}: --checkpoint is needed"):
        load_teacher(family)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_that_is_not_here_says_where_it_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FKD_SSL_CACHE", str(tmp_path))
    place = rf"https://dl\.fbaipublicfiles\.com/\S+ \(licence: .*\).*{tmp_path}/\S+, or .*--checkpoint"
    said = rf"teachers fetch {name}; .*download {place}"
    with pytest.raises(RequestError, match=said):
        load_teacher(name)


def test_a_preset_is_found_in_the_cache_folder(kit: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FKD_SSL_CACHE", str(tmp_path))
    kit.save(tmp_path / PRESETS["swav_r50_800ep"].file, kit.hollow(kit.swav("resnet50", prototypes=3000)))
    teacher = load_teacher("swav_r50_800ep")
    assert (teacher.info.name, teacher.info.checkpoint) == ("swav_r50_800ep", "swav_800ep_pretrain.pth.tar")


@pytest.mark.parametrize(("layout", "std"), [("moco", (0.229, 0.224, 0.225)), ("swav", (0.228, 0.224, 0.225))])
def test_the_features_of_a_backbone_are_targets(kit: SimpleNamespace, write: Any, layout: str, std: Any) -> None:
    family = "mocov2" if layout == "moco" else "swav"
    state = kit.fill(getattr(kit, layout)("resnet18"))
    path = write(state)
    teacher = load_teacher(f"{family}@backbone", checkpoint=path)
    assert (teacher.info.name, teacher.info.spec.shape, dict(teacher.info.arrays)) == (f"{family}-backbone", (512,), {})
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    prefix = "module.encoder_q." if layout == "moco" else "module."
    expected = F.normalize(kit.forward(state, prefix, images, std, layout == "swav"), dim=1)
    torch.testing.assert_close(teacher.embed(images).double(), expected, atol=1e-5, rtol=0)
    with pytest.raises(RequestError, match=rf"teacher {family}@layer3: expected {family}@backbone, or {family}"):
        load_teacher(f"{family}@layer3", checkpoint=path)


def test_a_preset_is_held_against_the_shapes_and_the_md5(kit: SimpleNamespace, write: Any) -> None:
    path = write(kit.hollow(kit.moco("resnet18")))
    with pytest.raises(CheckpointError, match=r"holds a resnet18, .*mocov2_r50_800ep is a resnet50, .*--teacher mocov2"):
        load_teacher("mocov2_r50_800ep", checkpoint=path)
    path = write(kit.hollow(kit.moco("resnet50")))
    with pytest.raises(
        CheckpointError,
        match=r"its md5 begins with [0-9a-f]{8}, that of moco_v2_200ep_pretrain\.pth\.tar with 59fd9945.*--teacher mocov2",
    ):
        load_teacher("mocov2_r50_200ep", checkpoint=path)
    with pytest.raises(CheckpointError, match=r"30 prototypes; swav_r50_800ep is a resnet50, MLP with BatchNorm .*3000 prot"):
        load_teacher("swav_r50_800ep", checkpoint=write(kit.hollow(kit.swav("resnet50"))))
    path = write(kit.hollow(kit.swav("resnet50", prototypes=3000)))
    teacher = load_teacher("swav_r50_800ep", checkpoint=path)
    assert (teacher.info.name, teacher.info.source) == ("swav_r50_800ep", PRESETS["swav_r50_800ep"].url)
    assert "NC" in teacher.info.licence
    with pytest.raises(CheckpointError, match=r"holds a resnet50, .*swav_r50w2_400ep is a resnet50w2"):
        load_teacher("swav_r50w2_400ep", checkpoint=path)


def test_the_presets_are_of_known_families() -> None:
    for name, preset in PRESETS.items():
        assert preset.family in FAMILIES
        assert name.startswith(f"{preset.family}_")
        assert preset.url.endswith(preset.file)
        assert preset.file.endswith(".pth.tar")
    assert len({preset.file for preset in PRESETS.values()}) == len(PRESETS)


def test_the_page_on_teachers_shows_a_function_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crops: Any) -> None:
    page = (Path(__file__).parents[2] / "docs" / "teachers.md").read_text()
    (tmp_path / "page_teachers.py").write_text(page.split("```python\n")[1].split("```")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    torch.save(torch.nn.Sequential(torch.nn.Conv2d(3, 512, 32, stride=32)).state_dict(), tmp_path / "w.pth")
    teacher = load_teacher("page_teachers:clip", checkpoint=tmp_path / "w.pth")
    sys.modules.pop("page_teachers")
    assert (teacher.info.name, teacher.info.licence, teacher.embed(crops).shape) == ("clip", "mine", (3, 512))


def test_a_library_stands_before_a_slash_and_a_module_before_a_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's module may have the name of a library."""
    (tmp_path / "swav.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_teacher("swav:plain").info.source == "swav:plain"
    sys.modules.pop("swav")
    with pytest.raises(RequestError, match=r"torchvision has no such classifier"):
        load_teacher("torchvision/plain")


OWN = """
import sys
import torch
from torch import nn
from fkd_ssl.teachers import Teacher

class Net(nn.Module):
    pixels = 32
    def __init__(self, layer=None):
        super().__init__()
        self.layer = layer or nn.Linear(3 * 32 * 32, 4)
    def forward(self, x):
        return self.layer(x.flatten(1))

class Kept(nn.Linear):
    def get_extra_state(self):
        return {"a": 1}

def leaves():
    sys.exit(0)
def fixed():
    return Net()
def lazy():
    return Net(nn.LazyLinear(4))
def extra():
    return Net(Kept(3 * 32 * 32, 4))
def meta():
    return Net().to("meta")
def two_sides():
    net = Net()
    net.pixels = (32, 32)
    return net
def needs(checkpoint):
    return Net()
def takes_any(**options):
    return Net()
def own(**about):
    return Teacher(Net(), nn.Identity(), name="own", shape=(4,), network="net", pixels=32, **about)
def tensors():
    return own(mean=torch.full((3,), 0.5), std=torch.full((3,), 0.25), licence=None, source=__import__("pathlib").Path("x"))
def flat():
    return own(std=(0, 0, 0))
def short():
    return own(mean=0.5)
"""


class TestOwnMistakes:
    @pytest.fixture(autouse=True)
    def module(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        (tmp_path / "own_mistakes.py").write_text(OWN)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", list(sys.path))
        yield
        sys.modules.pop("own_mistakes", None)

    @pytest.mark.parametrize(
        ("name", "error", "message"),
        [
            ("leaves", FkdError, r"teacher own_mistakes:leaves: SystemExit: 0"),
            ("meta", FkdError, r"own_mistakes:meta: "),
            ("two_sides", FkdError, r"its pixels are \(32, 32\), expected one whole number"),
            ("needs", RequestError, r"--checkpoint is needed: the function takes checkpoint="),
            ("flat", FkdError, r"std \(0\.0, 0\.0, 0\.0\): must be positive"),
            ("short", FkdError, r"mean 0\.5: expected three numbers"),
        ],
    )
    def test_they_are_said(self, name: str, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            load_teacher(f"own_mistakes:{name}")

    @pytest.mark.parametrize("name", ["lazy", "extra", "tensors"])
    def test_unusual_networks_are_taken(self, name: str) -> None:
        teacher = load_teacher(f"own_mistakes:{name}")
        assert teacher.embed(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 4)
        assert len(teacher.info.checkpoint_sha256 or "") == 64
        assert all(type(value) is float for value in (*teacher.info.mean, *teacher.info.std))
        assert teacher.info.licence == "not stated"

    def test_a_function_of_any_options_takes_a_checkpoint(self, tmp_path: Path) -> None:
        (tmp_path / "w.pth").write_bytes(b"x")
        assert load_teacher("own_mistakes:takes_any", checkpoint=tmp_path / "w.pth").info.checkpoint == "w.pth"

    @pytest.mark.parametrize("error", [KeyError("x"), SystemExit(0), AttributeError("x")])
    def test_a_network_that_raises_anything_is_an_error(self, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
        def forward(_: torch.Tensor) -> torch.Tensor:
            raise error

        teacher = load_teacher("own_mistakes:fixed")
        monkeypatch.setattr(teacher.backbone, "forward", forward)
        with pytest.raises(FkdError, match=f"fails on crops of 32 x 32 px: {type(error).__name__}"):
            teacher.embed(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))

    def test_a_size_that_it_cannot_take_is_said_with_its_own(self) -> None:
        teacher = load_teacher("own_mistakes:fixed")
        with pytest.raises(FkdError, match=r"fails on crops of 40 x 24 px: RuntimeError: .*its native size is 32 \(--pixels\)"):
            teacher.features(torch.zeros(2, 3, 24, 40, dtype=torch.uint8))
