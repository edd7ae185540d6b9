"""docs/store-format.md is correct and complete: a reader written only from it reads what this library writes."""

import ast
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fkd_ssl.store import open_store

HERE = Path(__file__).parent
EXPECTED = json.loads((HERE / "golden" / "expected.json").read_text())


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


made, plain = load("made"), load("plain_reader")


def test_the_plain_reader_knows_nothing_of_this_library():
    nodes = ast.walk(ast.parse((HERE / "plain_reader.py").read_text()))
    imported = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    modules = {
        node.module for node in ast.walk(ast.parse((HERE / "plain_reader.py").read_text())) if isinstance(node, ast.ImportFrom)
    }
    assert imported | modules == {"hashlib", "json", "re", "numpy", "pathlib", "typing"}


def test_it_reads_the_golden_store():
    store = plain.read_store(HERE / "golden" / "format1")
    assert store["paths"] == EXPECTED["paths"]
    for row, crops in enumerate(EXPECTED["crops"]):
        assert [[float(value) for value in record.item()] for record in store["crops"][row]] == crops
    assert set(store["columns"]) == {"flat", "sq8"}
    for name, targets in store["columns"].items():
        np.testing.assert_allclose(targets, np.array(EXPECTED["targets"][name]), rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "store"
    made.make(folder)
    return folder


@pytest.mark.parametrize("spec", made.SPECS)
def test_it_decodes_every_family_of_codecs_as_faiss_does(folder: Path, spec: str):
    ours, read = open_store(folder), plain.read_store(folder)["columns"][made.name_of(spec)]
    for row in range(len(made.PATHS)):
        decoded = ours.targets(made.name_of(spec), row, slice(None))
        np.testing.assert_allclose(read[row], decoded, rtol=0, atol=2e-6)
        assert spec != "Flat" or (read[row] == decoded).all()


def test_every_code_of_few_bits_decodes_as_faiss_does():
    """All byte values, not only those that some targets are encoded to."""
    codes = np.random.default_rng(0).integers(0, 256, (4000, 256), dtype=np.uint8)
    for spec in ("SQ8", "SQ6", "SQ4", "PQ4x8", "PQ4x4", "PQ2x10", "OPQ4_8,PQ4x4", "PCA8,SQ4", "RR16,SQ6", "PQ8x5"):
        codec = made.random_codec(spec)
        some = np.ascontiguousarray(codes[:, : codec.code_size])
        found = plain.decode(spec, made.DIM, codec.arrays(), some)
        np.testing.assert_allclose(found, codec.decode(some), rtol=0, atol=2e-5)


def test_it_reads_the_rest(folder: Path):
    ours, read = open_store(folder), plain.read_store(folder)
    assert read["skipped"] == [made.SKIPPED]
    assert read["paths"] == made.PATHS
    np.testing.assert_array_equal(read["sizes"], ours.sizes)
    for row in ours.rows:
        np.testing.assert_array_equal(read["crops"][row], ours.crops(int(row), slice(None)))


def test_it_refuses_what_is_altered(folder: Path, tmp_path: Path):
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and "teacher-" not in path.name):
        copy = Path(shutil.copytree(folder, tmp_path / "copy"))
        data = bytearray((copy / path.relative_to(folder)).read_bytes())
        data[-5] ^= 4
        (copy / path.relative_to(folder)).write_bytes(data)
        with pytest.raises((AssertionError, ValueError, KeyError)):
            plain.read_store(copy)
        shutil.rmtree(copy)
