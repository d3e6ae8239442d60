"""Decoding of any image file to 8-bit RGB, and resizing to the encoder's pixels.

Image files are untrusted: accepted are raster formats that Pillow or an installed plug-in decodes itself (an EPS named
.jpg would start Ghostscript), in regular files (a pipe would hang), up to `MAX_PIXELS` (image bombs).
"""

from __future__ import annotations

import functools
import importlib
import io
import os
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from saga_fast.utils.errors import InputError
from saga_fast.utils.files import LFS

# Pillow's names, with the suffixes of their files. Left out are formats without a signature at the start of the file
# (TGA, ICO), which would accept anything, and those that are rendered rather than decoded (EPS, PDF, WMF).
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "JPEG2000": (".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
}
HEAD = 32  # bytes that identify a format
KINDS = 8  # of ignored files that a message lists one by one
MAX_PIXELS = 64 * 2**20  # 8192 x 8192: 192 MB once decoded
MAX_JPEG = 2**28  # bytes read to separate EXIF; no JPEG of `MAX_PIXELS` is larger


class Plugin(NamedTuple):
    """A format that a plug-in adds to Pillow."""

    package: str
    modules: tuple[str, ...]
    """Any one of them adds the format."""
    suffixes: tuple[str, ...]
    brands: tuple[bytes, ...]
    """The signature of such a file: at byte 4, or at byte 8 after `ftyp`."""

    @property
    def module(self) -> str | None:
        return next((name for name in self.modules if find_spec(name)), None)


PLUGINS = {
    # Pillow's own from 11.3 on, unless it was built without
    "AVIF": Plugin("pillow-avif-plugin", ("PIL._avif", "pillow_avif"), (".avif", ".avifs"), (b"avif", b"avis")),
    "HEIF": Plugin(
        "pillow-heif",
        ("pillow_heif",),
        (".heic", ".heics", ".heif", ".heifs", ".hif"),
        (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"),
    ),
    "JXL": Plugin("pillow-jxl-plugin", ("pillow_jxl",), (".jxl",), (b"JXL ",)),
}
SUFFIXES = (
    *(suffix for suffixes in FORMATS.values() for suffix in suffixes),
    *(suffix for plugin in PLUGINS.values() if plugin.module for suffix in plugin.suffixes),
)


def open_rgb(path: str | os.PathLike[str]) -> Image.Image:
    """Decode a whole image file as `to_rgb` does; of an animation, the first frame.

    Raises InputError, naming the file, if it is not a complete image in an accepted format.
    """
    with _named(os.fspath(path), partial(_head, path)):
        if not os.path.isfile(path):
            raise OSError("not a regular file" if os.path.lexists(path) else "no such file")
        # Not by its name: then Pillow maps an uncompressed TIFF into memory, and gets the shape of a rotated one wrong.
        with open(path, "rb") as file:
            return _decode(file)


def read_rgb(content: bytes, name: str) -> Image.Image:
    """As `open_rgb`, of a file's content; errors call it `name`."""
    with _named(name, lambda: content[:HEAD]):
        return _decode(io.BytesIO(content))


def _decode(file: BinaryIO) -> Image.Image:
    with _quiet():
        try:
            with Image.open(file, formats=_formats()) as image:
                return to_rgb(image)
        except UnidentifiedImageError:
            file.seek(0)
            rest, exif = _without_exif(file.read(MAX_JPEG))
            if exif is None:
                raise
            # A JPEG that Pillow opens except for malformed tags, of which only the orientation is read.
            with Image.open(io.BytesIO(rest), formats=("JPEG",)) as image:
                upright, turn = to_rgb(image), TURNS.get(_orientation_in(exif[6:]))
            return upright if turn is None else upright.transpose(turn)


def _without_exif(content: bytes) -> tuple[bytes, bytes | None]:
    """A JPEG file without its EXIF segment, and the content of that; None without one, or for a file that is no
    JPEG."""
    kept, at, exif = [content[:2]], 2, None
    while (
        content[:2] == b"\xff\xd8" and content[at : at + 1] == b"\xff" and content[at + 1 : at + 2] not in b"\xda\xd9"
    ):
        size = 2 + int.from_bytes(content[at + 2 : at + 4], "big")
        segment = content[at : at + size]
        if segment[1] == 0xE1 and segment[4:10] == b"Exif\0\0":
            exif = segment[4:]
        else:
            kept.append(segment)
        at += size
    return b"".join(kept) + content[at:], exif


def _head(path: str | os.PathLike[str]) -> bytes:
    with suppress(OSError), open(path, "rb") as file:
        return file.read(HEAD)
    return b""


@contextmanager
def _named(name: str, head: Callable[[], bytes]) -> Iterator[None]:
    """Turns any exception inside into an InputError that names the picture. head: returns the file's first bytes."""
    try:
        yield
    except Exception as error:  # Pillow's decoders raise exceptions of any type for a broken file
        cause = _without_plugin(head()) if isinstance(error, UnidentifiedImageError) else _cause(error)
        raise InputError(f"{name!r}: unreadable image ({cause}); replace or remove it") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """A PIL image, opened elsewhere, as `to_rgb` makes it. Raises InputError if it cannot be decoded or converted."""
    try:
        with _quiet():
            return to_rgb(image)
    except Exception as error:
        name = repr(os.fspath(name)) if (name := getattr(image, "filename", None)) else f"of mode {image.mode}"
        raise InputError(f"images: the PIL image {name} is unreadable ({_cause(error)}); replace it") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Mode RGB: upright by its EXIF tag, transparency on white, more than 8 bits scaled to 8, without tags.

    Raises whatever the decoder does, and ValueError for more than `MAX_PIXELS` and for numbers of no known scale.
    """
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} is more than {MAX_PIXELS} pixels")
    if not image.width * image.height:
        raise ValueError("it has no pixels")
    image.load()  # Pillow rotates a TIFF as it decodes, and other tags may follow the pixels
    turn = TURNS.get(_orientation(image))
    if image.mode.startswith(("I", "F")):
        sixteen = image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM")
        image = Image.fromarray(_to_eight_bits(np.asarray(image), 65535 if sixteen else None))
    image = image if turn is None else image.transpose(turn)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")  # a copy, if it is that already
    image.info.clear()  # or it would be rotated a second time
    return image


def to_pixels(image: Image.Image, size: int) -> Tensor:
    """uint8 (3, size, size) of an RGB picture: Pillow's bicubic, the whole picture, aspect ratio not kept."""
    return torch.from_numpy(np.array(image.resize((size, size), Image.Resampling.BICUBIC))).permute(2, 0, 1)


def is_image(name: str) -> bool:
    """Whether a file's name has the suffix of an accepted format."""
    return name.lower().endswith(SUFFIXES)


def kind_of(name: str) -> str:
    """The kind by which a skipped file is counted: its suffix in lower case."""
    return os.path.splitext(name)[1].lower() or "without a suffix"


def skipped_kinds(counts: Mapping[str, int]) -> str:
    """Counts by kind, largest first, with the plug-in that would read them: `.heic: 40 (pip install …), .txt: 2`."""
    kinds = sorted((kind for kind in counts if counts[kind]), key=lambda kind: (-counts[kind], kind))
    shown = [f"{kind}: {counts[kind]:,}{_remedy(kind)}" for kind in kinds[:KINDS]]
    if more := sum(counts[kind] for kind in kinds[KINDS:]):
        shown.append(f"{len(kinds) - KINDS} other kinds: {more:,}")
    return ", ".join(shown)


def _remedy(suffix: str) -> str:
    package = next((p.package for p in PLUGINS.values() if suffix in p.suffixes and suffix not in SUFFIXES), None)
    return f" (pip install {package}, and they are read)" if package else ""


# EXIF's orientation number → the transpositions that make the stored picture upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1, upright, where it is missing or not in `TURNS`. Pillow's `exif_transpose` rewrites all
    tags, and fails on malformed ones."""
    value = None
    with suppress(Exception):  # tags that cannot be read do not make a picture unreadable
        value = image.getexif().get(0x0112)
    if value is None and isinstance(exif := image.info.get("exif"), bytes):
        value = _orientation_in(exif.removeprefix(b"Exif\0\0"))  # Pillow gives up the tags after one it cannot read
    return value if value in TURNS else 1


def _orientation_in(tiff: bytes) -> int:
    """The same for EXIF whose other tags Pillow cannot read: parses the entry of the first directory by the EXIF
    standard; 1 without one."""
    order = ">" if tiff[:2] == b"MM" else "<"
    with suppress(struct.error):
        (at,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, at)
        for entry in range(count):
            tag, kind, values, value = struct.unpack_from(f"{order}HHIH", tiff, at + 2 + 12 * entry)
            if (tag, kind, values) == (0x0112, 3, 1):
                return value
    return 1


def _to_eight_bits(values: np.ndarray, full: int | None) -> np.ndarray:
    """uint8 of grey whose white is `full`; Pillow would clip it at 255, not scale it.

    None: 32-bit integers and floats have no fixed scale, so the largest value decides which it is: 1 (floats), 255 or
    65535. Raises ValueError for larger values. Not-a-number and negative values are black.
    """
    values = np.nan_to_num(values, nan=0.0, posinf=np.inf, neginf=0.0).clip(0)
    largest = values.max()
    if full is None:
        accepted = (1, 255, 65535) if values.dtype.kind == "f" else (255, 65535)
        full = next((white for white in accepted if largest <= white), 0)
    if largest > full:
        raise ValueError(f"values up to {largest:g}; accepted are 0 to 1 in floats, 0 to 255, and 0 to 65535")
    return (values.astype(np.int64) >> 8 if full == 65535 else np.rint(values * (255 / full))).astype(np.uint8)


@functools.cache
def _formats() -> tuple[str, ...]:
    """Pillow's names of the accepted formats, including those of installed plug-ins."""
    found = list(FORMATS)
    for name, plugin in PLUGINS.items():
        with suppress(ImportError, OSError):
            if plugin.module:
                module = importlib.import_module(plugin.module)
                if name == "HEIF":
                    module.register_heif_opener()
                found.append(name)
    return tuple(found)


def _without_plugin(head: bytes) -> str:
    """Why Pillow cannot identify a file with these first bytes: its plug-in is missing, or the format is unknown."""
    if head.startswith(LFS):
        return "a pointer that Git LFS left for it; fetch it with git lfs pull"
    mark = head[8:12] if head[4:8] == b"ftyp" else head[4:8]
    if head.startswith(b"\xff\x0a"):  # JPEG XL without a box around it
        mark = b"JXL "
    for name, plugin in PLUGINS.items():
        if mark in plugin.brands and name not in _formats():
            return f"{name}, which needs: pip install {plugin.package}"
    return f"none of {', '.join(_formats())}"


def _cause(error: Exception) -> str:
    if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
        return f"more than {MAX_PIXELS} pixels"
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences Pillow's warnings of malformed tags, and turns that of an image bomb into an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield
