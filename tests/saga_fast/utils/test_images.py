"""Every kind of image file becomes the RGB picture a viewer would show, or one line that names it."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import zlib
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from saga_fast.data import split_classes
from saga_fast.towers import tower_of
from saga_fast.utils.errors import InputError
from saga_fast.utils.images import MAX_PIXELS, as_rgb, is_image, open_rgb, skipped_kinds, to_pixels


def pixel(image: Image.Image, xy: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    assert image.mode == "RGB"
    return image.getpixel(xy)


@pytest.fixture
def picture() -> Image.Image:
    """A red left column, then blue; 8 x 6."""
    image = Image.new("RGB", (8, 6), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 1, 6))
    return image


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm"])
def test_rgb_is_unchanged(tmp_path, picture, suffix):
    picture.save(path := tmp_path / f"a.{suffix}")
    assert np.array_equal(open_rgb(path), picture)


def test_grey_is_the_same_in_three_channels(tmp_path):
    Image.new("L", (4, 4), 77).save(path := tmp_path / "a.png")
    assert pixel(open_rgb(path)) == (77, 77, 77)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, suffix):
    Image.fromarray(np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)).save(path := tmp_path / f"a.{suffix}")
    assert np.asarray(open_rgb(path))[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_one_bit(tmp_path):
    image = Image.new("1", (4, 4), 1)
    image.putpixel((1, 0), 0)
    image.save(path := tmp_path / "a.png")
    assert pixel(open_rgb(path)) == (255, 255, 255) and pixel(open_rgb(path), (1, 0)) == (0, 0, 0)


@pytest.mark.parametrize("suffix", ["jpg", "tiff"])
def test_cmyk(tmp_path, suffix):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(path := tmp_path / f"a.{suffix}", quality=95)
    red, green, blue = pixel(open_rgb(path), (8, 8))
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(tmp_path, mode):
    image = Image.new(mode, (2, 1), (0,) * len(mode))
    image.putpixel((1, 0), (0,) * (len(mode) - 1) + (128,))
    image.save(path := tmp_path / "a.png")
    assert pixel(open_rgb(path)) == (255, 255, 255)
    assert pixel(open_rgb(path), (1, 0)) == pytest.approx((127, 127, 127), abs=1)


def test_palette_with_and_without_a_transparent_color(tmp_path, picture):
    palette = picture.quantize(2)
    palette.save(path := tmp_path / "a.png")
    assert pixel(open_rgb(path)) == (255, 0, 0) and pixel(open_rgb(path), (5, 0)) == (0, 0, 255)
    palette.save(path, transparency=palette.getpixel((0, 0)))
    assert pixel(open_rgb(path)) == (255, 255, 255) and pixel(open_rgb(path), (5, 0)) == (0, 0, 255)


def test_a_palette_whose_colors_are_each_a_little_transparent(tmp_path, picture):
    palette = picture.quantize(2)
    red = palette.getpixel((0, 0))
    palette.save(path := tmp_path / "a.png", transparency=bytes([128, 0] if red == 0 else [0, 128]))
    assert pixel(open_rgb(path)) == pytest.approx((255, 127, 127), abs=1)
    assert pixel(open_rgb(path), (5, 0)) == (255, 255, 255)


# Which side of the stored pixels the viewer's top and left are, by the EXIF standard's table.
ORIENTATIONS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize(
    ("suffix", "modes"),
    [("jpg", ["RGB", "L", "CMYK"]), ("png", ["RGB", "L", "P"]), ("tiff", ["RGB", "L", "P", "CMYK"])],
)
def test_exif_rotation_is_applied(tmp_path, orientation, suffix, modes):
    corners = np.zeros((16, 24, 3), np.uint8)
    corners[:8, :8], corners[:8, 16:], corners[8:, :8] = 255, 170, 85
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = ORIENTATIONS[orientation](corners.astype(int))
    for mode in modes:
        stored = Image.fromarray(corners)
        stored = stored.quantize(4) if mode == "P" else stored.convert(mode)
        stored.save(path := tmp_path / f"{mode}.{suffix}", exif=exif, quality=100)
        found = np.asarray(open_rgb(path), int)
        assert found.shape == expected.shape and np.abs(found - expected).max() <= 3, mode


@pytest.mark.parametrize("exif", [b"garbage", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03"])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_damaged_exif_does_not_make_a_picture_unreadable(tmp_path, picture, suffix, exif):
    picture.save(path := tmp_path / f"a.{suffix}", exif=b"Exif\0\0" + exif, quality=100, subsampling=0)
    assert open_rgb(path).size == (8, 6)


def test_a_cameras_jpeg_with_a_second_picture_in_it(tmp_path, picture):
    second = Image.new("RGB", (8, 6), "lime")
    picture.save(path := tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second], quality=100)
    assert pixel(open_rgb(path), (7, 5)) == pytest.approx((0, 0, 255), abs=3)


def test_an_animation_gives_its_first_frame(tmp_path, picture):
    picture.save(path := tmp_path / "a.gif", save_all=True, append_images=[Image.new("RGB", (8, 6), "lime")])
    assert pixel(open_rgb(path)) == (255, 0, 0)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be width x height."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "none of JPEG"),
        (b"<html>not found</html>", "none of JPEG"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer that Git LFS left for it; fetch it"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "none of JPEG"),
        (bomb(8193, 8192), f"8193x8192 is more than {MAX_PIXELS} pixels"),
        (bomb(10000, 10000), f"more than {MAX_PIXELS} pixels"),  # Pillow would warn,
        (bomb(60000, 60000), f"more than {MAX_PIXELS} pixels"),  # and here raise, at limits of its own
        (bomb(8, 8), "truncated"),
    ],
)
def test_what_is_not_an_image_is_named_in_one_line(tmp_path, data, cause):
    (path := tmp_path / "odd\nname.jpg").write_bytes(data)
    with pytest.raises(InputError) as caught:
        open_rgb(path)
    message = str(caught.value)
    assert "odd\\nname.jpg" in message and cause in message and "\n" not in message


def test_a_bomb_is_refused_without_a_word_from_pillow(tmp_path, recwarn):
    (path := tmp_path / "a.png").write_bytes(bomb(10000, 10000))
    with pytest.raises(InputError):
        open_rgb(path)
    assert not recwarn.list


def test_a_message_stays_one_line_whatever_it_quotes():
    line = str(InputError(f"a\nb\x1b[2J\u2028\u202e\udcff {'x' * 5000} end"))
    assert line.startswith(r"a\nb\x1b[2J\u2028\u202e\udcff xxx") and line.endswith("xxx end")
    assert line.isprintable() and len(line) < 3000 and str(InputError(line)) == line


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_a_truncated_file_is_refused(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path := tmp_path / f"a.{suffix}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=f"a.{suffix}.*unreadable image"):
        open_rgb(path)


def test_missing_looping_and_special_files_are_refused(tmp_path):
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    for name, cause in [("none.png", "no such file"), ("loop.png", "not a regular"), ("pipe.png", "not a regular")]:
        with pytest.raises(InputError, match=f"{name}.*{cause}"):
            open_rgb(tmp_path / name)


def test_names_that_are_not_utf8(tmp_path, picture):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.png")
    picture.save(path)
    assert pixel(open_rgb(path)) == (255, 0, 0)
    os.truncate(path, 20)
    with pytest.raises(InputError) as caught:
        open_rgb(path)
    str(caught.value).encode()  # printable


def test_names_as_long_as_names_can_be(tmp_path, picture):
    path = tmp_path / f"{'猫' * 83}ab.png"
    assert len(os.fsencode(path.name)) == 255
    picture.save(path)
    assert pixel(open_rgb(path)) == (255, 0, 0)
    os.truncate(path, 20)
    with pytest.raises(InputError, match="猫ab.png.*unreadable image"):
        open_rgb(path)
    with pytest.raises(InputError, match="File name too long|no such file"):
        open_rgb(tmp_path / ("x" * 256))


def test_pixels_are_pillows_bicubic_of_the_whole_picture(picture):
    pixels = to_pixels(picture, 5)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 5, 5)
    assert np.array_equal(pixels.permute(1, 2, 0), picture.resize((5, 5), Image.Resampling.BICUBIC))
    assert np.array_equal(to_pixels(picture.crop((0, 0, 6, 6)), 6).permute(1, 2, 0), picture.crop((0, 0, 6, 6)))


@pytest.mark.parametrize("side", [97, 256, 400, 431])
def test_pixels_are_those_of_the_released_processors_at_their_own_size(side):
    """Bit for bit: Qwen-VL's, whose size follows from the picture's, and InternVL's at 448."""
    noise = np.random.default_rng(side).integers(0, 256, (side // 8 + 1, side // 8 + 1, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((side, side), Image.Resampling.BILINEAR)
    settings = dict(do_rescale=False, do_normalize=False, return_tensors="np")
    qwen = Qwen2VLImageProcessorPil(patch_size=16, size={"shortest_edge": 256 * 256, "longest_edge": 4096 * 4096})
    found = qwen(image, **settings)
    _, rows, columns = found["image_grid_thw"][0]
    patches = found["pixel_values"].reshape(rows // 2, columns // 2, 2, 2, 3, 2, 16, 16)[:, :, :, :, :, 0]
    theirs = patches.transpose(4, 0, 2, 5, 1, 3, 6).reshape(3, 16 * rows, 16 * columns)
    assert np.array_equal(to_pixels(image, 16 * int(rows)), theirs)
    intern = GotOcr2ImageProcessorPil(size={"height": 448, "width": 448}, crop_to_patches=False)
    assert np.array_equal(to_pixels(image, 448), intern(image, **settings)["pixel_values"][0])


def test_the_paper_reads_fewer_tokens_than_the_released_processor_makes():
    image = Image.new("RGB", (224, 224))
    released = Qwen2VLImageProcessorPil(patch_size=16, size={"shortest_edge": 256 * 256, "longest_edge": 4096 * 4096})
    assert released(image, return_tensors="np")["image_grid_thw"].prod() // 4 == 64
    config = Qwen3VLVisionConfig(depth=1, hidden_size=16, num_heads=2, intermediate_size=16, out_hidden_size=8,
                                 deepstack_visual_indexes=[])  # fmt: skip
    tower = tower_of(Qwen3VLVisionModel(config))
    assert tower.grid(224, 224) == (7, 7) and tower(to_pixels(image, 224)[None]).tokens.shape == (1, 49, 8)


def test_classes_are_halved_in_order_and_train_gets_the_odd_one():
    assert split_classes(["c", "a", "b"]) == (["a", "b"], ["c"])
    train, test = split_classes([f"{i:04}" for i in range(1017)])
    assert (len(train), len(test)) == (509, 508) and train[-1] < test[0]


# ── Odd tags ────────────────────────────────────────────────────────────────────────────────────────────────────────


def tags(*entries: tuple[int, int, bytes | None], order: str = "<") -> bytes:
    """EXIF of (tag, type, value as it is stored) entries, written by hand: Pillow writes no tag it finds odd."""
    sizes = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
    rows, data, start = b"", b"", 8 + 2 + 12 * len(entries) + 4
    for tag, kind, value in sorted(entries):
        if value is None:  # it would be where the file has ended
            rows += struct.pack(f"{order}HHII", tag, kind, 1, 2**20)
            continue
        held = value.ljust(4, b"\0") if len(value) <= 4 else struct.pack(f"{order}I", start + len(data))
        rows += struct.pack(f"{order}HHI", tag, kind, len(value) // sizes[kind]) + held
        data += value if len(value) > 4 else b""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    return head + struct.pack(f"{order}H", len(entries)) + rows + struct.pack(f"{order}I", 0) + data


TURNED = (0x112, 3, struct.pack("<H", 6))
ODD = {
    "XResolution -1/0": (0x11A, 10, struct.pack("<ii", -1, 0)),
    "XResolution 0/0": (0x11A, 5, struct.pack("<II", 0, 0)),
    "XResolution as text": (0x11A, 2, b"abc\0"),
    "XResolution NaN": (0x11A, 12, struct.pack("<d", float("nan"))),
    "XResolution infinite": (0x11A, 11, struct.pack("<f", float("inf"))),
    "ResolutionUnit -5": (0x128, 8, struct.pack("<h", -5)),
    "ResolutionUnit as text": (0x128, 2, b"a\0"),
    "Software as numbers": (0x131, 9, struct.pack("<ii", -5, 7)),
    "Make that is not there": (0x10F, 5, None),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_an_odd_tag_neither_refuses_a_picture_nor_hides_its_orientation(tmp_path, picture, suffix, odd, recwarn):
    settings = {"lossless": True} if suffix == "webp" else {"quality": 100, "subsampling": 0}
    exif = b"Exif\0\0" + tags(TURNED, ODD[odd])
    picture.save(path := tmp_path / f"a.{suffix}", exif=exif, **settings)
    turned = np.rot90(np.asarray(picture, int), -1)
    assert np.abs(np.asarray(open_rgb(path), int) - turned).max() <= 3
    assert not recwarn.list, "of a picture that is right nobody is told"
    with Image.open(path) as image:
        assert np.array_equal(as_rgb(image), open_rgb(path))


def test_a_jpeg_that_pillow_refuses_for_its_resolution_is_read(tmp_path, picture):
    exif = tags(TURNED, (0x128, 3, b"\2\0"), (0x11A, 7, b"1"))
    picture.save(path := tmp_path / "a.jpg", exif=b"Exif\0\0" + exif, quality=100, subsampling=0)
    with pytest.raises(UnidentifiedImageError):
        Image.open(path)
    assert np.abs(np.asarray(open_rgb(path), int) - np.rot90(np.asarray(picture, int), -1)).max() <= 3
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match="truncated"):
        open_rgb(path)


@pytest.mark.parametrize("value", [(0x112, 3, b"\x09\0"), (0x112, 2, b"6\0"), (0x112, 12, struct.pack("<d", np.nan))])
def test_an_orientation_that_is_none_turns_nothing(tmp_path, picture, value):
    picture.save(path := tmp_path / "a.png", exif=tags(value))
    assert np.array_equal(open_rgb(path), picture)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp"])
def test_a_picture_is_turned_once_however_often_it_is_opened(tmp_path, picture, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(path := tmp_path / f"a.{suffix}", exif=exif)
    upright = open_rgb(path)
    assert upright.size == (6, 8) and np.array_equal(as_rgb(upright), upright)
    with Image.open(path) as image:
        assert np.array_equal(as_rgb(image), upright) and np.array_equal(as_rgb(image), upright)
    with Image.open(path) as image:
        image.load()
        assert np.array_equal(as_rgb(image.copy()), upright), "loaded, then copied"


# ── More than eight bits ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("values", "seen"),
    [
        ([0, 0.25, 0.5, 1], [0, 64, 128, 255]),
        ([0, 64, 127.6, 255], [0, 64, 128, 255]),
        ([0, 256, 32768, 65535], [0, 1, 128, 255]),
        ([-3, np.nan, 0.5, 1], [0, 0, 128, 255]),
    ],
)
@pytest.mark.parametrize("suffix", ["tiff", "pfm"])
def test_floats_are_scaled_by_the_white_they_have(tmp_path, values, seen, suffix):
    Image.fromarray(np.array([values], np.float32)).save(path := tmp_path / f"a.{suffix}")
    assert np.asarray(open_rgb(path))[0, :, 0].tolist() == seen


def test_integers_of_32_bits_are_scaled_by_the_white_they_have(tmp_path):
    for values, seen in (([0, 7, 255], [0, 7, 255]), ([0, 257, 65535], [0, 1, 255])):
        Image.fromarray(np.array([values], np.int32)).save(path := tmp_path / "a.tiff")
        assert np.asarray(open_rgb(path))[0, :, 0].tolist() == seen


@pytest.mark.parametrize("values", [[0, 1e6], [0, np.inf], [0, 70_000]])
def test_numbers_of_no_known_scale_are_refused(tmp_path, values):
    kind = np.int32 if values[1] == 70_000 else np.float32
    Image.fromarray(np.array([values], kind)).save(path := tmp_path / "a.tiff")
    with pytest.raises(InputError, match="a.tiff.*values up to .*; accepted are 0 to 1 in floats, 0 to 255, and 0 to"):
        open_rgb(path)


def test_a_dark_picture_of_16_bits_stays_dark(tmp_path):
    Image.fromarray(np.full((1, 2), 200, np.uint16)).save(path := tmp_path / "a.png")
    assert pixel(open_rgb(path)) == (0, 0, 0)
    (path := tmp_path / "a.pgm").write_bytes(b"P5 2 1 65535\n" + struct.pack(">HH", 200, 100))
    assert pixel(open_rgb(path)) == (0, 0, 0)


# ── Kinds of files ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "apng", "pbm", "pnm", "jp2", "j2k", "JPG", "avif"])
def test_what_pillow_reads_is_read_and_listed(tmp_path, picture, suffix):
    if suffix == "avif":
        pytest.importorskip("PIL._avif")
    (picture.convert("1") if suffix == "pbm" else picture).save(path := tmp_path / f"a.{suffix}")
    assert open_rgb(path).size == (8, 6) and is_image(path.name)


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)


@pytest.mark.skipif(find_spec("pillow_heif") is not None, reason="the plug-in is there")
@pytest.mark.parametrize("name", ["a.heic", "a.jpg"])  # telephones' pictures are often renamed
def test_the_plugin_that_is_missing_is_named(tmp_path, name):
    (path := tmp_path / name).write_bytes(HEIC)
    with pytest.raises(InputError, match=f"{name}.*HEIF, which needs: pip install pillow-heif"):
        open_rgb(path)
    assert not is_image("a.heic")
    assert skipped_kinds({".heic": 1200, ".txt": 2, ".png": 0}) == (
        ".heic: 1,200 (pip install pillow-heif, and they are read), .txt: 2"
    )


@pytest.mark.skipif(find_spec("pillow_jxl") is not None, reason="the plug-in is there")
@pytest.mark.parametrize("head", [b"\0\0\0\x0cJXL \r\n\x87\n", b"\xff\x0a"], ids=["boxed", "bare"])
def test_jpeg_xl_is_known_in_both_its_forms(tmp_path, head):
    (path := tmp_path / "a.png").write_bytes(head + bytes(40))
    with pytest.raises(InputError, match=r"a.png.*JXL, which needs: pip install pillow-jxl-plugin"):
        open_rgb(path)


def test_a_plugin_that_is_there_is_used(tmp_path):
    """In a process of its own, with one that reads a picture of a single color after the true mark."""
    (tmp_path / "pillow_heif.py").write_text(
        "from PIL import Image, ImageFile\n"
        "class File(ImageFile.ImageFile):\n"
        "    format = 'HEIF'\n"
        "    def _open(self):\n"
        "        self._size, self._mode, self.tile = (4, 2), 'RGB', []\n"
        "        self.im = Image.core.fill('RGB', self._size, (1, 2, 3))\n"
        "def register_heif_opener():\n"
        "    Image.register_open('HEIF', File, lambda head: head[4:12] == b'ftypheic')\n"
    )
    (tmp_path / "a.heic").write_bytes(HEIC)
    code = "import sys; from saga_fast.utils.images import is_image, open_rgb; image = open_rgb(sys.argv[1]);"
    code += "print(image.size, image.getpixel((0, 0)), is_image('A.HEIC'))"
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a.heic"], env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "(4, 2) (1, 2, 3) True\n", done.stderr


def test_many_kinds_are_told_by_the_largest():
    told = skipped_kinds({f".{i:02}": i for i in range(1, 12)})
    assert told.startswith(".11: 11, .10: 10, ") and told.endswith(", .04: 4, 3 other kinds: 6")
