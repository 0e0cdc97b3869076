"""Where rows come from: files on disk or inside a zip, as text lines, in bounded memory.

    path -> data_files -> DataFile -> encoding_of (looks at every byte once) -> lines

Nothing is unpacked to disk. A zip is refused when it would unpack to far more than its size, when a name leaves the
folder, or when it is encrypted. A split archive (answers.z01, answers.zip) is read as the one it was.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from ..errors import DataError

MAX_LINE = 4 << 20  # characters; a longer line is no line of text
MAX_UNPACKED = 16 << 30  # bytes of one zip
MAX_RATIO = 200  # unpacked / packed; text packs to about a third, ids to about a fifth
_CHUNK = 1 << 20
_FOLDERS_DEEP = 3


def sha256_of(file: Path) -> str:
    """Of a whole file on disk, hexadecimal."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@dataclass(frozen=True)
class DataFile:
    """`name` is what a person is told, `base` the file's own name in lower case."""

    name: str
    base: str
    folder: str
    opener: Callable[[], BinaryIO]

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The bytes. Raises DataError for what cannot be read, a damaged zip included."""
        try:
            with self.opener() as stream:
                yield stream
        except (zipfile.BadZipFile, zlib.error, EOFError) as e:
            raise DataError(
                f"damaged inside the zip: {e}", file=self.name, hint="Download it again; unzip -t names what is broken."
            ) from None
        except (NotImplementedError, RuntimeError) as e:  # zipfile's words for methods and passwords it does not know
            raise DataError(f"cannot be unpacked: {e}", file=self.name, hint="Unpack it and name the folder.") from None
        except OSError as e:
            raise DataError(f"cannot be read: {e.strerror or e}", file=self.name) from None


def data_files(path: Path, *, hint: str | None = None) -> list[DataFile]:
    """Every file of a folder (three levels deep), of a zip, of the zips in a folder; or the single file itself.

    Hidden files are left out; a file that stands both unpacked and in a zip is taken unpacked.
    Raises DataError, with `hint`, where nothing is.
    """
    if path.is_dir():
        found = [p for p in sorted(path.rglob("*")) if p.is_file() and _is_shown(p.relative_to(path))]
        plain = [on_disk(p) for p in found if not _is_archive(p)]
        here = {f.base for f in plain}
        zipped = [f for p in found if p.suffix.lower() == ".zip" for f in zip_files(p)]
        return plain + [f for f in zipped if f.base not in here]
    if re.fullmatch(r"\.z\d\d", path.suffix.lower()):
        path = path.with_suffix(".zip")
    if not path.exists():
        raise DataError("no such file or folder", file=path, hint=hint)
    return zip_files(path) if path.suffix.lower() == ".zip" else [on_disk(path)]


def on_disk(path: Path) -> DataFile:
    return DataFile(str(path), path.name.lower(), str(path.parent), lambda: path.open("rb"))


def _is_shown(relative: Path) -> bool:
    return len(relative.parts) <= _FOLDERS_DEEP and not any(p.startswith((".", "__MACOSX")) for p in relative.parts)


def _is_archive(path: Path) -> bool:
    return path.suffix.lower() == ".zip" or bool(re.fullmatch(r"\.z\d\d", path.suffix.lower()))


# ---- zip ---------------------------------------------------------------------------------------------------------


def zip_files(path: Path) -> list[DataFile]:
    """The files of a zip, read where they lie. Raises DataError for a zip that is broken, hostile or encrypted."""
    try:
        archive = zipfile.ZipFile(cast("BinaryIO", _joined(path)))
    except (zipfile.BadZipFile, OSError, struct.error, ValueError) as e:
        raise DataError(
            f"no readable zip: {e}", file=path, hint="Download it again; unzip -t names what is broken."
        ) from None
    total, packed = 0, 1
    files = []
    for info in archive.infolist():
        name = _zip_name(info)
        parts = PurePosixPath(name.replace("\\", "/")).parts
        if name.startswith(("/", "\\")) or ".." in parts or re.match(r"[A-Za-z]:", name):
            raise DataError(f"the name {name!r} leaves the zip's own folder", file=path, hint="Do not trust this zip.")
        if info.is_dir() or not _is_shown(Path(*parts[-_FOLDERS_DEEP:])):
            continue
        if info.flag_bits & 1:
            raise DataError(f"{name} is encrypted", file=path, hint=f"Unpack it: unzip -P PASSWORD {path.name}")
        total += info.file_size
        packed += info.compress_size
        if total > MAX_UNPACKED or (
            info.file_size > 16 << 20 and info.file_size > MAX_RATIO * max(1, info.compress_size)
        ):
            raise DataError(
                f"{name} would unpack {info.compress_size} bytes to {info.file_size}: a zip bomb, or no text",
                file=path,
                hint="If you trust it, unpack it yourself and name the folder.",
            )
        files.append(
            DataFile(
                name=f"{path}:{name}",
                base=parts[-1].lower(),
                folder=f"{path.parent}" if len(parts) == 1 else f"{path}:{'/'.join(parts[:-1])}",
                opener=lambda info=info: cast("BinaryIO", archive.open(info)),  # type: ignore[misc]
            )
        )
    return files


def _zip_name(info: zipfile.ZipInfo) -> str:
    """Old zips made on a Chinese Windows hold GBK names, which zipfile reads as cp437."""
    if info.flag_bits & 0x800:
        return info.filename
    try:
        return info.filename.encode("cp437").decode("gb18030")
    except (UnicodeEncodeError, UnicodeDecodeError):
        return info.filename


def _joined(path: Path) -> io.RawIOBase | BinaryIO:
    """The bytes of a zip; of a split one (X.z01 ... X.zip) as if it had never been split.

    disk 0 X.z01   disk 1 X.zip                     each entry: (disk, offset in that disk)
    ============   ======== directory end           becomes: offset in the whole
    """
    parts = sorted(
        p for p in path.parent.glob("*") if p.stem == path.stem and re.fullmatch(r"\.z\d\d", p.suffix.lower())
    )
    with path.open("rb") as f:
        size = f.seek(0, io.SEEK_END)
        start = max(0, size - 65557)  # the end record and its longest comment
        f.seek(start)
        tail = f.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) < at + 22:
        return path.open("rb")
    disk, directory_disk, _, entries, directory_size, offset = struct.unpack("<4H2L", tail[at + 4 : at + 20])
    if disk == 0 or disk == 0xFFFF:
        return path.open("rb")
    command = f"zip -s 0 {path.name} --out joined.zip"
    if len(parts) != disk:
        raise DataError(
            f"part {disk + 1} of a split archive, of whose other {disk} parts {len(parts)} lie beside it",
            file=path,
            hint=f"Put {path.stem}.z01 ... {path.stem}.z{disk:02d} beside it.",
        )
    if directory_disk != disk or entries == 0xFFFF or offset == 0xFFFFFFFF:
        raise DataError("a split archive of a form not read here", file=path, hint=f"Join it: {command}")
    begins = [0]
    for part in parts:
        begins.append(begins[-1] + part.stat().st_size)
    with path.open("rb") as f:
        f.seek(offset)
        directory = bytearray(f.read(directory_size))
    place = 0
    for _ in range(entries):
        if directory[place : place + 4] != b"PK\x01\x02":
            raise DataError("the directory of a split archive is damaged", file=path, hint=f"Try: {command}")
        name, extra, comment, on_disk = struct.unpack("<4H", directory[place + 28 : place + 36])
        (header,) = struct.unpack("<L", directory[place + 42 : place + 46])
        if on_disk >= len(begins) or begins[on_disk] + header >= 0xFFFFFFFF:
            raise DataError("a split archive of a form not read here", file=path, hint=f"Join it: {command}")
        directory[place + 34 : place + 36] = b"\0\0"
        directory[place + 42 : place + 46] = struct.pack("<L", begins[on_disk] + header)
        place += 46 + name + extra + comment
    ending = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, entries, entries, directory_size, begins[-1] + offset, 0)
    pieces = [(p, p.stat().st_size) for p in parts] + [(path, offset)]
    return _EndToEnd(pieces, bytes(directory) + ending)


class _EndToEnd(io.RawIOBase):
    """The first `size` bytes of each file, then `tail`, as one seekable stream."""

    def __init__(self, pieces: list[tuple[Path, int]], tail: bytes) -> None:
        self._streams: list[tuple[BinaryIO, int]] = [(p.open("rb"), n) for p, n in pieces]
        self._streams.append((io.BytesIO(tail), len(tail)))
        self._size = sum(n for _, n in self._streams)
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = self._size - self._at if size is None or size < 0 else size
        out = bytearray()
        begin = 0
        for stream, length in self._streams:
            if left > 0 and begin <= self._at < begin + length:
                stream.seek(self._at - begin)
                got = stream.read(min(left, begin + length - self._at))
                out += got
                self._at += len(got)
                left -= len(got)
            begin += length
        return bytes(out)

    def close(self) -> None:
        for stream, _ in self._streams:
            stream.close()
        super().close()


# ---- text --------------------------------------------------------------------------------------------------------

_CONTROL = bytes(b for b in range(32) if b not in b"\t\n\r\x0b\x0c\x1a\x1b")
_WIDE = bytes(range(128))
_SURE = 60  # bytes of well-formed UTF-8 beyond ASCII: GB18030 text never comes that far


def encoding_of(file: DataFile) -> str:
    """utf-8-sig, utf-16 (by its mark) or gb18030, after every byte was looked at.

    Raises DataError: empty, no text, broken UTF-8 (with the line; a cut-off end is named), no known encoding.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    line, wide = 1, 0
    with file.open() as stream:
        head = stream.read(_CHUNK)
        if not head:
            raise DataError("the file is empty", file=file.name, hint="Download or export it again.")
        if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return "utf-16"
        chunk = head
        while True:
            if len(chunk) != len(chunk.translate(None, _CONTROL)):
                raise DataError("this is no text: it holds control bytes", file=file.name, row=line, hint=_EXPECTED)
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as e:
                good = e.object[: e.start]
                line += good.count(b"\n")
                wide += len(good.translate(None, _WIDE))
                if wide >= _SURE:
                    cut = (
                        "it ends inside a character, so it was cut off" if not chunk else f"byte {e.object[e.start]:#x}"
                    )
                    raise DataError(
                        f"broken UTF-8: {cut}", file=file.name, row=line, hint="Download or export it again."
                    ) from None
                break
            if not chunk:
                return "utf-8-sig"
            line += chunk.count(b"\n")
            wide += len(chunk.translate(None, _WIDE))
            chunk = stream.read(_CHUNK)
    _check_gb18030(file)
    return "gb18030"


_EXPECTED = "Known are CSV, JSON and JSON lines in UTF-8 or GB18030 (GBK), or a zip of them."


def _check_gb18030(file: DataFile) -> None:
    """Almost any bytes decode as GB18030; Chinese text also uses mostly its common characters (GB2312 level 1)."""
    decoder = codecs.getincrementaldecoder("gb18030")()
    line, common, other = 1, 0, 0
    with file.open() as stream:
        while True:
            chunk = stream.read(_CHUNK)
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as e:
                line += e.object[: e.start].count(b"\n")
                raise DataError("neither UTF-8 nor GB18030 text", file=file.name, row=line, hint=_CONVERT) from None
            if not chunk:
                break
            line += text.count("\n")
            if common + other < _CHUNK:
                for first, second in _pairs(text):
                    level1 = (0xB0 <= first <= 0xD7 or 0xA1 <= first <= 0xA3) and second >= 0xA1
                    common, other = common + level1, other + (not level1)
    if common < 3 * other:
        raise DataError(
            f"neither UTF-8 nor GB18030 text (read so, {other} of {common + other} characters are rare ones)",
            file=file.name,
            hint=_CONVERT,
        )


_CONVERT = "Convert it: iconv -f BIG5 -t UTF-8 FILE > NEW, with the encoding it was written in."


def _pairs(text: str) -> Iterator[tuple[int, int]]:
    for character in re.findall(r"[^\x00-\x7f]", text):
        encoded = character.encode("gb18030")
        yield encoded[0], encoded[1]


@contextmanager
def open_text(file: DataFile) -> Iterator[io.TextIOWrapper]:
    """The file as text with its own line ends. Raises DataError as `encoding_of` does."""
    encoding = encoding_of(file)
    with file.open() as stream:
        buffered = stream if isinstance(stream, io.BufferedIOBase) else io.BufferedReader(cast("io.RawIOBase", stream))
        with io.TextIOWrapper(cast("BinaryIO", buffered), encoding=encoding, newline="") as text:
            try:
                yield text
            except UnicodeError as e:  # only UTF-16, which encoding_of believes by its mark
                raise DataError(f"broken text: {e.__class__.__name__}", file=file.name) from None


def lines(file: DataFile) -> Iterator[str]:
    """The lines with their ends. Raises DataError for a line of more than MAX_LINE characters, in bounded memory."""
    with open_text(file) as text:
        yield from lines_of(text, file.name)


def lines_of(text: io.TextIOWrapper, name: str) -> Iterator[str]:
    """`lines` of an open file, from where it stands; `name` is what an error calls it."""
    number = 0
    while line := text.readline(MAX_LINE):
        number += 1
        if len(line) == MAX_LINE:
            raise DataError(
                f"a line of more than {MAX_LINE >> 20} million characters",
                file=name,
                row=number,
                hint="A quote that is never closed, or no text with a row a line.",
            )
        yield line


def find(folder: Path, names: Sequence[str]) -> DataFile | None:
    """The first of `names` in a folder or zip; the one least deep where it stands in several folders."""
    files = sorted(data_files(folder), key=lambda f: f.name.count("/"))
    return next((f for n in names for f in files if f.base == n), None)
