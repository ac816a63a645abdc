from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from ridgeline.image_decoding import UnreadableImage, decode, quiet_pillow, shape_of
from ridgeline.image_form import Form

RNG = np.random.default_rng(0)
SMOOTH = np.linspace(0, 255, 24 * 32 * 3).reshape(24, 32, 3).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(content: bytes, **values: Any) -> np.ndarray:
    with quiet_pillow():
        image, _ = decode(content, Form(**values))
    pixels = np.frombuffer(image.tobytes(), np.uint8).reshape(shape_of(image))
    np.testing.assert_array_equal(pixels, np.asarray(image))
    return pixels


RGB = Image.fromarray(SMOOTH)
NOISE = Image.fromarray(RNG.integers(0, 256, (64, 64, 3)).astype(np.uint8))
TRANSPARENT = np.dstack([SMOOTH, np.where(np.arange(32) < 16, 255, 0)[None].repeat(24, 0).astype(np.uint8)])
OVER_GREY = np.where(np.arange(32)[None, :, None] < 16, SMOOTH, 100)


@pytest.mark.parametrize(
    ("content", "expected", "tolerance"),
    [
        (encoded(RGB, "PNG"), SMOOTH, 0),
        (encoded(RGB, "BMP"), SMOOTH, 0),
        (encoded(RGB, "TIFF"), SMOOTH, 0),
        (encoded(RGB, "PPM"), SMOOTH, 0),
        (encoded(RGB, "WEBP", lossless=True), SMOOTH, 0),
        (encoded(RGB, "JPEG", quality=95), SMOOTH, 6),
        (encoded(RGB, "JPEG", quality=95, progressive=True), SMOOTH, 6),
        (encoded(RGB.convert("CMYK"), "JPEG", quality=95), SMOOTH, 8),
        (encoded(RGB.convert("P"), "PNG"), np.asarray(RGB.convert("P").convert("RGB")), 0),
        (encoded(RGB.convert("L"), "PNG"), np.asarray(RGB.convert("L"))[..., None].repeat(3, 2), 0),
        (encoded(RGB.convert("1"), "PNG"), np.asarray(RGB.convert("1").convert("RGB")), 0),
        (encoded(Image.fromarray(TRANSPARENT), "PNG"), OVER_GREY, 0),
        (encoded(Image.fromarray(TRANSPARENT).convert("LA"), "PNG"),
         np.where(np.arange(32)[None, :, None] < 16, np.asarray(RGB.convert("L"))[..., None], 100).repeat(3, 2), 0),
        (encoded(Image.fromarray(SMOOTH[..., 0].astype(np.uint16) * 257), "PNG"), SMOOTH[..., :1].repeat(3, 2), 0),
        (encoded(Image.fromarray(SMOOTH[..., 0].astype(np.uint16) * 257), "TIFF"), SMOOTH[..., :1].repeat(3, 2), 0),
        (encoded(RGB.convert("P"), "PNG", transparency=int(np.asarray(RGB.convert("P"))[0, 0])), None, 0),
    ],
)  # fmt: skip
def test_every_kind_of_image_becomes_rgb(content: bytes, expected: np.ndarray | None, tolerance: int) -> None:
    found = decoded(content, background=100)
    assert found.dtype == np.uint8
    assert found.shape == (24, 32, 3)
    if expected is None:  # a transparent colour of a palette
        assert found[0, 0].tolist() == [100, 100, 100]
    else:
        assert np.abs(found.astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_16_bits_become_the_nearest_of_8_bits(dtype: type) -> None:
    pixels = np.arange(65_536).reshape(256, 256)
    if dtype is np.int32:  # Pillow reads some files so, whose values may be any
        pixels = np.concatenate([pixels, [[-(2**31), -1, 65_536, 2**31 - 1] * 64]])
    found = decoded(encoded(Image.fromarray(pixels.astype(dtype)), "TIFF"), color_mode="grayscale")
    np.testing.assert_array_equal(found, np.clip(np.floor(pixels / 257 + 0.5), 0, 255))


def test_grayscale_has_one_channel() -> None:
    np.testing.assert_array_equal(decoded(encoded(RGB, "PNG"), color_mode="grayscale"), np.asarray(RGB.convert("L")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(orientation: int) -> None:
    expected = {
        1: SMOOTH,
        2: SMOOTH[:, ::-1],
        3: SMOOTH[::-1, ::-1],
        4: SMOOTH[::-1],
        5: SMOOTH.transpose(1, 0, 2),
        6: np.rot90(SMOOTH, -1),
        7: SMOOTH[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(SMOOTH),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decoded(encoded(RGB, "PNG", exif=exif)), expected[orientation])


def test_the_first_frame_of_an_animation_counts() -> None:
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (10, 200)]
    for kind in ("GIF", "WEBP", "TIFF"):
        content = encoded(
            frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
        )
        assert set(decoded(content).ravel()) == {10}


def test_smaller_images_are_antialiased_means() -> None:
    noise = RNG.integers(0, 256, (64, 64, 3)).astype(np.uint8)
    content = encoded(Image.fromarray(noise), "PNG")
    means = noise.reshape(8, 8, 8, 8, 3).mean((1, 3))
    assert np.abs(decoded(content, image_size=(8, 8), resampling="box") - means).max() <= 1
    assert decoded(content, image_size=(8, 8)).std() < noise.std() / 3  # bilinear is antialiased, too
    np.testing.assert_array_equal(decoded(content, image_size=(16, 32), resampling="nearest"), noise[2::4, 1::2])
    assert decoded(content, image_size=(10, 20)).shape == (10, 20, 3)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"hello", "no image in a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "no image in a known format"),
        (encoded(RGB, "JPEG")[:300], "damaged|no image"),
        (encoded(NOISE, "JPEG")[:-100], "damaged: "),
        (encoded(NOISE, "PNG")[:-100], "damaged: "),
        (encoded(NOISE, "GIF")[:-300], "damaged: "),
        (encoded(Image.new("L", (5_000, 300)), "PNG"), "too large: 5000×300, over 1,000,000 pixels"),
        (encoded(Image.new("L", (20_000, 20_000)), "PNG"), "too large: "),
        (encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "pixels are floats"),
    ],
)
def test_what_is_no_whole_image_is_unreadable_with_a_reason(content: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImage, match=reason):
        decoded(content, max_image_pixels=1_000_000)


def test_odd_metadata_is_no_problem() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = b"Exif\0\0II*\0\xff\xff\xff\xff"
    found = decoded(encoded(RGB, "JPEG", quality=95, icc_profile=profile, exif=exif))
    assert found.shape == (24, 32, 3)
