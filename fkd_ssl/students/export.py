"""A student's backbone, and a classifier's last layer, in the layout of a library, as safetensors."""

import copy
import json
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn

from fkd_ssl import files
from fkd_ssl.errors import RequestError
from fkd_ssl.students.backbones import AUXILIARY, REACTNETS, TIMM, has_dynamic_size, last_layer, make_backbone
from fkd_ssl.students.heads import CLASSIFIER
from fkd_ssl.students.saved import EXPORTED, LAST_LAYER, STUDENT_KEY
from fkd_ssl.students.student import Student

Layout = Literal["torchvision", "timm"]
_TWINS = {"mobilenet_v2": "mobilenetv2_100"}  # networks that timm calls otherwise
_EXACT = 1e-6
_OWN_LAST = "head.0"  # what the last layer is called where the library has no place for it


def export(student: Student, path: Path, *, layout: Layout | None, pixels: int) -> str:
    """Writes a backbone's weights under the library's own names, without a projection head.

    Another library's layout is found by laying both networks' weights side by side, and is written only if its network then
    gives the same features. The last layer of a student of class probabilities is written too: as the library's own, where its
    network ends in one linear layer on these features.

    Args:
        student: In eval mode.
        path: The file; one that is there is never overwritten.
        layout: Whose; the student's own library's by default.
        pixels: Side of the crops that it was trained on, for the file's metadata.

    Returns:
        The line of Python that loads it.

    Raises:
        RequestError: The library has no such network, or the file is not called .safetensors.
        StoreError: The file exists with other content.
    """
    if path.suffix != EXPORTED:
        raise RequestError(f"out {path}: the file is one of safetensors; call it {path.with_suffix(EXPORTED)}")
    name, about = str(student.made_of["name"]), dict(student.made_of)
    head = about.pop("head", None)
    own = library(name)
    weights = {key: value.detach().cpu().contiguous() for key, value in student.backbone.state_dict().items()}
    if layout is not None and layout != own:
        about["name"], weights = _translated(student, layout, weights)
    if head == CLASSIFIER:
        about |= {"head": head, "dim": student.dims[0]}
        last = last_layer(str(about["name"]), student.dims[0], student.feature_dim, weights)
        about[LAST_LAYER] = last or _OWN_LAST
        for key, value in student.head[-1].state_dict().items():
            weights[f"{about[LAST_LAYER]}.{key}"] = value.detach().cpu().contiguous()
    metadata = {STUDENT_KEY: json.dumps({**about, "pixels": pixels}, sort_keys=True)}
    with files.publish(path) as file:
        file.write(safetensors.torch.save(weights, metadata))
    return loading(about, path)


def library(name: str) -> str:
    """Whose network a student's name means: torchvision, timm or fkd_ssl."""
    return "fkd_ssl" if name in REACTNETS else "timm" if name.startswith(TIMM) else "torchvision"


def loading(made_of: dict[str, Any], path: Path) -> str:
    """The line of Python that loads an exported file of such a student into its library's network."""
    name, classes = str(made_of["name"]), made_of.get("dim")
    unusual = set(made_of) - {"name", "head", "dim", LAST_LAYER}  # another stem or width than the library's
    foreign = made_of.get(LAST_LAYER) == _OWN_LAST  # a last layer that the library's network has not
    if unusual or foreign or name in REACTNETS or name.startswith("mnasnet"):  # whose layers ask for a version that no file has
        return f'student, pixels = fkd_ssl.load_student("{path}")'
    if name.startswith(TIMM):
        sizes = ", dynamic_img_size=True" if has_dynamic_size(name) else ""
        theirs = name.removeprefix(TIMM)
        return f'model = timm.create_model("{theirs}", num_classes={classes or 0}{sizes}, checkpoint_path="{path}")'
    if classes:
        more = ", aux_logits=False, init_weights=False" if name in AUXILIARY else ""
        return (
            f"model = torchvision.models.{name}(num_classes={classes}{more}); "
            f'model.load_state_dict(safetensors.torch.load_file("{path}"))'
        )
    return (
        f'model = torchvision.models.{name}(); model.load_state_dict(safetensors.torch.load_file("{path}"), strict=False)'
        "  # all but the classifier"
    )


def _translated(student: Student, layout: Layout, weights: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """The name of the other library's network, and the weights by its names."""
    name = str(student.made_of["name"])
    if layout == "timm":
        other = f"{TIMM}{_TWINS.get(name, name)}"
    else:
        bare = name.removeprefix(TIMM).partition(".")[0]
        other = {theirs: ours for ours, theirs in _TWINS.items()}.get(bare, bare)
    refused = f"layout {layout}: {layout} has no network that is the same as {name}; leave --layout out"
    if name in REACTNETS:
        raise RequestError(refused)
    try:
        twin, _ = make_backbone(other, stem=student.made_of.get("stem", "standard"), width=student.made_of.get("width", 1.0))
    except RequestError as error:
        raise RequestError(f"{refused} ({error})") from error
    theirs = twin.state_dict()
    if [v.shape for v in theirs.values()] != [v.shape for v in weights.values()]:
        raise RequestError(refused)
    renamed = dict(zip(theirs, weights.values(), strict=True))
    twin.load_state_dict(renamed)
    if not _same(student.backbone, twin):
        raise RequestError(refused)
    return other, renamed


def _same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks give the same features of noise, in double precision."""
    noise = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        a, b = (copy.deepcopy(network).cpu().double().eval()(noise) for network in (one, other))
    return a.shape == b.shape and bool((a - b).abs().max() <= _EXACT * a.abs().max())
