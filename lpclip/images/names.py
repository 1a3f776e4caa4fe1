"""Names of files that are not UTF-8, as text that can be printed and stored: each such byte is written as \\xe9."""

from __future__ import annotations

import re

BYTE = re.compile(r"(\\*)\\x([89a-f][0-9a-f])")


def escaped(name: str) -> str:
    """A name as Python has it from the system, as text; distinct names stay distinct.

    Names that are UTF-8 stay as they are, but for a \\ before what reads like an escaped byte: it is doubled.
    """
    plain = re.sub(r"(\\+)(?=x[89a-f][0-9a-f]|[\udc80-\udcff])", r"\1\1", name)
    return re.sub("[\udc80-\udcff]", lambda byte: f"\\x{ord(byte[0]) - 0xDC00:02x}", plain)


def escaped_bytes(name: bytes) -> str:
    """The text of these bytes: as it is if they are UTF-8, else escaped."""
    try:
        return name.decode()
    except UnicodeDecodeError:
        return escaped(name.decode(errors="surrogateescape"))


def unescaped(text: str) -> str:
    """The name that `escaped` made the text of, as Python hands it to the system."""

    def undone(found: re.Match[str]) -> str:
        slashes = len(found[0]) - len(f"x{found[2]}")
        byte = chr(0xDC00 + int(found[2], 16)) if slashes % 2 else f"x{found[2]}"
        return "\\" * (slashes // 2) + byte

    return BYTE.sub(undone, text)
