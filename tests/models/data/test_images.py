from __future__ import annotations

import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from models.data.images import ImageInfo, ImageLimits, decode_image, make_thumbnail, probe_image
from models.errors import UnreadableImage
from tests.models.data.pictures import encode, picture, pixels


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and has no pixels to speak of."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def webp_canvas(width: int, height: int) -> bytes:
    body = bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", 100) + b"WEBPVP8X" + struct.pack("<I", 10) + body


@pytest.mark.parametrize(
    ("image_format", "options"),
    [
        ("JPEG", {"quality": 95}),
        ("JPEG", {"quality": 95, "progressive": True}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"quality": 95}),
        ("GIF", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ],
)
def test_every_allowed_format_is_probed_and_decoded(image_format: str, options: dict[str, object]) -> None:
    data = encode(picture(24, 32), image_format, **options)
    assert probe_image(data) == ImageInfo(image_format, width=32, height=24)
    decoded = decode_image(data)
    assert decoded.shape == (24, 32, 3)
    assert decoded.dtype == np.uint8
    assert np.abs(decoded - pixels(picture(24, 32))).mean() < 10


def test_lossless_formats_keep_every_pixel() -> None:
    assert (decode_image(encode(picture(), "PNG")) == pixels(picture())).all()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"hello, this is text", "not an image of a known kind"),
        (b"  <html></html>", "text document"),
        (b"%PDF-1.7", "PDF"),
        (b"PK\x03\x04rest", "ZIP"),
        (b"\xff\xd8\xff", "header is damaged"),
        (b"\x89PNG\r\n\x1a\n", "header is damaged"),
        (b"GIF89a", "header is damaged"),
        (b"RIFF\x00\x00\x00\x00WEBP", "header is damaged"),
        (b"RIFF\x00\x00\x00\x00WEBPVP8 \x00\x00\x00\x00", "header is damaged"),
        (b"\0\0\0\x1cftypavif", "not an image of a known kind"),
        (encode(picture(), "PPM"), "not an image of a known kind"),
    ],
)
def test_what_is_no_image_says_what_it_is(data: bytes, reason: str) -> None:
    for use in (probe_image, decode_image, lambda d: make_thumbnail(d, 8)):
        with pytest.raises(UnreadableImage, match=reason):
            use(data)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated_files_are_refused_at_every_length(image_format: str) -> None:
    data = encode(picture(), image_format)
    for keep in (0.3, 0.6, 0.9):
        with pytest.raises(UnreadableImage):
            probe_image(data[: int(len(data) * keep)])


def test_truncated_large_jpeg_is_noticed_although_probing_decodes_small() -> None:
    data = encode(picture(900, 1200), "JPEG")
    with pytest.raises(UnreadableImage, match="truncated"):
        probe_image(data[:-200])


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_damaged_files_raise_only_unreadable_image(image_format: str) -> None:
    rng = np.random.default_rng(0)
    data = np.frombuffer(encode(picture(), image_format), np.uint8)
    for _ in range(60):
        damaged = data.copy()
        damaged[rng.integers(0, len(data), size=8)] = rng.integers(0, 256, size=8)
        with suppress(UnreadableImage):
            assert probe_image(damaged.tobytes()).width >= 1


def test_a_bomb_is_refused_by_its_header() -> None:
    with pytest.raises(UnreadableImage, match=r"100\.0 million pixels; at most 64 million"):
        probe_image(png_header(10_000, 10_000))
    with pytest.raises(UnreadableImage, match="at most 64 million"):
        decode_image(png_header(2**31 - 1, 2**31 - 1))
    with pytest.raises(UnreadableImage, match="at most 64 million"):
        probe_image(webp_canvas(2**24, 2**24))


def test_limits_hold_at_and_past_the_limit() -> None:
    data = encode(picture(24, 32))
    probe_image(data, ImageLimits(max_pixels=24 * 32, max_bytes=len(data), min_side=24))
    for limits in (
        ImageLimits(max_pixels=24 * 32 - 1),
        ImageLimits(max_bytes=len(data) - 1),
        ImageLimits(min_side=25),
    ):
        with pytest.raises(UnreadableImage):
            probe_image(data, limits)


def test_too_many_progressive_scans_are_refused() -> None:
    data = encode(picture(), "JPEG")
    with pytest.raises(UnreadableImage, match="scans"):
        probe_image(data + b"\xff\xda" * 501)


def test_scans_are_counted_against_the_pixels_that_each_passes_over() -> None:
    """By the header alone: these files have no pixels to speak of."""
    large = encode(Image.new("L", (8, 8)), "JPEG", progressive=True)
    frame = large.index(b"\xff\xc2") + 5
    large = large[:frame] + struct.pack(">HH", 8000, 8000) + large[frame + 4 :]
    usual = large.count(b"\xff\xda")
    for use in (probe_image, decode_image, lambda d: make_thumbnail(d, 8)):
        with pytest.raises(UnreadableImage, match="400 scans over 8000 x 8000 pixels"):
            use(large + b"\xff\xda" * (400 - usual))
    small = encode(picture(), "JPEG", progressive=True)
    assert probe_image(small + b"\xff\xda" * 400).width == 32


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = picture(24, 32)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    for image_format in ("PNG", "TIFF", "WEBP"):
        options = {"lossless": True} if image_format == "WEBP" else {}
        data = encode(stored, image_format, exif=exif, **options)
        assert (decode_image(data) == pixels(upright)).all()
        assert probe_image(data) == ImageInfo(image_format, width=32, height=24)


def test_damaged_exif_neither_warns_nor_fails() -> None:
    data = encode(picture(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff garbage")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(data).shape == (24, 32, 3)
        assert probe_image(data).format == "JPEG"


def test_pillow_logs_nothing_about_a_strange_tiff(caplog: pytest.LogCaptureFixture) -> None:
    samples_per_pixel = struct.pack("<HHL", 277, 3, 1)
    data = encode(picture(), "TIFF")
    assert data.count(samples_per_pixel + b"\3") == 1
    with pytest.raises(UnreadableImage):
        probe_image(data.replace(samples_per_pixel + b"\3\0", samples_per_pixel + b"\0\x08"))
    assert caplog.records == []


def test_pillow_warning_of_many_pixels_does_not_escape() -> None:
    image = Image.new("1", (9_500, 9_500))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert probe_image(encode(image), ImageLimits(max_pixels=100_000_000)).width == 9_500


def test_cmyk_is_converted() -> None:
    decoded = decode_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))
    assert decoded[4, 4, 0] > 200
    assert decoded[4, 4, 1] < 60


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65_535, 64).astype(np.uint16).reshape(8, 8)
    expected = np.rint(ramp / 257).astype(np.uint8)
    for image_format in ("PNG", "TIFF"):
        decoded = decode_image(encode(Image.fromarray(ramp), image_format))
        assert (decoded == expected[..., None]).all()


def test_float_and_wide_integer_tiffs_are_scaled() -> None:
    unit = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    expected = np.rint(unit * 255).astype(np.uint8)
    for values in (unit, unit * 255, unit * 4000 - 2000, np.rint(unit * 2**30).astype(np.int32)):
        decoded = decode_image(encode(Image.fromarray(values), "TIFF"))[..., 0].astype(int)
        assert np.abs(decoded - expected).max() <= 1
    broken = unit.copy()
    broken[0, 0] = np.nan
    assert decode_image(encode(Image.fromarray(broken), "TIFF"))[0, 0, 0] == 0


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_on_white(mode: str) -> None:
    image = Image.new(mode, (4, 4), (0, 0, 0, 128) if mode == "RGBA" else (0, 128))
    image.putpixel((0, 0), (0, 0, 0, 0) if mode == "RGBA" else (0, 0))
    decoded = decode_image(encode(image))
    assert (decoded[0, 0] == 255).all()
    assert (np.abs(decoded[1, 1].astype(int) - 127) <= 1).all()


def test_palette_with_transparent_entry_lies_on_white() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 10, 10])
    image.putpixel((0, 0), 0)
    decoded = decode_image(encode(image, transparency=0))
    assert decoded[0, 0].tolist() == [255, 255, 255]
    assert decoded[1, 1].tolist() == [200, 10, 10]


def test_one_bit_and_plain_palette() -> None:
    bits = Image.new("1", (4, 4), 1)
    bits.putpixel((0, 0), 0)
    assert decode_image(encode(bits))[0, :2, 0].tolist() == [0, 255]
    assert decode_image(encode(picture().quantize(16))).shape == (24, 32, 3)


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG"])
def test_animations_give_their_first_frame(image_format: str) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = encode(frames[0], image_format, save_all=True, append_images=frames[1:], **options)
    assert decode_image(data)[3, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize("size", [(1, 300), (300, 1), (1, 1)])
def test_degenerate_images_are_usable(size: tuple[int, int]) -> None:
    data = encode(Image.new("RGB", size, "green"))
    assert decode_image(data, target_side=16).shape == (size[1], size[0], 3)
    assert probe_image(make_thumbnail(data, 16)).format == "JPEG"


@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
def test_target_side_sets_the_shorter_side(image_format: str) -> None:
    source = picture(600, 800)
    decoded = decode_image(encode(source, image_format, quality=95), target_side=100)
    assert decoded.shape == (100, 133, 3)
    plain = pixels(source.resize((133, 100), Image.Resampling.BILINEAR))
    assert np.abs(decoded - plain).mean() < 2


def test_target_side_holds_for_sideways_and_never_enlarges() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encode(picture(300, 450), "JPEG", exif=exif), target_side=64).shape == (96, 64, 3)
    assert decode_image(encode(picture(24, 32)), target_side=64).shape == (24, 32, 3)


def test_thumbnail_fits_and_keeps_the_aspect() -> None:
    thumbnail = Image.open(io.BytesIO(make_thumbnail(encode(picture(300, 600)), 64)))
    assert thumbnail.format == "JPEG"
    assert thumbnail.size == (64, 32)


def test_threads_get_the_same_pixels() -> None:
    files = [encode(picture(200, 150, seed), "JPEG") for seed in range(8)] * 4
    alone = [decode_image(data, target_side=64) for data in files]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda data: decode_image(data, target_side=64), files))
    assert all((a == b).all() for a, b in zip(alone, together, strict=True))
