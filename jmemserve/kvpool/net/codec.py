"""Messages as bytes and back: frozen dataclasses of known types, checked field by field, and never code.

A message is the msgpack array [code, field, field, ...] in the order of the dataclass. What a field may be follows from
its type hint:

str int float bool bytes                  themselves, by exact type; no NaN
X | None                                  nil or an X
tuple[int, ...]   frozenset[int]          extension 4 or 8: packed little-endian int32 or int64; a set in order
tuple[X, ...]   tuple[X, Y]               an array, of that many items for the second
an enum or a flag                         its value; a flag only with bits that it has
a dataclass or NamedTuple                 the array of its fields
dict, dict[str, ...], Any                 plain values: nil, bool, int, float, str, bytes, lists, dicts with str keys

Whatever a stranger sends, ``decode`` returns a message of a known type whose fields are as declared, or raises
TransferError.
"""

import array
import dataclasses
import enum
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import msgpack
import numpy as np

from jmemserve.errors import JmemserveError, TransferError

MAX_BYTES = 16 << 20  # of one message
MAX_ITEMS = 1 << 16  # of one array or map
MAX_DEPTH = 16  # of plain values
_INT32, _INT64 = 4, 8  # extension codes: bytes per value

Step = Callable[[Any], Any]  # from a field's value to what msgpack takes, or back; raises ValueError


class Codec:
    """``types`` gives every message type its number on the wire; both ends must have the same.

    Raises TypeError, at once, for a type with a field that cannot travel.
    """

    def __init__(self, types: Mapping[int, type], max_bytes: int = MAX_BYTES):
        self._max_bytes = max_bytes
        self._write: dict[type, tuple[int, Step]] = {}
        self._read: dict[int, tuple[type, Step]] = {}
        for code, kind in types.items():
            write, read = _record(kind)
            self._write[kind] = code, write
            self._read[code] = kind, read

    def encode(self, message: Any) -> bytes:
        """The bytes of a message. Raises TransferError if it is too large or a field is not of its declared type."""
        kind = type(message)
        if kind not in self._write:
            raise TransferError(f"{kind.__name__} is no message")
        code, write = self._write[kind]
        try:
            data: bytes = msgpack.packb([code, write(message)], use_bin_type=True)
        except (ValueError, TypeError, OverflowError) as error:
            raise TransferError(f"{kind.__name__} cannot be sent: {error}") from error
        if len(data) > self._max_bytes:
            raise TransferError(f"{kind.__name__} of {len(data)} bytes is larger than the limit of {self._max_bytes}")
        return data

    def decode(self, data: bytes | bytearray | memoryview) -> Any:
        """The message. Raises TransferError for everything that ``encode`` does not produce."""
        if len(data) > self._max_bytes:
            raise TransferError(f"a message of {len(data)} bytes is larger than the limit of {self._max_bytes}")
        try:
            code, plain = msgpack.unpackb(
                data,
                raw=False,
                strict_map_key=True,
                max_array_len=MAX_ITEMS,
                max_map_len=MAX_ITEMS,
            )
            if type(code) is not int or code not in self._read:
                raise ValueError(f"unknown type {_show(code)}")
        except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
            raise TransferError(f"not a message: {error}") from error
        kind, read = self._read[code]
        try:
            return read(plain)
        except (ValueError, TypeError, OverflowError, JmemserveError) as error:
            raise TransferError(f"a broken {kind.__name__}: {error}") from error


def _steps(hint: Any) -> tuple[Step, Step]:
    """How values of this type are written and read. Raises TypeError for a type that cannot travel."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _optional(hint, arguments)
    if origin is tuple:
        return _tuple(arguments)
    if hint == frozenset[int]:
        return (lambda value: _pack_ints(tuple(sorted(_exactly_set(value))))), (
            lambda value: frozenset(_unpack_ints(value))
        )
    if hint is Any:
        return _plain, _plain
    if hint is dict or (origin in (dict, Mapping) and arguments[0] is str):
        return _plain_dict, _plain_dict
    if hint is float:
        return _float, _exactly(float, _float)
    if hint in (str, int, bool, bytes):
        step = _exactly(hint)
        return step, step
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _enum(hint)
    if dataclasses.is_dataclass(hint) or hasattr(hint, "_fields"):
        return _record(hint)
    raise TypeError(f"{hint} has no form on the wire")


def _exactly(kind: type, then: Step | None = None) -> Step:
    def step(value: Any) -> Any:
        if type(value) is not kind:
            raise ValueError(f"{kind.__name__} is wanted, not {_show(value)}")
        return value if then is None else then(value)

    return step


def _float(value: Any) -> float:
    if type(value) not in (int, float) or value != value:
        raise ValueError(f"a number is wanted, not {_show(value)}")
    return float(value)


def _optional(hint: Any, arguments: tuple[Any, ...]) -> tuple[Step, Step]:
    rest = [argument for argument in arguments if argument is not types.NoneType]
    if len(rest) != 1:
        raise TypeError(f"{hint} has no form on the wire: only one type, or None")
    write, read = _steps(rest[0])
    return (lambda value: None if value is None else write(value)), (
        lambda value: None if value is None else read(value)
    )


def _tuple(arguments: tuple[Any, ...]) -> tuple[Step, Step]:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        if arguments[0] is int:
            return _pack_ints, _unpack_ints
        write, read = _steps(arguments[0])
        return (
            lambda value: [write(item) for item in _exactly_tuple(value)],
            lambda value: tuple([read(item) for item in _exactly_list(value)]),
        )
    steps = [_steps(argument) for argument in arguments]
    return (
        lambda value: [write(item) for (write, _), item in zip(steps, _exactly_tuple(value), strict=True)],
        lambda value: tuple([read(item) for (_, read), item in zip(steps, _exactly_list(value), strict=True)]),
    )


_exactly_tuple = _exactly(tuple)
_exactly_list = _exactly(list)
_exactly_set = _exactly(frozenset)


def _pack_ints(values: Any) -> msgpack.ExtType:
    if len(_exactly_tuple(values)) > MAX_BYTES // 8:
        raise ValueError(f"{len(values)} whole numbers are too many")
    try:
        code, packed = _INT32, array.array("i", values)
    except OverflowError:
        code, packed = _INT64, array.array("q", values)
    if sys.byteorder == "big":
        packed.byteswap()
    return msgpack.ExtType(code, packed.tobytes())


def _unpack_ints(value: Any) -> tuple[int, ...]:
    if type(value) is not msgpack.ExtType or value.code not in (_INT32, _INT64) or len(value.data) % value.code:
        raise ValueError(f"packed whole numbers are wanted, not {_show(value)}")
    return tuple(np.frombuffer(value.data, f"<i{value.code}").tolist())


def _enum(kind: type[enum.Enum]) -> tuple[Step, Step]:
    kinds = {type(member.value) for member in kind}
    known = 0
    if issubclass(kind, enum.Flag):
        for member in kind:
            known |= member.value

    def read(value: Any) -> enum.Enum:
        if type(value) not in kinds | ({int} if issubclass(kind, enum.Flag) else set()):
            raise ValueError(f"a {kind.__name__} is wanted, not {_show(value)}")
        if issubclass(kind, enum.Flag) and value & ~known:
            raise ValueError(f"{value:#x} has bits that {kind.__name__} has not")
        return kind(value)

    return (lambda member: _exactly(kind)(member).value), read


def _record(kind: Any) -> tuple[Step, Step]:
    """Steps of a dataclass or NamedTuple: the array of its fields, in order."""
    names = list(kind._fields) if hasattr(kind, "_fields") else [field.name for field in dataclasses.fields(kind)]
    hints = typing.get_type_hints(kind)
    fields = [(name, *_steps(hints[name])) for name in names]
    check = _exactly(kind)

    def write(value: Any) -> list[Any]:
        check(value)
        plain = []
        for name, step, _ in fields:
            try:
                plain.append(step(getattr(value, name)))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{name}: {error}") from error
        return plain

    def read(plain: Any) -> Any:
        if type(plain) is not list or len(plain) != len(fields):
            raise ValueError(f"{kind.__name__} has {len(fields)} fields, not {_show(plain)}")
        values = []
        for (name, _, step), item in zip(fields, plain, strict=True):
            try:
                values.append(step(item))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{name}: {error}") from error
        return kind(*values)

    return write, read


def _plain_dict(value: Any) -> dict[str, Any]:
    if type(value) is not dict:
        raise ValueError(f"a dict is wanted, not {_show(value)}")
    _plain(value)
    return value


def _plain(value: Any, depth: int = 0) -> Any:
    """The value itself, if all within it is plain, so that what arrives equals what was sent."""
    if type(value) in (list, dict):
        if depth >= MAX_DEPTH or len(value) > MAX_ITEMS:
            raise ValueError(f"plain values go {MAX_DEPTH} deep and have {MAX_ITEMS} items at most")
        if type(value) is dict:
            for key in value:
                if type(key) is not str:
                    raise ValueError(f"a dict has str keys, not {_show(key)}")
        for item in value.values() if type(value) is dict else value:
            _plain(item, depth + 1)
    elif value is not None and type(value) not in (bool, int, float, str, bytes):
        raise ValueError(f"{type(value).__name__} is no plain value")
    return value


def _show(value: Any) -> str:
    """A value in an error message: short, whatever it is."""
    if type(value) in (str, bytes):
        return repr(value[:50])
    return repr(value) if type(value) in (bool, int, float) or value is None else f"a {type(value).__name__}"
