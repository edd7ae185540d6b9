"""Export of a student to ONNX: its features and its last map, with the normalisation of the pixels."""

import contextlib
import copy
import importlib.util
import io
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fkd_ssl import files
from fkd_ssl.errors import FkdError, RequestError
from fkd_ssl.maps import features_and_map
from fkd_ssl.students.heads import CLASSIFIER
from fkd_ssl.students.saved import STUDENT_KEY
from fkd_ssl.students.student import Student
from fkd_ssl.text import first_line

ONNX = ".onnx"
OPSET = 18
"""Version of the operators; onnxruntime 1.14 and later have it."""
TOLERANCE = 1e-4
"""Accepted difference of onnxruntime's outputs, relative to the largest value."""
PREPROCESSING = "images: RGB, uint8 [batch, 3, height, width], not normalised (the graph does that)"


class _Outputs(nn.Module):
    """The outputs of the file, by name."""

    def __init__(self, student: Student, pixels: int) -> None:
        super().__init__()
        self.student = student
        self.names = ["features"]
        try:
            with torch.no_grad():
                features_and_map(student.backbone, torch.zeros(1, 3, pixels, pixels))
            self.names.append("map")
        except RequestError:
            pass  # no map at this size
        except Exception as error:  # a network may raise anything
            raise RequestError(
                f"student {student.spec['name']}: fails on images of {pixels} px: {first_line(error):.200}; choose another size"
            ) from error
        if student.spec.get("head") == CLASSIFIER:
            self.names.append("logits")

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        given = (images.float() - self.student.mean) / self.student.std
        found = features_and_map(self.student.backbone, given) if "map" in self.names else (self.student.backbone(given),)
        return (*found, self.student.head(found[0])) if "logits" in self.names else (*found,)


def export_onnx(student: Student, path: Path, *, pixels: int) -> tuple[str, bool]:
    """Writes a student as ONNX, in float32, with a dynamic batch size.

    Input `images`: uint8 [batch, 3, P, P]; the mean and std are part of the graph. Outputs: `features` [batch, F]; `map`
    [batch, F, h, w] if the backbone has one; `logits` [batch, K] of a classifier. The metadata describe the student and the
    preprocessing. If onnxruntime is installed, its outputs for noise are compared with those of torch before the file is
    written.

    Args:
        student: A copy of it is exported, in eval mode.
        path: File to write; an existing file is never overwritten.
        pixels: P.

    Returns:
        A line of Python code that runs the file, and whether it was compared.

    Raises:
        RequestError: onnx or onnxscript is not installed, the file exists, the network does not accept P, or torch cannot
            export it.
        FkdError: onnxruntime gives other outputs.
    """
    if path.exists():
        raise RequestError(f"out {path}: the file exists; remove it or choose another file")
    if missing := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
        raise RequestError(f"out {path}: {' and '.join(missing)} not installed: pip install 'fkd_ssl[onnx]'")
    network = _Outputs(copy.deepcopy(student).cpu().float().eval(), pixels).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 3, pixels, pixels), dtype=torch.uint8, generator=generator)
    model = _converted(network, images[:2])
    model.metadata_props.add(key=STUDENT_KEY, value=json.dumps({**student.spec, "pixels": pixels}, sort_keys=True))
    model.metadata_props.add(key="preprocessing", value=PREPROCESSING)
    data: bytes = model.SerializeToString()
    compared = importlib.util.find_spec("onnxruntime") is not None
    if compared:
        _compare(data, network, images)
    with files.create(path) as file:
        file.write(data)
    line = f'{", ".join(network.names)} = onnxruntime.InferenceSession("{path}").run(None, {{"images": images}})'
    return line.replace("features =", "features, =", 1) if len(network.names) == 1 else line, compared


def _converted(network: _Outputs, images: Tensor) -> Any:
    """Returns the network as an onnx.ModelProto."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network,
                (images,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=network.names,
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                verbose=False,
            )
    except Exception as error:  # torch may raise anything for a network that it cannot trace
        raise _refused(network, first_line(error.__cause__ or error)) from error
    assert program is not None
    model = program.model_proto
    if not model.graph.input[0].type.tensor_type.shape.dim[0].dim_param:  # torch then traces for the given batch only
        raise _refused(network, "its computation depends on the number of images or on their values")
    graph = model.graph
    for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("metadata_props")  # torch's stack traces, which have the paths of this machine's files
    return model


def _refused(network: _Outputs, reason: str) -> RequestError:
    name = network.student.spec["name"]
    return RequestError(f"student {name}: torch cannot export it to ONNX: {reason:.200}; export .safetensors instead")


def _compare(data: bytes, network: _Outputs, images: Tensor) -> None:
    """Raises FkdError if onnxruntime gives other outputs than torch, for a batch of another size than the traced one."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        found = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(
            None, {"images": images.numpy()}
        )
    except Exception as error:  # onnxruntime has no public base class of its errors
        raise FkdError(f"onnxruntime cannot run the exported network: {first_line(error):.200}") from error
    with torch.no_grad():
        expected = network(images)
    for name, one, other in zip(network.names, found, expected, strict=True):
        difference = float((torch.from_numpy(one) - other).abs().max() / other.abs().max().clamp(min=1e-12))
        if one.shape != tuple(other.shape) or not difference <= TOLERANCE:
            raise FkdError(
                f"onnxruntime's {name} differ from torch's by {difference:.1e} of the largest value, more than {TOLERANCE:g}; "
                "nothing was written"
            )
