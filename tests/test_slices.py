import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from anomri.errors import AnomriError
from anomri.methods.noise import coarse_noise
from anomri.scans.boxes import box_around, is_empty
from anomri.scoring.filters import anomaly_score, erode_foreground, median_filter
from anomri.slices import (
    Window,
    brain_box,
    find_window,
    from_slices,
    join_boxes,
    percentile_scale,
    resize,
    slice_range,
    to_slices,
)
from anomri.spec import Grid, Score

SIZE = st.integers(1, 40)
SHARE = st.floats(0, 1)


@given(SIZE, SIZE, SIZE, SIZE, SHARE, SHARE)
def test_slices_cut_by_a_window_are_pasted_back_in_place(
    h: int, w: int, rows: int, columns: int, down: float, right: float
) -> None:
    # Anywhere between the slice's first and last rows, or the slice anywhere within the window.
    top, left = round(down * (h - rows)), round(right * (w - columns))
    window = Window(top, left, rows, columns)
    x = 1 + np.arange(h * w, dtype=np.float32).reshape(1, h, w, 1)
    there = window.cut(x)
    assert there.shape == (1, rows, columns, 1)
    back = window.paste(torch.from_numpy(there[..., 0]), (h, w))
    seen = np.zeros((h, w), dtype=bool)
    seen[max(top, 0) : max(top + rows, 0), max(left, 0) : max(left + columns, 0)] = True
    np.testing.assert_array_equal(back[0], x[0, ..., 0] * seen)


@settings(deadline=None)  # torch takes a second the first time
@given(
    st.lists(st.integers(0, 59), min_size=4, max_size=4),
    SIZE,
    SIZE,
    st.integers(-20, 50),
    st.integers(-20, 50),
)
def test_resizing_only_the_brain_equals_resizing_the_whole_window(
    corners: list[int], h: int, w: int, top: int, left: int
) -> None:
    data = np.zeros((2, 60, 60, 3), np.float32)
    brain = tuple(slice(min(pair), max(pair)) for pair in (corners[:2], corners[2:]))
    part = data[:, brain[0], brain[1]]
    part[:] = np.random.default_rng(0).uniform(0.5, 1, part.shape)
    window, grid = Window(top, left, 40, 36), Grid(size=(h, w))
    x = to_slices(data, window, grid, range(1, 3))
    whole = torch.from_numpy(window.cut(data)).permute(3, 0, 1, 2)[1:]
    torch.testing.assert_close(x, resize(whole, (h, w)), rtol=1e-5, atol=1e-5)


def test_the_window_follows_a_brain_that_lies_off_the_middle() -> None:
    shape, mm, brain = (320, 300, 4), (1.0, 1.0), (slice(120, 200), slice(100, 200), slice(0, 4))
    assert find_window(shape, brain, mm, Grid()) == Window(40, 30, 240, 240)
    off = (slice(220, 300), *brain[1:])
    assert find_window(shape, off, mm, Grid()) == Window(140, 30, 240, 240)
    assert find_window(
        (60, 60, 4), (slice(9, 60), slice(0, 60), slice(0, 4)), mm, Grid()
    ) == Window(-90, -90, 240, 240)
    assert find_window(shape, off, mm, Grid(field_of_view_mm=None)) == Window(0, 0, 320, 300)
    with pytest.raises(AnomriError, match="above zero over 320 mm, more than the 240 mm"):
        find_window(shape, tuple(slice(0, side) for side in shape), mm, Grid())


@given(st.lists(st.integers(0, 63), min_size=4, max_size=4), st.sampled_from([1, 8, 16]))
def test_boxes_hold_the_brain_and_divide_evenly(corners: list[int], multiple: int) -> None:
    a = (min(corners[:2]), max(corners[:2]) + 1, min(corners[2:]), max(corners[2:]) + 1)
    b = (10, 20, 30, 31)
    top, bottom, left, right = join_boxes(a, b, multiple, (64, 64))
    assert (bottom - top) % multiple == 0 and (right - left) % multiple == 0
    assert 0 <= top <= min(a[0], b[0]) and max(a[1], b[1]) <= bottom <= 64
    assert 0 <= left <= min(a[2], b[2]) and max(a[3], b[3]) <= right <= 64


def test_the_brain_box_is_tight() -> None:
    foreground = torch.zeros(3, 64, 64, dtype=torch.bool)
    foreground[0, 5, 7] = foreground[2, 20, 40] = True
    assert brain_box(foreground, 1) == (5, 21, 7, 41)
    assert brain_box(torch.zeros(1, 64, 64, dtype=torch.bool), 8) == (0, 64, 0, 64)


@pytest.mark.parametrize("shape", [(240, 240, 5), (124, 160, 5), (300, 200, 4)])
def test_a_blob_keeps_its_place_through_the_working_grid(shape: tuple[int, int, int]) -> None:
    data = np.zeros(shape, np.float32)
    x, y = shape[0] // 2 + 17, shape[1] // 2 - 23
    data[x - 8 : x + 9, y - 8 : y + 9, 2] = 1
    window = find_window(shape, box_around(data), (1.0, 1.0), Grid())
    slices = to_slices(data[None], window, Grid(), range(1, 4))
    assert slices.shape == (3, 1, 128, 128)
    back = from_slices(slices[:, 0], shape, window, range(1, 4))
    assert back.shape == shape
    # Shrinking without antialiasing samples an edge up to a third of a voxel off.
    np.testing.assert_allclose(ndimage.center_of_mass(back), (x, y, 2), atol=0.5)


def test_intensity_scale_and_slice_range_are_computed() -> None:
    data = np.zeros((2, 10, 10, 5), np.float32)
    data[0, :, :, 1:4] = np.linspace(1, 100, 300).reshape(10, 10, 3)
    scale = percentile_scale(data, 99)
    assert scale == (pytest.approx(np.percentile(data[0][data[0] > 0], 99)), 1.0)
    assert slice_range(data / 50, 0.5) == range(1, 4)
    assert not slice_range(np.zeros_like(data))


@given(
    st.lists(st.integers(1, 70_000), min_size=1, max_size=60),
    st.sampled_from([1.0, 0.5]),
    st.floats(0, 100),
)
def test_percentiles_equal_those_of_numpy(values: list[int], step: float, percent: float) -> None:
    data = np.zeros((1, 4, 4, 4), np.float32)
    data.flat[: len(values)] = step * np.array(values)
    expected = np.percentile(data[data > 0].astype(np.float64), percent)
    assert percentile_scale(data, percent) == (pytest.approx(expected, rel=1e-6),)


def test_a_box_holds_all_above_zero_and_no_more() -> None:
    values = np.zeros((3, 6, 7, 8), np.float32)
    assert all(side == slice(0, 0) for side in box_around(values))
    values[1, 2, 3, 4] = values[2, 2, 5, 4] = 1
    assert box_around(values) == (slice(1, 3), slice(2, 3), slice(3, 6), slice(4, 5))
    assert box_around(np.asfortranarray(values > 0)) == box_around(values)
    assert box_around(values[::-1, :, ::-1]) == (slice(0, 2), slice(2, 3), slice(1, 4), slice(4, 5))
    assert is_empty(box_around(0 * values[::-1])[:1])


def test_the_median_filter_equals_that_of_scipy_with_reflection() -> None:
    score = np.random.default_rng(0).random((3, 40, 33)).astype(np.float32)
    expected = ndimage.median_filter(score, size=(1, 5, 5), mode="mirror")
    np.testing.assert_array_equal(median_filter(score, 5), expected)


def test_erosion_keeps_pixels_whose_local_mean_is_above_a_level() -> None:
    foreground = torch.from_numpy(np.random.default_rng(0).random((2, 30, 30)) < 0.97)
    mean = ndimage.uniform_filter(foreground.numpy().astype(float), size=(1, 5, 5), mode="constant")
    np.testing.assert_array_equal(erode_foreground(foreground, 5, 0.95).numpy(), mean > 0.95)


def test_the_score_without_filters_is_the_masked_residual() -> None:
    raw, foreground = torch.rand(2, 16, 16), torch.rand(2, 16, 16) > 0.5
    score = anomaly_score(raw, foreground, Score(erosion=0, median=0))
    np.testing.assert_array_equal(score, (raw * foreground).numpy())


def test_noise_has_its_size_and_one_shift_for_each_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = coarse_noise((64, 2, 128, 128), 16, 0.2, generator)
    # Bilinear weights average neighbours, so the spread is below that of the drawn values.
    assert 0.1 < float(noise.std()) < 0.2
    assert abs(float(noise.mean())) < 0.01
    again = coarse_noise((64, 2, 128, 128), 16, 0.2, torch.Generator().manual_seed(0))
    assert torch.equal(noise, again)
    # One roll a batch: undone, the corners of every noise are the drawn values themselves.
    low = 0.2 * torch.randn((64, 2, 16, 16), generator=generator.manual_seed(0))
    rows, columns = (torch.randint(0, 2**31, (2,), generator=generator) % 128).tolist()
    unrolled = torch.roll(noise, (-rows, -columns), dims=(2, 3))
    assert torch.equal(unrolled[:, :, ::127, ::127], low[:, :, ::15, ::15])
    full = coarse_noise((64, 2, 32, 32), 32, 0.2, generator)
    assert float(full.std()) == pytest.approx(0.2, rel=0.02)
