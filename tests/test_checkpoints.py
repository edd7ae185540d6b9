"""Checkpoints: files of common training scripts load; files that would run code or fill the memory are rejected."""

import argparse
import collections
import hashlib
import os
import pathlib
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fkd_ssl import checkpoints
from fkd_ssl.errors import CheckpointError
from fkd_ssl.students import load_student
from fkd_ssl.teachers import load_teacher


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_never_run(tmp_path: Path, zipped: bool) -> None:
    file = tmp_path / "bad.pth.tar"
    torch.save({"state_dict": Bomb(tmp_path / "boom")}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"mkdir.*nothing in a checkpoint is executed.*save its state_dict alone"):
        checkpoints.load(file)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_what_training_scripts_leave_beside_the_weights_is_inert(tmp_path: Path, zipped: bool) -> None:
    file = tmp_path / "training.pth.tar"
    weight = torch.arange(6.0).view(2, 3)
    left = {
        "args": argparse.Namespace(lr=0.1, names=["a"]),
        "optimizer": {"param_groups": [{"lr": np.float64(0.3)}], "state": {0: {"momentum_buffer": weight}}},
        "best": np.array([1.0, 2.0]),
        "epoch": np.int64(3),
    }
    torch.save({"state_dict": OrderedDict({"module.w": weight}), **left}, file, _use_new_zipfile_serialization=zipped)
    before = set(torch.serialization.get_safe_globals())
    saved = checkpoints.load(file)
    assert set(torch.serialization.get_safe_globals()) == before
    assert (type(saved["args"]).__name__, vars(saved["args"])) == ("Namespace", {})
    assert torch.equal(saved["state_dict"]["module.w"], weight)
    assert checkpoints.digest(file) == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "content", [b"not a checkpoint at all", b"\xff" * 64, b"PK\x03\x04 no zip", b"\x08" + b"\0" * 7 + b"{oops!!!"]
)
def test_foreign_files_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "foreign").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"foreign: cannot be read as a checkpoint"):
        checkpoints.load(tmp_path / "foreign")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"<!DOCTYPE html><p>please log in", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "it is a Git LFS pointer"),
        (b"oh no", "not a file of torch.save"),
    ],
)
def test_what_is_no_checkpoint_is_said_and_unpickling_is_not_advised(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(CheckpointError, match=what) as error:
        checkpoints.load(tmp_path / "file")
    assert "weights_only" not in str(error.value)


class Settings(dict[str, Any]):
    """A subclass of dict with state, like Lightning's AttributeDict and OmegaConf's DictConfig."""

    def __init__(self, **items: Any) -> None:
        super().__init__(items)
        self.note = "x"


class Options(list[Any]):
    """A subclass of list without state."""


BESIDE: dict[str, Any] = {
    "path": pathlib.PurePosixPath("runs/1"),
    "defaultdict": collections.defaultdict(list, {"a": [1]}),
    "attribute_dict": Settings(lr=0.1),
    "list": Options([1, 2]),
    "deque": collections.deque([1, 2]),
    "namespace": argparse.Namespace(lr=0.1),
    "numpy_scalar": np.float64(0.3),
    "numpy_array": np.arange(3),
    "dtype": torch.float16,
    "counter": collections.Counter([1, 1]),
    "bytes": b"abc",
    "set": {1, 2},
    "size": torch.Size([1, 2]),
    "device": torch.device("cpu"),
    "layer": nn.Linear(2, 2),
    "function": torch.nn.functional.relu,
    "complex": 1j,
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("what", BESIDE)
def test_objects_beside_the_weights_do_not_matter(tmp_path: Path, what: str, zipped: bool) -> None:
    if what == "layer" and not zipped:
        pytest.skip("the format of PyTorch before 1.6 keeps the source of modules")
    weight = torch.arange(6.0).view(2, 3)
    saved = {"state_dict": {"w": weight}, what: BESIDE[what]}
    torch.save(saved, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    found = checkpoints.load(tmp_path / "w.pth")
    assert torch.equal(found["state_dict"]["w"], weight)
    if what in ("bytes", "set", "size", "device", "complex", "counter", "dtype"):
        assert found[what] == BESIDE[what]
    else:
        assert type(found[what]) is not type(BESIDE[what])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_come_back(tmp_path: Path, dtype: torch.dtype, zipped: bool) -> None:
    whole = torch.arange(24).to(dtype).view(4, 6)
    saved = {"whole": whole, "view": whole[1:3, ::2], "turned": whole.t(), "none": whole[:0], "number": whole[0, 0].clone()}
    torch.save(saved, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    found = checkpoints.load(tmp_path / "w.pth")
    assert found["whole"].dtype == dtype
    assert all(torch.equal(found[key], value) for key, value in saved.items())


class Call:
    """Pickled as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def doubled(times: int) -> Any:
    value: Any = b"x"
    for _ in range(times):
        value = Call(codecs_encode, value, "hex")
    return value


codecs_encode = __import__("codecs").encode
LONG = "x" * 1000
MANY = [1] * 1000
NESTED = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
HUGE = 2**40
ATTACKS: dict[str, Any] = {
    "bytearray": Call(bytearray, HUGE),
    "tensor_type": Call(torch.FloatTensor, HUGE),
    "tensor": Call(torch.Tensor, HUGE),
    "untyped_storage": Call(torch.UntypedStorage, HUGE),
    "stride_0": torch.zeros(1).expand(HUGE),
    "stride_0_by_call": Call(torch._utils._rebuild_tensor_v2, torch.ones(1).storage(), 0, (HUGE,), (0,), False, OrderedDict()),
    "meta": torch.empty(HUGE, device="meta"),
    "nested": NESTED,
    "sparse": torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1), (HUGE,)),
    "hex_of_hex": doubled(40),
    "same_string_in_many_calls": [Call(codecs_encode, LONG, "latin1") for _ in range(20_000)],
    "same_list_in_many_sets": [Call(set, MANY) for _ in range(20_000)],
    "same_list_in_many_shapes": [Call(torch.Size, MANY) for _ in range(20_000)],
    "subclass": Call(torch._tensor._rebuild_from_type_v2, bytearray, bytearray, (HUGE,), {}),
    "quantized": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "numpy": Call(np.zeros(0).__reduce__()[0], np.ndarray, (HUGE,), b"b"),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.filterwarnings("ignore")
def test_nothing_takes_more_memory_than_the_file_has_bytes(tmp_path: Path, attack: str, zipped: bool) -> None:
    file = tmp_path / "bad.pth"
    torch.save({"state_dict": {"w": torch.ones(3)}, "other": ATTACKS[attack]}, file, _use_new_zipfile_serialization=zipped)
    if attack == "numpy":  # a name that is not needed
        assert type(checkpoints.load(file)["other"]).__name__ == "_reconstruct"
        with pytest.raises(CheckpointError, match=r"_reconstruct with another shape than \(0,\)"):
            checkpoints.load(file, allowed={ATTACKS[attack].call[0].__module__ + "._reconstruct": None})
        return
    with pytest.raises(CheckpointError, match=r"nothing in a checkpoint is executed") as error:
        checkpoints.load(file)
    assert "weights_only" not in str(error.value)


def test_what_a_storage_says_of_its_length_is_held_against_the_file(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    torch.save({"w": torch.ones(1000)}, file, _use_new_zipfile_serialization=False)
    number = struct.pack("<H", 1000)
    data = file.read_bytes()
    huge = data.replace(b"M" + number, b"J" + struct.pack("<i", 2**30))
    assert huge != data
    file.write_bytes(huge)
    with pytest.raises(CheckpointError, match=r"its tensors need 4,294,967,296 bytes, but the file has [\d,]+"):
        checkpoints.load(file)


@pytest.mark.parametrize("mapped", [True, False])
def test_a_storage_that_is_longer_than_its_entry_is_refused(tmp_path: Path, mapped: bool) -> None:
    file = tmp_path / "w.pth"
    torch.save({"w": torch.ones(1000), "other": torch.ones(100_000)}, file)
    data = file.read_bytes()
    number = b"M" + struct.pack("<H", 1000)
    assert data.count(number) == 2  # of the storage, and of the tensor over it
    with zipfile.ZipFile(file) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries:
            archive.writestr(name, content.replace(number, b"M" + struct.pack("<H", 50_000)))
    with pytest.raises(CheckpointError, match=r"needs 200,000 bytes of its entry data/0, which is shorter"):
        checkpoints.load(file, mapped=mapped)


def rewritten(file: Path, change: Any) -> None:
    """Rewrites the entries of a zip with `change(archive, entries)`."""
    with zipfile.ZipFile(file) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(file, "w") as archive:
        change(archive, entries)


def deflated(archive: zipfile.ZipFile, entries: list[tuple[str, bytes]]) -> None:
    for name, data in entries:
        archive.writestr(name, data, zipfile.ZIP_DEFLATED)


def twice(archive: zipfile.ZipFile, entries: list[tuple[str, bytes]]) -> None:
    for name, data in [*entries, (entries[0][0].upper(), b"other")]:
        archive.writestr(name, data)


def commented(archive: zipfile.ZipFile, entries: list[tuple[str, bytes]]) -> None:
    for name, data in entries:
        archive.writestr(name, data)
    archive.comment = b"PK\5\6 another end"


@pytest.mark.parametrize(
    ("change", "said"),
    [(deflated, "has compressed entries"), (twice, "cannot be read as a checkpoint"), (commented, "cannot be read as a check")],
)
def test_zips_that_torch_does_not_write_are_refused(tmp_path: Path, change: Any, said: str) -> None:
    file = tmp_path / "w.pth"
    torch.save({"w": torch.zeros(1_000_000)}, file)
    rewritten(file, change)
    with pytest.raises(CheckpointError, match=said):
        checkpoints.load(file)


def test_entries_that_lie_over_one_another_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    torch.save({f"w{i}": torch.full((1000,), float(i)) for i in range(100)}, file)
    data = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        start, entries = archive.start_dir, {entry.filename: entry.header_offset for entry in archive.infolist()}
    first = entries["w/data/0"] if "w/data/0" in entries else min(entries.values())
    at = data.find(b"PK\1\2", start)
    while at >= 0:  # each entry of the list claims to be large
        data[at + 20 : at + 28] = struct.pack("<LL", 400_000, 400_000)
        at = data.find(b"PK\1\2", at + 4)
    assert first >= 0
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"its entries have [\d,]+ bytes, but the file has [\d,]+"):
        checkpoints.load(file)


def test_a_header_of_safetensors_that_fills_the_file_is_refused(tmp_path: Path) -> None:
    header = (b'{"__metadata__":{' + b",".join(b'"%d":"x"' % i for i in range(900_000)) + b"}}").ljust(9_000_000)
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match=r"has a header of [\d,]+ bytes; the maximum is 8,388,608"):
        checkpoints.load(tmp_path / "w.safetensors")


@pytest.mark.parametrize("protocol", [0, 4, 5])
def test_other_protocols_are_refused_plainly(tmp_path: Path, protocol: int) -> None:
    torch.save({"w": torch.ones(2), "s": {1}}, tmp_path / "w.pth", pickle_protocol=protocol)
    with pytest.raises(CheckpointError, match=r"pickle's opcode|cannot be read as a checkpoint"):
        checkpoints.load(tmp_path / "w.pth")


def test_a_whole_network_is_asked_for_its_state_dict(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=r"holds a Linear, expected a dict of weights: save its state_dict"):
        load_teacher("mocov2", checkpoint=tmp_path / "net.pth")


@pytest.mark.parametrize("attack", ["bytearray", "stride_0", "nested"])
def test_students_are_read_by_the_same_rules(tmp_path: Path, attack: str) -> None:
    torch.save({"state_dict": {"w": ATTACKS[attack]}}, tmp_path / "evil.ckpt")
    with pytest.raises(CheckpointError, match=r"nothing in a checkpoint is executed"):
        load_student(tmp_path / "evil.ckpt")


def test_little_memory_is_said_and_no_batch_size_is_advised(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(50_000_000)}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    code = (
        "import resource, sys, torch\nfrom fkd_ssl import cli\nfrom fkd_ssl.students import export\n"
        "from fkd_ssl.commands import console, resolve\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 100_000_000,) * 2)\n"
        "sys.exit(cli.main(['export', '--model', sys.argv[1], '--out', sys.argv[1] + '.safetensors']))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "w.pth")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "w.pth: not enough memory to load its 200,000," in done.stderr
    assert "batch_size" not in done.stderr
