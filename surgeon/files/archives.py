"""The zip archive that `torch.save` writes around a pickle, checked to the last byte before anything in it is read.

torch does not look at checksums, and a zip can be read in several ways: names given twice, entries that lie over each
other, headers that contradict each other, a second archive in a comment. What torch writes has none of that: plain
entries one behind the other, each with its checksum, and nothing behind the last one. So nothing else is read.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO

from surgeon.errors import ModelError
from surgeon.files.faults import compiled, damaged

_LOCAL = struct.Struct("<4s2xHH4x3L2H")  # signature, flags, method, checksum, both sizes, lengths of name and extra
_END = struct.Struct("<4s4H2LH")
_LATER = 1 << 3  # checksum and sizes follow behind the data
_CHUNK = 1 << 20
_MOST = 100_000  # entries


def records(path: Path) -> dict[str, int]:
    """Check an archive, and give the sizes of what lies in it, by name.

    Raises:
        ModelError: it is damaged, or something that torch.save did not write.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            _refuse_others(path, {entry.filename.partition("/")[2] or entry.filename for entry in entries})
            if why := _oddity(archive, entries, path.stat().st_size, file):
                raise ModelError(
                    f"{path} is a zip that torch.save did not write: {why}",
                    todo="Load it, and save it with torch.save.",
                )
            for entry in sorted(entries, key=lambda one: one.header_offset):
                _check_sum(path, file, entry)
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, EOFError, OSError) as error:
        raise damaged(path, error) from error
    return {entry.filename.partition("/")[2]: entry.file_size for entry in entries}


def _refuse_others(path: Path, names: set[str]) -> None:
    """Refuse archives of other kinds, by what they are."""
    if "constants.pkl" in names:
        raise compiled(path, "a TorchScript program")
    if names & {"archive_format", "serialized_exported_program.json"}:
        raise compiled(path, "a torch.export program")
    if "data.pkl" not in names:
        raise ModelError(f"{path} is a zip that torch.save did not write", todo="Name the model file itself.")


def _oddity(archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo], size: int, file: IO[bytes]) -> str | None:
    """Say in what an archive differs from those of torch.save."""
    file.seek(max(size - _END.size, 0))
    signature, *_, comment = _END.unpack(file.read(_END.size))
    if signature != b"PK\x05\x06" or comment:
        return "something follows the archive"
    if len(entries) > _MOST:
        return f"it has more than {_MOST:,} entries"
    names = [entry.filename for entry in entries]
    if len(set(names)) != len(names):
        return "names are given twice"
    if len({name.partition("/")[0] for name in names}) != 1 or not all("/" in name for name in names):
        return "not all entries are in one folder"
    if all(one.header_offset for one in entries):
        return "something comes before the archive"
    end: int = 0
    for entry in sorted(entries, key=lambda one: one.header_offset):
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size or entry.flag_bits & 1:
            return f"{entry.filename!a} is compressed or encrypted"
        if entry.header_offset < end:
            return f"{entry.filename!a} lies over another entry"
        end = _start(file, entry) + entry.file_size
    if end > archive.start_dir:
        return "entries lie over the table of contents"
    return None


def _start(file: IO[bytes], entry: zipfile.ZipInfo) -> int:
    """Say where the data of an entry begin, once its own header agrees with the table of contents.

    Raises:
        ValueError: it does not.
    """
    file.seek(entry.header_offset)
    signature, flags, method, checksum, packed, size, of_name, of_extra = _LOCAL.unpack(file.read(_LOCAL.size))
    name = file.read(of_name)
    encoding = "utf-8" if entry.flag_bits & 0x800 else "cp437"
    is_later = bool(flags & _LATER) and (checksum, packed, size) == (0, 0, 0)
    is_large = size == packed == 0xFFFFFFFF and checksum == entry.CRC  # the sizes are in the extra field
    is_same = (checksum, packed, size) == (entry.CRC, entry.compress_size, entry.file_size)
    agrees = (signature, method, name) == (b"PK\x03\x04", entry.compress_type, entry.orig_filename.encode(encoding))
    if not agrees or not (is_later or is_large or is_same):
        raise ValueError(f"the header of {entry.filename!a} contradicts the table of contents")
    return entry.header_offset + _LOCAL.size + len(name) + int(of_extra)


def _check_sum(path: Path, file: IO[bytes], entry: zipfile.ZipInfo) -> None:
    """Compare the data of an entry with its checksum."""
    file.seek(_start(file, entry))
    left, checksum = entry.file_size, 0
    while left and (chunk := file.read(min(left, _CHUNK))):
        checksum, left = zlib.crc32(chunk, checksum), left - len(chunk)
    if left or checksum != entry.CRC:
        raise ModelError(
            f"{path} is damaged: the checksum of {entry.filename!a} is wrong",
            todo="Copy or download it again; if torch wrote it without checksums (set_crc32_options), save it again.",
        )
