"""The method's equations against plain numpy, written from the paper."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stpm.method.loss import distance_map, matching_loss
from stpm.method.teacher import content_mask

SHAPES = [(2, 8, 16, 16), (2, 12, 8, 8), (2, 20, 4, 4)]
ALL = [None] * len(SHAPES)


def features(seed: int, shapes: list[tuple[int, ...]] = SHAPES) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def reference_distance(teacher: np.ndarray, student: np.ndarray) -> np.ndarray:
    """Compute equations 1 and 2 as printed: normalise each vector over channels, then half the squared distance."""

    def unit(f: np.ndarray) -> np.ndarray:
        norm = np.sqrt((f.astype(np.float64) ** 2).sum(axis=1, keepdims=True))
        return np.divide(f, norm, out=np.zeros_like(f, np.float64), where=norm > 0)

    return 0.5 * ((unit(teacher) - unit(student)) ** 2).sum(axis=1)


@given(
    hnp.arrays(
        np.float32,
        (2, 1, 5, 2, 2),
        elements=st.just(0.0) | st.floats(2**-10, 2**10, width=32) | st.floats(-(2**10), -(2**-10), width=32),
    ),
    st.floats(0.01, 100.0),
)
def test_distance_map_is_bounded_symmetric_and_scale_invariant(pair: np.ndarray, scale: float) -> None:
    t, s = torch.from_numpy(pair[0]), torch.from_numpy(pair[1])
    distance = distance_map(t, s)
    assert ((distance >= 0) & (distance <= 2)).all()
    np.testing.assert_allclose(distance.numpy(), reference_distance(pair[0], pair[1]), atol=2e-6)
    torch.testing.assert_close(distance, distance_map(s, t))
    torch.testing.assert_close(distance, distance_map(t * scale, s), atol=1e-5, rtol=0)


def test_distance_map_of_zeros_of_bfloat16_and_its_gradient() -> None:
    zero, other = torch.zeros(1, 4, 1, 1), torch.randn(1, 4, 1, 1)
    assert distance_map(zero, other).item() == pytest.approx(0.5)
    assert distance_map(zero, zero).item() == 0.0
    with pytest.raises(ValueError, match=r"\(1, 4, 1, 1\) and student \(4, 1, 1\)"):
        distance_map(zero, other[0])
    t, s = (torch.from_numpy(f).bfloat16() for f in (features(2)[0], features(3)[0]))
    distance = distance_map(t, s)
    assert distance.dtype == torch.float32
    np.testing.assert_allclose(distance.numpy(), reference_distance(t.float().numpy(), s.float().numpy()), atol=1e-5)
    # The gradient is that of the normalised form.
    t, s = torch.randn(2, 6, 4, 4), torch.randn(2, 6, 4, 4, requires_grad=True)
    distance_map(t, s).mean().backward()
    ours, s.grad = s.grad, None
    normal = torch.nn.functional.normalize
    (0.5 * (normal(t, dim=1) - normal(s, dim=1)).pow(2).sum(1)).mean().backward()
    torch.testing.assert_close(ours, s.grad, atol=1e-6, rtol=1e-4)


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, int], list[int]]:
    """Draw an input's height and width, and a box in it."""
    height, width = draw(st.integers(32, 100)), draw(st.integers(32, 100))
    left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    return (height, width), [left, top, draw(st.integers(left + 1, width)), draw(st.integers(top + 1, height))]


@given(boxes(), st.integers(1, 16), st.integers(1, 16))
def test_content_mask_marks_centres_on_image(case: tuple[tuple[int, int], list[int]], rows: int, columns: int) -> None:
    input_shape, (left, top, right, bottom) = case
    mask = content_mask(torch.tensor([case[1]], dtype=torch.int32), input_shape, (rows, columns))[0].numpy()
    assert mask.any()
    y = np.array([top <= (i + 0.5) * input_shape[0] / rows < bottom for i in range(rows)])
    x = np.array([left <= (i + 0.5) * input_shape[1] / columns < right for i in range(columns)])
    if y.any() and x.any():
        np.testing.assert_array_equal(mask, np.outer(y, x))
    if not y.any():
        (row,) = np.flatnonzero(mask.any(axis=1))
        assert row * input_shape[0] / rows <= (top + bottom) / 2 < (row + 1) * input_shape[0] / rows


@given(boxes(), st.integers(0, 2**31))
def test_matching_loss_ignores_padding(case: tuple[tuple[int, int], list[int]], seed: int) -> None:
    input_shape, box = case
    generator = torch.Generator().manual_seed(seed)
    shapes = [(-(-input_shape[0] // stride), -(-input_shape[1] // stride)) for stride in (4, 8, 16)]
    valid = [content_mask(torch.tensor([box]), input_shape, shape) for shape in shapes]
    teacher, student = ([torch.rand(1, 5, *shape, generator=generator) for shape in shapes] for _ in range(2))
    other = [
        torch.where(v[:, None], s, torch.rand(s.shape, generator=generator))
        for s, v in zip(student, valid, strict=True)
    ]
    loss = matching_loss(teacher, student, valid)
    torch.testing.assert_close(loss, matching_loss(teacher, other, valid))
    distances = [distance_map(t, s)[v] for t, s, v in zip(teacher, student, valid, strict=True)]
    assert loss.item() == pytest.approx(np.mean([d.double().mean().item() for d in distances]), abs=1e-6)


def test_matching_loss_weighs_images_equally() -> None:
    teacher, student = ([torch.from_numpy(f) for f in features(seed)] for seed in (0, 1))
    content = torch.tensor([[0, 0, 64, 64], [16, 0, 48, 64]])
    valid = [content_mask(content, (64, 64), tuple(t.shape[2:])) for t in teacher]
    both = matching_loss(teacher, student, valid)
    alone = [matching_loss(*([f[i : i + 1] for f in side] for side in (teacher, student, valid))) for i in range(2)]
    torch.testing.assert_close(both, torch.stack(alone).mean())
    torch.testing.assert_close(alone[0], matching_loss([t[:1] for t in teacher], [s[:1] for s in student], ALL))
