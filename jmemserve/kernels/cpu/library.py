"""The compiled library for CPUs: finding it, loading it, telling XLA of it.

It is built from ``native/`` when jmemserve is installed, if there is a C++ compiler; without one only speed is lost.
"""

import ctypes
import functools
import importlib.machinery
from pathlib import Path

import jax

HANDLERS = ("jmemserve_attend", "jmemserve_gather", "jmemserve_product", "jmemserve_scatter")
_FOLDER = Path(__file__).parent


class Missing(Exception):
    """There is no library that this process can use; the message says why."""


@functools.cache
def load() -> ctypes.CDLL:
    """The library, its functions known to XLA. Raises Missing."""
    found = [path for suffix in importlib.machinery.EXTENSION_SUFFIXES for path in _FOLDER.glob(f"_native{suffix}")]
    if not found:
        raise Missing("the C++ library was not built; install a C++ compiler and then jmemserve again")
    try:
        library = ctypes.CDLL(str(found[0]))
        for name in HANDLERS:
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
        library.jmemserve_isa.restype = ctypes.c_char_p
        library.jmemserve_isa.argtypes = [ctypes.c_char_p]
    except (OSError, AttributeError) as error:
        raise Missing(f"{found[0].name} cannot be used: {error}") from None
    return library


def instruction_set(wanted: str = "") -> str | None:
    """The best set of instructions that processor and library have, or the one of that name; None if not there."""
    name: bytes | None = load().jmemserve_isa(wanted.encode())
    return name.decode() if name is not None else None


def is_there() -> bool:
    """Can this process use the library?"""
    try:
        load()
    except Missing:
        return False
    return True


def describe() -> str:
    """One line: which instructions are used, or why there is no library."""
    try:
        return f"C++ library for CPUs: {instruction_set()}"
    except Missing as error:
        return f"no C++ library for CPUs, XLA does its work: {error}"
