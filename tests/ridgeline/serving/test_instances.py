import base64
import io
import json
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from ridgeline.image_form import Form
from ridgeline.serving.instances import BadRequestError, read_instances

SHAPE = (4, 6)
PIXELS = np.arange(24, dtype=np.uint8).reshape(SHAPE) * 10
FORM = Form.of_shape(SHAPE, "nearest")


def encoded(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


PNG = encoded(Image.fromarray(PIXELS))
B64 = base64.b64encode(PNG).decode()


def read(body, is_json=False, shape=SHAPE, form=FORM, most=3, seconds=10.0):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return read_instances(body, is_json, shape, form, most, seconds)


@pytest.mark.parametrize(
    ("body", "columns"),
    [
        ({"instances": [PIXELS.tolist()]}, False),
        ({"instances": [{"images": PIXELS.tolist()}]}, False),
        ({"instances": [{"b64": B64}]}, False),
        ({"instances": [{"images": {"b64": B64}}]}, False),
        ({"signature_name": "serving_default", "instances": [PIXELS.tolist()]}, False),
        ({"inputs": [PIXELS.tolist()]}, True),
        ({"inputs": {"images": [PIXELS.tolist()]}}, True),
        ({"inputs": {"images": [{"b64": B64}]}}, True),
        (PNG, False),
        (encoded(Image.fromarray(PIXELS).convert("RGBA")), False),
        (encoded(Image.fromarray(PIXELS.repeat(5, 0).repeat(5, 1))), False),  # of another size
    ],
)
def test_images_are_read(body, columns):
    found = read(body)
    assert found.images.dtype == np.uint8
    np.testing.assert_array_equal(found.images, PIXELS[None])
    assert found.columns == columns


def test_images_of_several_kinds_in_one_request():
    found = read({"instances": [{"b64": B64}, PIXELS.tolist(), {"images": (PIXELS // 2).tolist()}]})
    np.testing.assert_array_equal(found.images, [PIXELS, PIXELS, PIXELS // 2])


def test_images_in_colour():
    pixels = np.random.default_rng(1).integers(0, 256, (4, 6, 3)).astype(np.uint8)
    form = Form.of_shape(pixels.shape, "nearest")
    body = encoded(Image.fromarray(pixels))
    np.testing.assert_array_equal(read(body, shape=pixels.shape, form=form).images, pixels[None])
    assert read(PNG, shape=pixels.shape, form=form).images.shape == (1, 4, 6, 3)  # grayscale


ROW = [0] * 6


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "received an empty body"),
        (b"hello", "bytes of an image file; received 5 bytes that are none: no image in a known format"),
        (PNG[:-30], "that are none: damaged: "),
        (b'{"instances": ', "Expected JSON, without NaN and Infinity; received a body with EOF while parsing"),
        (b'{"instances": [[[NaN]]]}', "without NaN"),
        (json.dumps({"instances": [[[1] * 6] * 4]}).replace("1", "1e999").encode(), "received inf"),
        (b"\xff{", "no image in a known format"),
        (b'{"instances": "\xff"}', "Expected JSON"),
        (b'{"instances": ' + b"[" * 20, "Expected JSON"),
        ([1], r"received \[1\]"),
        ({}, "Expected either instances or inputs; received neither"),
        ({"instances": [], "inputs": []}, "received both"),
        ({"instances": [], "name": 1}, r"received also \['name'\]"),
        (
            {"instances": [ROW], "signature_name": "other"},
            "signature_name 'serving_default'; received 'other'",
        ),
        ({"instances": []}, "at least one image; received an empty list"),
        ({"instances": None}, "received null"),
        ({"instances": {"images": [ROW]}}, "Expected a list of at least one image"),
        ({"inputs": {"pixels": [ROW]}}, r"Expected the input 'images'; received \['pixels'\]"),
        ({"instances": [{"pixels": [ROW]}]}, "Expected the input 'images'"),
        ({"instances": [ROW]}, r"of shape \(4, 6\); received \(6,\)"),
        ({"instances": [[ROW] * 5]}, r"received \(5, 6\)"),
        ({"instances": [[]]}, r"of shape \(4, 6\); received \(0,\)"),
        ({"instances": [[[]] * 4]}, r"received \(4, 0\)"),
        ({"instances": [[ROW] * 3 + [[0, 0, 0, 0, 0, [7]]]]}, r"received \[7\]. Send them"),
        ({"instances": [PIXELS.tolist(), [ROW] * 5]}, r"received \(5, 6\)"),
        ({"instances": [[ROW, ROW, ROW, [0]]]}, "lists of different lengths"),
        ({"instances": [[ROW, ROW, ROW, 0]]}, "lists of different lengths"),
        ({"instances": [PIXELS.tolist(), "x" * 9_999]}, r"of shape \(4, 6\); received 'xxx"),
        ({"instances": [None]}, "received null"),
        ({"instances": [[[0.5] * 6] * 4]}, r"integers from 0 to 255 \(uint8\) in images; received 0.5. Send them as"),
        ({"instances": [[[True] * 6] * 4]}, "received True"),
        ({"instances": [[[True, 1, 1, 1, 1, 1]] + [ROW] * 3]}, "received True"),
        ({"instances": [[ROW] * 3 + [[0, 0, 0, 0, 0, "1"]]]}, "received '1'"),
        ({"instances": [[["1"] * 6] * 4]}, "received '1'"),
        ({"instances": [[[None] * 6] * 4]}, "received null"),
        ({"instances": [[[256] * 6] * 4]}, r"from 0 to 255 \(uint8\) in images; received 256"),
        ({"instances": [[[-1] * 6] * 4]}, "received -1"),
        ({"instances": [[[10**30] * 6] * 4]}, "received 1000000000000"),
        (json.dumps({"instances": [[[1] * 6] * 4]}).replace("1", "9" * 4_300).encode(), "received 9999"),
        (json.dumps({"instances": [[[1] * 6] * 4]}).replace("1", "9" * 4_301).encode(), "received a body with"),
        ({"instances": [{"b64": B64}, [ROW]]}, r"Expected image 1 of shape \(4, 6\); received \(1, 6\)"),
        ({"instances": [{"b64": "?"}]}, "Expected base64 as image 0"),
        ({"instances": [{"b64": 1}]}, r'Expected \{"b64": "..."\} as image 0'),
        ({"instances": [{"b64": B64[:40]}]}, "Expected an image file as image 0; received 30 bytes that are none"),
    ],
)
def test_what_can_not_be_used_is_refused_with_the_reason(body, message):
    with pytest.raises(BadRequestError, match=message) as refused:
        read(body)
    assert refused.value.status == 400
    assert len(str(refused.value)) < 400


def test_memory_grows_with_the_body_whatever_it_holds():
    body = b'{"instances": [["' + b"a" * 20_000 + b'"' + b", 0" * 20_000 + b"]]}"
    tracemalloc.start()
    try:
        with pytest.raises(BadRequestError, match=r"of shape \(4, 6\); received \(20001,\)"):
            read(body)
        assert tracemalloc.get_traced_memory()[1] < 20 * len(body)
    finally:
        tracemalloc.stop()


def test_a_json_body_must_be_json_if_the_client_says_so():
    with pytest.raises(BadRequestError, match="Expected JSON"):
        read(PNG, is_json=True)


def test_more_images_than_a_batch_are_refused():
    with pytest.raises(BadRequestError, match="at most 3 images in a request; received 4. Send several") as refused:
        read({"instances": [PIXELS.tolist()] * 4})
    assert refused.value.status == 413


@pytest.mark.parametrize("item", [b"[]", b"{}", b"[[[[[[[[", b'{"a":1}'])
def test_more_lists_than_a_batch_has_are_refused_before_they_are_parsed(item):
    with pytest.raises(BadRequestError, match="at most 3 images of shape .* received more lists than") as refused:
        read(b'{"instances": [' + b",".join([item] * 1_000) + b"]}")
    assert refused.value.status == 413


@pytest.mark.parametrize("shape", [SHAPE, (4, 6, 3)])
def test_a_whole_batch_in_the_most_verbose_form_is_read(shape):
    body = {"inputs": {"images": [{"images": np.zeros(shape, int).tolist()}] * 3}, "signature_name": "serving_default"}
    assert read(body, shape=shape).images.shape == (3, *shape)


def test_an_image_of_too_many_pixels_is_refused():
    with pytest.raises(BadRequestError, match="too large: 6×4, over 20 pixels"):
        read(PNG, form=Form(SHAPE, max_image_pixels=20))


def test_images_that_take_too_long_are_refused():
    with pytest.raises(BadRequestError, match="decoded within 0 s; received larger ones: 1 of 2 took") as refused:
        read({"instances": [{"b64": B64}] * 2}, seconds=0.0)
    assert refused.value.status == 413
