"""Bounds the memory that a file of torch.save can take, by reading its pickle without running it.

`torch.load(weights_only=True)` executes no code of the file, but it allocates what the file asks for: `bytearray(2**36)`,
`torch.FloatTensor(2**31)`, or a tensor of stride 0 that fills the memory when it is copied. Therefore `scan` reads the pickle
first, and keeps the stack that the unpickler would have. It allows only the calls that tensors and plain values need, and only
if their arguments bound the size of the result.
"""

import math
import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, BinaryIO


class UnsafePickleError(Exception):
    """The pickle needs something that a checkpoint of weights does not need; the message says what."""


# Names of the calls that make tensors and plain values. They copy their arguments, whose size therefore bounds the result.
_TENSORS = {f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3")}
_PARAMETERS = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
_VALUES = {
    "collections.OrderedDict",
    "collections.Counter",
    "torch.Size",
    "torch.device",
    "torch.serialization._get_layout",
    "builtins.set",
    "builtins.complex",
}
_BYTES = "_codecs.encode"  # how protocol 2 encodes bytes
# Modules whose names torch's unpickler looks up itself. A name from another module is replaced by a stand-in.
_RUN_BY_TORCH = {
    "torch",
    "torch._utils",
    "torch._tensor",
    "torch.storage",
    "torch.serialization",
    "torch.nn.parameter",
    "torch.sparse",
    "torch.cuda",
    "torch.cuda.sparse",
}
_ITEM_BYTES = {
    **dict.fromkeys(("ByteStorage", "CharStorage", "BoolStorage", "QUInt8Storage", "QInt8Storage", "UntypedStorage"), 1),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    **dict.fromkeys(("FloatStorage", "IntStorage", "QInt32Storage"), 4),
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    "ComplexDoubleStorage": 16,
}
_CONSTANTS = {
    "NONE",
    "NEWFALSE",
    "NEWTRUE",
    "BININT",
    "BININT1",
    "BININT2",
    "BINFLOAT",
    "BINUNICODE",
    "SHORT_BINSTRING",
    "LONG1",
}
_MAX_SIZE = 2**62  # limits sums: nested tuples that each contain the previous one twice grow exponentially


@dataclass(eq=False, slots=True)
class _Node:
    """What is known about a value of the pickle."""

    kind: str
    """One of constant, tuple, container, global and storage, or the name of the call that made it."""
    value: Any = None
    """The constant, the tuple's items, the global's name, or the storage's number of elements."""
    size: int = 1
    """Upper bound of the size of a copy, in items or bytes."""


@dataclass(eq=False, slots=True)
class Names:
    """The names and storages in the pickles of a file.

    Attributes:
        stand_ins: Names that the weights do not need, each with the kind of its stand-in: object, dict or list.
        storage_bytes: Bytes of each storage, by key.
    """

    stand_ins: dict[str, str] = field(default_factory=dict)
    storage_bytes: dict[str, int] = field(default_factory=dict)


def scan(stream: BinaryIO, length: int, names: Names, allowed: Collection[str] = ()) -> None:
    """Reads one pickle from `stream` and adds its contents to `names`.

    Args:
        stream: Positioned at the start of a pickle; afterwards at its end.
        length: Maximum number of bytes of the pickle.
        names: Receives the names and storages.
        allowed: Names of further functions and types that torch may call with arguments of bounded size.

    Raises:
        UnsafePickleError: The pickle makes other calls, or needs much more memory than its size.
        Exception: The pickle is damaged.
    """
    scanner = _Scanner(names, allowed)
    for opcode, argument, _ in pickletools.genops(stream):
        scanner.step(opcode.name, argument)
    if scanner.copied > 16 * length + 2**20:  # a string can be stored once and copied by many calls
        raise UnsafePickleError("copies the same values over and over")


class _Scanner:
    """The stack of an unpickler, with what is known about each value."""

    def __init__(self, names: Names, allowed: Collection[str]) -> None:
        self.names = names
        self.allowed = allowed
        self.stack: list[_Node] = []
        self.outer: list[list[_Node]] = []
        self.memo: dict[int, _Node] = {}
        self.copied = 0

    def step(self, opcode: str, argument: Any) -> None:
        """Applies one opcode to the stack."""
        stack = self.stack
        if opcode in _CONSTANTS:
            stack.append(_Node("constant", argument, len(argument) if isinstance(argument, str) else 1))
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif opcode == "MARK":
            self.outer.append(stack)
            self.stack = []
        elif opcode in ("TUPLE", "EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            count = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}.get(opcode)
            items = self._marked() if count is None else [stack.pop() for _ in range(count)][::-1]
            self.stack.append(_Node("tuple", items, min(_MAX_SIZE, 1 + sum(item.size for item in items))))
        elif opcode in ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"):
            stack.append(_Node("container"))
        elif opcode in ("APPEND", "APPENDS", "SETITEM", "SETITEMS"):
            count = {"APPEND": 1, "SETITEM": 2}.get(opcode)
            items = self._marked() if count is None else [stack.pop() for _ in range(count)]
            target = self.stack[-1]
            target.size = min(_MAX_SIZE, target.size + sum(item.size for item in items))
            if target.kind in self.names.stand_ins:
                self.names.stand_ins[target.kind] = "dict" if opcode.startswith("SETITEM") else "list"
        elif opcode == "GLOBAL":
            stack.append(_Node("global", self._name(argument)))
        elif opcode in ("REDUCE", "NEWOBJ"):
            arguments, function = stack.pop(), stack.pop()
            stack.append(self._call(function, arguments))
        elif opcode == "BUILD":
            state, target = stack.pop(), stack[-1]
            if target.kind not in (*self.names.stand_ins, *self.allowed, "collections.OrderedDict"):
                raise UnsafePickleError(f"sets the state of a {target.kind}")
            self.copied += state.size
        elif opcode == "BINPERSID":
            stack.append(self._storage([item.value for item in stack.pop().value]))
        elif opcode not in ("PROTO", "STOP"):
            raise UnsafePickleError(f"uses pickle's opcode {opcode}: save it again with torch.save's own pickle protocol, 2")

    def _marked(self) -> list[_Node]:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def _name(self, argument: str) -> str:
        """Returns a global's name as torch's unpickler writes it; records it if it needs a stand-in."""
        module, _, name = argument.partition(" ")
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full = f"{module}.{name}"
        if module in ("os", "posix", "nt", "sys"):
            raise UnsafePickleError(f"names {full}")
        known = full in (*_VALUES, _BYTES, "builtins.bytearray") or full in self.allowed or module in _RUN_BY_TORCH
        if not known:
            self.names.stand_ins.setdefault(full, "object")
        return full

    def _call(self, function: _Node, arguments: _Node) -> _Node:
        name, given = function.value, arguments.value
        if function.kind != "global" or arguments.kind != "tuple":
            raise UnsafePickleError("calls an object that is not a named function")
        if name in self.names.stand_ins:
            return _Node(name)
        if name in _TENSORS:
            storage, shape = given[0], [item.value for item in given[2].value]
            if storage.kind != "storage" or math.prod(shape) > storage.value:
                raise UnsafePickleError(f"holds a tensor {shape} over a storage of {storage.value} numbers")
        elif name == _BYTES:
            text, encoding = (item.value for item in given)
            if not isinstance(text, str) or encoding != "latin1":
                raise UnsafePickleError(f"calls {name} with {encoding!r:.40}")
        elif name.endswith("._reconstruct") and name in self.allowed:
            if [item.value for item in given[1].value] != [0]:
                raise UnsafePickleError(f"calls {name} with another shape than (0,)")
        elif name == "numpy.ndarray" or name not in (*_VALUES, *_PARAMETERS, *self.allowed):
            raise UnsafePickleError(f"calls {name}")
        self.copied += arguments.size
        return _Node(name, size=arguments.size)

    def _storage(self, given: list[Any]) -> _Node:
        """Returns the storage for the tuple that torch writes in its place."""
        if given[0] == "module":  # written by PyTorch before 1.6
            raise UnsafePickleError("holds a whole network and not its state_dict")
        what, kind, key, _, elements, *_ = given
        if what != "storage" or not isinstance(elements, int) or elements < 0:
            raise UnsafePickleError("refers to a storage in an unknown format")
        bytes_each = _ITEM_BYTES.get(str(kind).rpartition(".")[2], 1)
        taken = self.names.storage_bytes
        taken[str(key)] = max(taken.get(str(key), 0), elements * bytes_each)
        return _Node("storage", elements)
