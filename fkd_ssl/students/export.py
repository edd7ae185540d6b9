"""Export of a student's backbone, and a classifier's last layer, to safetensors in the layout of a library."""

import copy
import json
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn

from fkd_ssl import files
from fkd_ssl.errors import RequestError
from fkd_ssl.options import OBJECT
from fkd_ssl.students.backbones import AUXILIARY, REACTNETS, TIMM, has_dynamic_size, last_layer, make_backbone
from fkd_ssl.students.heads import CLASSIFIER
from fkd_ssl.students.saved import EXPORTED, LAST_LAYER, STUDENT_KEY
from fkd_ssl.students.student import Student

Layout = Literal["torchvision", "timm"]
_TWINS = {"mobilenet_v2": "mobilenetv2_100"}  # networks with another name in timm
_EXACT = 1e-6
_OWN_LAST = "head.0"  # name of the last layer if the library's network has no layer for it


def export(student: Student, path: Path, *, layout: Layout | None, pixels: int) -> str:
    """Writes a backbone's weights with the library's names, without the projection head.

    The layout of another library is found by pairing the weights of both networks in order, and is written only if its network
    then gives the same features. The last layer of a classifier is also written, under the library's name if its network ends
    in one linear layer on these features.

    Args:
        student: Student in eval mode.
        path: File to write; an existing file is never overwritten.
        layout: Library that defines the names; by default the library of the student.
        pixels: Side of the crops that it was trained on, for the file's metadata.

    Returns:
        A line of Python code that loads the file.

    Raises:
        RequestError: The library does not have the network, or the file name does not end in .safetensors.
        StoreError: The file exists with other content.
    """
    if path.suffix != EXPORTED:
        raise RequestError(f"out {path}: expected a .safetensors or .onnx file; write --out {path.with_suffix(EXPORTED)}")
    name, description = str(student.spec["name"]), dict(student.spec)
    head = description.pop("head", None)
    own = library(name)
    weights = {key: value.detach().cpu().contiguous() for key, value in student.backbone.state_dict().items()}
    if layout is not None and layout != own:
        description["name"], weights = _translated(student, layout, weights)
    if head == CLASSIFIER:
        description |= {"head": head, "dim": student.dim}
        last = last_layer(str(description["name"]), student.dim, student.feature_dim, weights)
        description[LAST_LAYER] = last or _OWN_LAST
        for key, value in student.head[-1].state_dict().items():
            weights[f"{description[LAST_LAYER]}.{key}"] = value.detach().cpu().contiguous()
    metadata = {STUDENT_KEY: json.dumps({**description, "pixels": pixels}, sort_keys=True)}
    with files.create(path) as file:
        file.write(safetensors.torch.save(weights, metadata))
    return loading_code(description, path)


def library(name: str) -> str:
    """The library of a student's network: torchvision, timm, or fkd_ssl for others."""
    return "fkd_ssl" if name in REACTNETS or name.startswith(OBJECT) else "timm" if name.startswith(TIMM) else "torchvision"


def loading_code(spec: dict[str, Any], path: Path) -> str:
    """A line of Python code that loads an exported file into the library's network."""
    name, classes = str(spec["name"]), spec.get("dim")
    if name.startswith(OBJECT):
        load = (
            'fkd_ssl.load_student("{}", backbone=network)'
            if classes
            else 'network.load_state_dict(safetensors.torch.load_file("{}"))'
        )
        return f"{load.format(path)}  # network: a {name.removeprefix(OBJECT)}"
    changed = set(spec) - {"name", "head", "dim", LAST_LAYER}  # a stem or width that the library does not have
    foreign = spec.get(LAST_LAYER) == _OWN_LAST  # the library's network lacks this last layer
    # mnasnet's layers need a version number, which a safetensors file cannot have
    if changed or foreign or name in REACTNETS or name.startswith("mnasnet"):
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
    """Returns the name of the network in the other library, and the weights by its names."""
    name = str(student.spec["name"])
    if layout == "timm":
        other = f"{TIMM}{_TWINS.get(name, name)}"
    else:
        bare = name.removeprefix(TIMM).partition(".")[0]
        other = {theirs: ours for ours, theirs in _TWINS.items()}.get(bare, bare)
    refused = f"layout {layout}: {layout} has no network identical to {name}; leave out --layout"
    if library(name) == "fkd_ssl":
        raise RequestError(refused)
    try:
        twin, _ = make_backbone(other, stem=student.spec.get("stem", "standard"), width=student.spec.get("width", 1.0))
    except RequestError as error:
        raise RequestError(refused) from error
    theirs = twin.state_dict()
    if [v.shape for v in theirs.values()] != [v.shape for v in weights.values()]:
        raise RequestError(refused)
    renamed = dict(zip(theirs, weights.values(), strict=True))
    twin.load_state_dict(renamed)
    if not _same(student.backbone, twin):
        raise RequestError(refused)
    return other, renamed


def _same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks give the same features for noise, in double precision."""
    noise = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        a, b = (copy.deepcopy(network).cpu().double().eval()(noise) for network in (one, other))
    return a.shape == b.shape and bool((a - b).abs().max() <= _EXACT * a.abs().max())
