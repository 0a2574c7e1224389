"""Geometry of the input: the part of an image that a model sees, and its box in the input."""

import dataclasses
import statistics

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stpm.method.preprocessing import IMAGENET, Resize, choose_coarse_shape, choose_input_shape
from stpm.options import Size
from tests.conftest import make_preprocessing

SIDES = st.integers(1, 3000)
INPUTS = st.integers(32, 700)
RESIZES = st.sampled_from(["stretch", "crop", "fit"])


@given(RESIZES, INPUTS, INPUTS, SIDES, SIDES)
@example("fit", 256, 256, 50, 1)
@example("fit", 256, 256, 1, 3000)
@example("crop", 32, 700, 1, 1)
def test_boxes_are_inside_and_not_empty(resize: Resize, height: int, width: int, across: int, down: int) -> None:
    made = make_preprocessing(height, width, resize)
    source = made.source_box(across, down)
    assert 0 <= source[0] < source[2] <= across
    assert 0 <= source[1] < source[3] <= down
    left, top, right, bottom = made.content_box(across, down)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert made.content_shape(across, down) == (bottom - top, right - left)
    for x, y in ((0, 0), (right - left - 1, bottom - top - 1)):
        original_x, original_y = made.to_original(x, y, across, down)
        assert int(source[0]) <= original_x < source[2]
        assert int(source[1]) <= original_y < source[3]


@given(INPUTS, INPUTS, SIDES, SIDES)
def test_crop_has_input_proportions_and_touches_two_sides(height: int, width: int, across: int, down: int) -> None:
    left, top, right, bottom = make_preprocessing(height, width, "crop").source_box(across, down)
    assert (right - left) / (bottom - top) == pytest.approx(width / height)
    assert left + right == pytest.approx(across)
    assert top + bottom == pytest.approx(down)
    assert right - left == pytest.approx(across) or bottom - top == pytest.approx(down)


@given(INPUTS, INPUTS, SIDES, SIDES)
def test_fit_stretches_within_10_percent_or_keeps_proportions(height: int, width: int, across: int, down: int) -> None:
    left, top, right, bottom = make_preprocessing(height, width, "fit").content_box(across, down)
    distortion = (across / down) / (width / height)
    if 1 / 1.099 < distortion < 1.099:
        assert (left, top, right, bottom) == (0, 0, width, height)
    elif not 1 / 1.101 < distortion < 1.101:
        assert (right - left == width) != (bottom - top == height)
        assert abs((right - left) - min(width, max(across * height / down, 1))) <= 0.5
        assert abs((bottom - top) - min(height, max(down * width / across, 1))) <= 0.5
        assert abs(left - (width - right)) <= 1
        assert abs(top - (height - bottom)) <= 1


@given(RESIZES, SIDES, SIDES, st.integers(1, 512), st.integers(0, 512))
def test_picture_size_keeps_proportions(resize: Resize, across: int, down: int, shorter: int, more: int) -> None:
    made = make_preprocessing(256, 192, resize)
    width, height = made.picture_size(across, down, shorter, shorter + more)
    left, top, right, bottom = made.source_box(across, down)
    assert 1 <= min(width, height) <= shorter
    assert max(width, height) <= shorter + more
    assert min(width, height) == shorter or max(width, height) == shorter + more
    scale = max(width / (right - left), height / (bottom - top))
    assert abs(width - max((right - left) * scale, 1)) <= 0.5 + scale / 2 + (right - left) / (bottom - top)


def test_padding_colour_is_zero_after_normalisation_and_batches_of_large_images_are_smaller() -> None:
    colour = np.array(make_preprocessing(64).padding_colour) / 255
    assert np.abs((colour - IMAGENET.mean) / IMAGENET.std).max() < 0.01
    assert dataclasses.replace(make_preprocessing(64), mean=(0.0, 0.0, 0.0)).padding_colour == (0, 0, 0)
    assert [make_preprocessing(side).batch_size for side in (64, 704, 1024, 4096)] == [16, 16, 8, 1]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        # (width, height) of the images; height and width of the input.
        ([(256, 256)], (256, 256)),
        ([(300, 300)], (288, 288)),
        ([(250, 630)] * 9 + [(250, 900)], (640, 256)),
        ([(1500, 1000)], (320, 480)),
        ([(900, 900)], (384, 416)),
        ([(10, 10)], (256, 256)),
        ([(5000, 100)], (64, 2304)),
        ([(5000, 200)], (64, 1600)),
        ([(1, 5000)], (1440, 32)),
        ([(100, 400), (400, 100), (200, 200)], (256, 256)),
    ],
)
def test_choose_input_shape_follows_the_median_image(sizes: list[tuple[int, int]], expected: tuple[int, int]) -> None:
    assert choose_input_shape(sizes, 163_840) == expected


@given(
    st.one_of(st.lists(st.tuples(each, each), min_size=1, max_size=9) for each in (SIDES, st.integers(1, 60_000))),
    st.one_of(st.integers(1024, 500_000), st.integers(1024, 4096**2)),
)
@example([(40_000, 5_000)], 4096**2)
@example([(1_000, 50_000)], 4096**2)
@example([(4_097, 4_097)], 4096**2)
@example([(1, 8)], 24_575)
@example([(60_000, 1_000)], 100_000)
@example([(5_000, 200)], 163_840)
@example([(1, 1)] * 3 + [(1, 9)] * 3 + [(142, 783), (287, 2545)], 16_146)
def test_choose_input_shape_keeps_budget_and_proportions(sizes: list[tuple[int, int]], budget: int) -> None:
    height, width = choose_input_shape(sizes, budget)
    assert height % 32 == width % 32 == 0
    assert 32 <= min(height, width) <= max(height, width) <= 4096
    assert height * width <= budget
    median_aspect = np.exp(np.median([np.log(w / h) for w, h in sizes]))
    aspect = min(max(median_aspect, 1 / 32), 32)
    pixels = min(max(statistics.median(w * h for w, h in sizes), 65_536), budget, 4096**2 * min(aspect, 1 / aspect))
    wanted = np.sqrt([pixels / aspect, pixels * aspect])
    # Within 10 % the images are stretched. Otherwise there is less than a step of padding.
    content = min(height, width / median_aspect)
    if not 1 / 1.1 <= width / height / median_aspect <= 1.1:
        assert max(height - content, width - content * median_aspect) < 32
    # Rounding to steps of 32, and the budget, take less than a step from the short side of what the images become.
    if aspect == median_aspect:
        assert wanted.min() - content * min(median_aspect, 1) < 32
    assert (np.array([height, width]) <= np.maximum(wanted, 16) + 16 + 1e-6).all()


def test_size_is_written_height_by_width_and_refuses_other_text() -> None:
    sizes = {"256": ("256x256", (256, 256)), "640x256": ("640x256", (640, 256)), "auto": ("auto", None)}
    for text, (written, sides) in sizes.items():
        assert (Size(text), Size(text).sides, Size(Size(text))) == (written, sides, Size(text))
    for text in ("", "256x", "x256", "256X256", "-1", "1x2x3", "2.5", "Auto", "256 "):
        with pytest.raises(ValueError, match="is not a size; give HEIGHTxWIDTH"):
            Size(text)


@pytest.mark.parametrize(
    ("shape", "coarse"),
    [
        ((704, 672), (192, 192)),
        ((288, 288), (192, 192)),
        # It has less than twice as many pixels itself.
        ((256, 256), None),
        ((1024, 32), None),
        # It would be no narrower.
        ((4096, 32), None),
        ((4096, 128), (1088, 32)),
    ],
)
def test_a_coarse_view_has_at_most_half_of_the_pixels(shape: tuple[int, int], coarse: tuple[int, int] | None) -> None:
    assert choose_coarse_shape(shape, 36_864) == coarse
