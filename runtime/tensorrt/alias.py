"""A loaded library under a second name, made without a compiler.

TensorRT-RTX's ONNX parser opens `libtensorrt_rtx.so` when it meets a plugin, but the wheel ships `libtensorrt_rtx.so.1`
only, and the parser ends the whole process when it finds nothing. The loader takes any loaded library whose own name
(SONAME) is the one asked for; so an empty shared object is loaded that has that name and needs the real library.
Its layout is that of the System V ABI's ELF chapter: one segment with the dynamic section, a string table and one empty
symbol.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import tempfile

_MACHINES = {"x86_64": 62, "aarch64": 183}
_HEADER, _SEGMENT, _ENTRY, _SYMBOL = 64, 56, 16, 24
_LOAD, _DYNAMIC, _GNU_STACK = 1, 2, 0x6474E551
_READ_WRITE = 6
_NEEDED, _STRTAB, _SYMTAB, _STRSZ, _SYMENT, _SONAME = 1, 5, 6, 10, 11, 14


def empty_library(name: str, needs: str, machine: str) -> bytes:
    """An ELF64 shared object named `name` that holds nothing and needs `needs`. machine: as os.uname() spells it."""
    strings = b"\0" + name.encode() + b"\0" + needs.encode() + b"\0"
    dynamic_at = _HEADER + 3 * _SEGMENT
    symbols_at = dynamic_at + 7 * _ENTRY
    strings_at = symbols_at + _SYMBOL
    size = strings_at + len(strings)
    header = struct.pack(
        "<4s5B7xHHIQQQIHHHHHH",
        b"\x7fELF", 2, 1, 1, 0, 0, 3, _MACHINES[machine], 1, 0, _HEADER, 0, 0, _HEADER, _SEGMENT, 3, 0, 0, 0,
    )  # fmt: skip
    segments = (
        struct.pack("<IIQQQQQQ", _LOAD, _READ_WRITE, 0, 0, 0, size, size, 4096)
        + struct.pack("<IIQQQQQQ", _DYNAMIC, _READ_WRITE, dynamic_at, dynamic_at, dynamic_at, 112, 112, 8)
        + struct.pack("<IIQQQQQQ", _GNU_STACK, _READ_WRITE, 0, 0, 0, 0, 0, 16)
    )
    entries = (
        (_SONAME, 1),
        (_NEEDED, len(name) + 2),
        (_STRTAB, strings_at),
        (_SYMTAB, symbols_at),
        (_STRSZ, len(strings)),
        (_SYMENT, _SYMBOL),
        (0, 0),
    )
    dynamic = b"".join(struct.pack("<QQ", tag, value) for tag, value in entries)
    return header + segments + dynamic + bytes(_SYMBOL) + strings


def load_alias(name: str, needs: str) -> None:
    """Let later searches for the library `name` find the loaded library `needs`; nothing to do off Linux.

    Raises OSError if the loader takes neither `name` itself nor the alias.
    """
    if not sys.platform.startswith("linux") or os.uname().machine not in _MACHINES:
        return
    try:
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        return
    except OSError:
        pass  # the usual case: there is no file of that name
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(empty_library(name, needs, os.uname().machine))
        file.flush()
        ctypes.CDLL(file.name, mode=ctypes.RTLD_GLOBAL)
