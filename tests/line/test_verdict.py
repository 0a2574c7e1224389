"""Verdicts on nights made of random numbers, and on pictures of real products."""

import datetime
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy import stats

from stpm.data import mvtec
from stpm.data.image_statistics import COMPARED, compute_statistics
from stpm.line.night import CategoryNight, Night
from stpm.line.options import MonitoringOptions
from stpm.line.verdict import Reference, Sample, judge
from stpm.method.calibration import Calibration, threshold_rank
from stpm.method.scales import HeatmapScale

RATE = 0.01
# Mean and standard deviation of each statistic of good images.
USUAL = {
    "width": (640, 0),
    "height": (480, 0),
    "brightness": (110, 3),
    "contrast": (0.6, 0.02),
    "sharpness": (0.15, 0.01),
    "red_to_green": (1.0, 0.01),
    "blue_to_green": (0.9, 0.01),
    "position_x": (0.5, 0.01),
    "position_y": (0.45, 0.02),
}


def draw_statistics(rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
    return {name: rng.normal(*USUAL[name], count).astype(np.float32) for name in COMPARED}


@dataclass(frozen=True, kw_only=True)
class DrawnNight(CategoryNight):
    """A night of a category: its date, counts and sample."""

    date: datetime.date
    p_values: np.ndarray
    statistics: Mapping[str, np.ndarray]

    @property
    def sample(self) -> Sample:
        return {"p_value": self.p_values, **self.statistics}


class Line:
    """A production line: a model with one calibration, and nights that it scored."""

    def __init__(self, rng: np.random.Generator, calibration: int = 50, good: int = 100) -> None:
        self.rng = rng
        self.calibration = np.sort(rng.random(calibration))
        self.reference = Reference(calibration, draw_statistics(rng, good))

    def night(self, number: int = 0, images: int = 300, defects: float = 0.0, **changed: Any) -> DrawnNight:
        """Make a night of good images, and a share of defects above all of the calibration's."""
        scores = self.rng.random(images)
        scores[self.rng.random(images) < defects] = 2.0
        count = len(self.calibration)
        p_values = (1 + count - np.searchsorted(self.calibration, scores)) / (count + 1)
        values: dict[str, Any] = {
            "date": datetime.date(2026, 11, 1) + datetime.timedelta(number),
            "model_id": "nut-1",
            "images": images,
            "errors": {},
            "alarms": int((scores > self.calibration[-threshold_rank(count, RATE)]).sum()),
            "false_alarm_rate": RATE,
            "p_values": p_values.astype(np.float32),
            "level": "fine",
            "statistics": draw_statistics(self.rng, images),
        }
        return DrawnNight(**(values | changed))

    def nights(self, number: int, **options: Any) -> list[DrawnNight]:
        return [self.night(i, **options) for i in range(number)]

    def empty(self, number: int) -> DrawnNight:
        nothing: Mapping[str, np.ndarray] = dict.fromkeys(COMPARED, np.empty(0, np.float32))
        return self.night(number, images=0, statistics=nothing)


@pytest.fixture
def line(rng: np.random.Generator) -> Line:
    return Line(rng)


def verdict(nights: list[DrawnNight], reference: Reference, tests: int = 20, *, is_idle: bool = False) -> CategoryNight:
    """Judge the last night, as one of so many verdicts; `is_idle`: another category has no images."""
    others = {"bolt": replace(nights[-1], images=0)} if is_idle else {}
    *earlier, night = (Night(str(each.date), (), categories={"nut": each} | others) for each in nights)
    options = MonitoringOptions(nights=tests // len(night.categories))
    return judge(night, "nut", nights[-1].sample, reference, earlier, options)


def is_false(verdict: CategoryNight) -> bool:
    return verdict.level in ("watch", "act")


def changed(night: DrawnNight, **factors: float) -> DrawnNight:
    """Multiply some of a night's statistics."""
    statistics = {name: values * np.float32(factors.get(name, 1)) for name, values in night.statistics.items()}
    return replace(night, statistics=statistics)


def test_nights_of_the_calibrations_own_distribution_are_fine_at_the_stated_rate(rng: np.random.Generator) -> None:
    """1,000 nights, each with a calibration of its own: few or many images, earlier nights or none."""
    false = {1: 0, 20: 0, 1000: 0}
    for _ in range(1000):
        line = Line(rng, calibration=int(rng.integers(10, 100)), good=int(rng.integers(20, 200)))
        nights = line.nights(int(rng.integers(1, 6)), images=int(rng.integers(5, 400)))
        for tests in false:
            false[tests] += is_false(verdict(nights, line.reference, tests))
    assert all(count <= stats.binom.ppf(0.999, 1000, 0.05 / tests) for tests, count in false.items())


def test_more_defects_than_on_earlier_nights_are_named(line: Line) -> None:
    nights = [*line.nights(20, images=1000, defects=0.03), line.night(20, images=1000, defects=0.08)]
    found = verdict(nights, line.reference)
    assert found.level == "act"
    assert found.changes[0].name == "alarms"
    alarms = nights[-1].alarms
    expected = f"more alarms than usual: {alarms / 10:.1f} % of the images ({alarms} of 1,000, 95 % interval "
    assert found.reasons[0].startswith(expected)
    assert found.reasons[0].endswith("on 20 nights before")
    # One night of few images does not stand out; three together do.
    nights = [
        *line.nights(20, images=300, defects=0.03),
        *(line.night(i, images=300, defects=0.1) for i in (20, 21, 22)),
    ]
    assert verdict(nights[:21], line.reference, tests=2000).level == "fine"
    found = verdict(nights, line.reference, tests=2000)
    assert " on the last 3 nights, " in found.reasons[0]
    # Alarms of another model are not compared.
    nights = [replace(night, model_id="nut-0") for night in line.nights(5, images=1000)]
    assert verdict([*nights, line.night(5, images=1000, defects=0.04)], line.reference).level == "fine"
    # On the first night, many alarms are.
    found = verdict([line.night(defects=0.3)], line.reference)
    assert found.level == "act"
    assert found.reasons[0].startswith("more alarms than the requested 1.0 %: ")
    # They are expected at a threshold that lets them through.
    many = replace(line.night(defects=0.3), false_alarm_rate=0.3, decision="0.5, decided by ann")
    assert "alarms" not in [change.name for change in verdict([many], line.reference).changes]
    found = verdict([replace(many, alarms=250)], line.reference)
    expected = "more alarms than the threshold that a person decided lets expect 30 %: "
    assert [reason.startswith(expected) for reason in found.reasons if "alarms" in reason] == [True]


@pytest.mark.parametrize("fault", [0, 14])
def test_a_night_with_a_fault_does_not_raise_what_is_usual(line: Line, fault: int) -> None:
    nights = line.nights(20, images=1000, defects=0.02)
    nights[fault] = replace(line.night(fault, images=1000, defects=0.6), errors={"damaged": 300})
    found = verdict(
        [*nights, replace(line.night(20, images=1000, defects=0.09), errors={"damaged": 70, "empty": 10})],
        line.reference,
    )
    assert [change.name for change in found.changes][:2] == ["errors", "alarms"]
    assert "usually 0.0 %" in found.reasons[0]
    assert "on 19 nights before" in found.reasons[1]


def test_scores_that_moved_are_named(line: Line) -> None:
    night = line.night()
    higher = verdict([replace(night, p_values=night.p_values**3)], line.reference)
    lower = verdict([replace(night, p_values=1 - (1 - night.p_values) ** 3)], line.reference)
    assert [change.name for change in higher.changes] == [change.name for change in lower.changes] == ["scores"]
    assert "scores are higher than the calibration's: half of the images score above 8" in higher.reasons[0]
    assert "scores are lower than the calibration's" in lower.reasons[0]


@pytest.mark.parametrize(
    ("statistic", "factor", "text"),
    [
        ("brightness", 1.11, "the images are 11 % brighter than in training: has the lamp or the exposure changed?"),
        ("brightness", 0.9, "the images are 9.6 % darker than in training"),
        ("brightness", 1e9, "the images are more than 1000 % brighter than in training"),
        ("sharpness", 0.6, "their sharpness is 40 % lower than in training: has the focus changed, or is the lens"),
        ("position_x", 0.9, "the content lies 5.0 % of the width further left than in training: was the camera"),
        ("position_y", 1.1, "the content lies 5.0 % of the height further down than in training"),
        ("red_to_green", 1.08, "the images are 8.0 % redder than in training: has the lamp or the white balance"),
        ("width", 2.0, "the images are 100 % wider than in training: has the camera's resolution changed?"),
    ],
)
def test_a_change_of_the_images_is_said_in_words(line: Line, statistic: str, factor: float, text: str) -> None:
    found = verdict([*line.nights(3), changed(line.night(3), **{statistic: factor})], line.reference)
    assert found.level == "act"
    (reason,) = found.reasons
    assert reason.startswith(text)


def test_the_largest_change_comes_first_and_causes_before_consequences(line: Line) -> None:
    night = changed(line.night(1, defects=0.5), brightness=0.94, sharpness=0.5)
    found = verdict([line.night(), night], line.reference)
    assert [change.name for change in found.changes] == ["sharpness", "brightness", "alarms", "scores"]
    assert [change.level for change in found.changes] == ["act", "watch", "act", "watch"]
    assert all(0 <= change.p_value <= 0.05 for change in found.changes)


def test_a_lamp_that_failed_during_the_night_is_named(line: Line) -> None:
    night = line.night()
    night.statistics["brightness"][:90] *= 0.5
    found = verdict([night], line.reference)
    assert found.level == "act"
    assert found.reasons == (
        "30 % of the images are unlike every training image: the images are 50 % darker; "
        "has the lamp or the exposure changed?",
    )


def test_a_p_value_is_corrected_for_all_categories_and_nights_of_the_page(line: Line) -> None:
    night = changed(line.night(images=30), brightness=1.2)
    alone, one_of_many = (
        judge(each, "nut", night.sample, line.reference, [], MonitoringOptions(nights=nights)).changes[0].p_value
        for each, nights in (
            (Night(str(night.date), (), categories={"nut": night}), 1),
            (Night(str(night.date), (), categories={"nut": night, "bolt": night}), 7),
        )
    )
    assert one_of_many == pytest.approx(14 * alone)
    assert 0 < one_of_many < 0.05


def test_a_significant_difference_that_does_not_matter_is_fine(rng: np.random.Generator) -> None:
    line = Line(rng, calibration=1000, good=5000)
    found = verdict([changed(line.night(images=20_000), brightness=1.015, sharpness=1.03)], line.reference)
    assert found.level == "fine"
    # Nor does a large one of few images.
    line = Line(rng)
    assert not is_false(verdict([changed(line.night(images=2), brightness=1.3)], line.reference))


@pytest.mark.parametrize(
    ("calibration", "images", "tests", "needs"),
    [
        (7, 27, 30, "the threshold cannot support the requested 1.0 %: 7 good images calibrate it, and 99 are needed"),
        (99, 10, 30, ""),
        (500, 5, 30, "too few images: 5 with a score, and 10 are needed"),
        (7, 5, 30, "7 good images calibrate it, and 99 are needed; too few images: 5 with a score, and 10 are needed"),
        (40, 20, 6000, "too few images: 20 with a score, and 30 are needed"),
        (40, 30, 6000, ""),
        (20, 300, 6000, "20 good images calibrate it, and 99 are needed"),
    ],
)
def test_a_night_that_could_not_show_that_half_of_it_are_alarms_cannot_tell(
    rng: np.random.Generator, calibration: int, images: int, tests: int, needs: str
) -> None:
    line = Line(rng, calibration)
    night = replace(line.night(images=images), alarms=1)
    found = verdict([night], line.reference, tests)
    assert (found.level, bool(found.changes)) == (("cannot tell", True) if needs else ("fine", False))
    assert not needs or found.reasons[0].endswith(needs)
    # If half of them are, other verdicts are given.
    flood = verdict([replace(night, alarms=-(-images * 101 // 200))], line.reference, tests)
    assert is_false(flood) == (not needs)
    # Earlier nights show it, too.
    if images == 300:
        assert verdict([*line.nights(30, images=images), night], line.reference, tests).level == "fine"


@pytest.mark.parametrize(
    ("rate", "needs"),
    [
        (1.0, "; too many false alarms are expected, 100 %: set a threshold that makes fewer"),
        (2 / 3, "; the threshold does not promise the expected 67 %: 2 good images calibrate it, and 100 are needed"),
    ],
)
def test_at_a_threshold_decided_too_low_a_night_cannot_tell(rng: np.random.Generator, rate: float, needs: str) -> None:
    line = Line(rng, 2)
    night = replace(
        line.night(images=50), alarms=50 if rate == 1 else 30, false_alarm_rate=rate, decision="1, decided by ann"
    )
    (reason,) = verdict([night], line.reference).reasons
    assert needs in reason
    assert ("are needed" in reason) == (rate < 1)


def test_an_empty_night_is_named(line: Line) -> None:
    nights = line.nights(14, images=1204)
    text = "no images tonight; 1,204 on 2026-11-14"
    for number in (14, 15, 16):
        nights.append(line.empty(number))
        found = verdict(nights, line.reference)
        assert (found.level, found.reasons) == ("act", (text,))
    # A product that is no longer made, and a plant that is closed.
    assert verdict([*nights, line.empty(17)], line.reference).level == "watch"
    found = verdict(nights[:15], Reference(), is_idle=True)
    closed = "Most categories have none: was the plant closed, or are files missing?"
    assert (found.level, found.reasons) == ("watch", (f"{text}. {closed}",))
    # A new product.
    assert verdict([line.empty(0)], line.reference).level == "fine"


def test_a_line_may_rest_on_weekdays(line: Line) -> None:
    """On Saturdays and Sundays, from the first week on."""
    nights = [line.empty(day) if day % 7 in (0, 6) else line.night(day, images=1204) for day in range(42)]
    for number in range(1, 42):
        assert verdict(nights[:number], line.reference, tests=1).level == "fine"
    # The same weekdays have images, though every third night on average has none.
    found = verdict([*nights[:36], line.empty(36)], line.reference)
    assert found.level == "act"


def test_few_images_are_named(line: Line) -> None:
    nights = line.nights(21, images=400)
    found = verdict([*nights, line.night(21, images=150)], line.reference)
    assert (found.level, found.reasons) == ("watch", ("only 150 images; 400 are usual",))
    assert verdict([*nights, line.night(21, images=30)], line.reference).level == "act"
    assert verdict([*nights[:2], line.night(2, images=30)], line.reference).level == "fine"
    fewer = [line.night(number, images=260) for number in (21, 22, 23)]
    found = verdict([*nights, *fewer], line.reference, tests=6000)
    assert (found.level, found.reasons) == ("watch", ("only 780 images on the last 3 nights; 1,200 are usual",))


def test_a_repeated_image_is_named_and_its_consequences_are_not(line: Line) -> None:
    night = line.night()
    still = np.zeros(300, int)
    frozen = replace(
        night,
        p_values=night.p_values[still],
        statistics={name: values[still] for name, values in night.statistics.items()},
    )
    found = verdict([*line.nights(3), frozen], line.reference)
    assert found.level == "act"
    assert found.reasons == ("all 300 images are the same picture: does the camera deliver new ones?",)
    for values in night.statistics.values():
        values[:60] = values[0]
    found = verdict([night], line.reference)
    assert found.level == "watch"
    assert found.reasons[0].startswith("60 of 300 images are the same picture")


def test_errors_are_named(line: Line) -> None:
    night = line.night(5)
    assert verdict([replace(night, errors={"damaged": 2})], line.reference).level == "fine"
    found = verdict([*line.nights(5), replace(night, errors={"damaged": 60})], line.reference)
    assert (found.level, found.reasons) == ("act", ("20 % of the images are errors (60 of 300), usually 0.0 %",))
    nothing = dict.fromkeys(COMPARED, np.empty(0, np.float32))
    all_errors = replace(night, errors={"damaged": 300}, alarms=0, p_values=np.empty(0, np.float32), statistics=nothing)
    assert verdict([all_errors], Reference()).reasons == ("100 % of the images are errors (300 of 300)",)
    # Chance may explain one.
    found = verdict([replace(line.empty(5), images=1, errors={"damaged": 1})], line.reference)
    assert found.reasons == (
        "50 % of the images could be alarms by chance; too few images: 0 with a score, and 10 are needed",
    )


# Real products. Half of the images are the reference, and the other half the night.

_EACH = 70


def brighter(image: Image.Image) -> Image.Image:
    return image.point(lambda value: min(value * 1.1, 255))


def blurred(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(0.008 * min(image.size)))


def moved(image: Image.Image) -> Image.Image:
    """Show everything 5 % of the width further left, and at the right a reflection."""
    shift = round(0.05 * image.width)
    return Image.fromarray(np.pad(np.asarray(image), ((0, 0), (0, shift), (0, 0)), mode="reflect")[:, shift:])


def statistics_of(images: list[Image.Image]) -> dict[str, Any]:
    rows = np.array([(*image.size, *compute_statistics(image)) for image in images], np.float32)
    return dict(zip(COMPARED, rows.T, strict=True))


@pytest.mark.real_data
@pytest.mark.parametrize("category", ["bottle", "casting", "commutator", "pill"])
def test_faults_of_a_camera_are_named_on_real_products(real_data: Path, category: str, line: Line) -> None:
    uris = [uri for uri, _ in mvtec.read_category(str(real_data), category).train]
    order = np.random.default_rng(0).permutation(len(uris))[: 2 * _EACH]
    images = [Image.open(io.BytesIO(Path(uris[i]).read_bytes())).convert("RGB") for i in order]
    reference = Reference(50, statistics_of(images[:_EACH]))
    night = line.night(images=_EACH)

    def judged(fault: Callable[[Image.Image], Image.Image]) -> CategoryNight:
        statistics = statistics_of([fault(image) for image in images[_EACH:]])
        return verdict([replace(night, statistics=statistics)], reference, tests=5)

    assert judged(lambda image: image).level == "fine"
    assert judged(brighter).changes[0].name == "brightness"
    assert judged(blurred).changes[0].name == "sharpness"
    # A commutator fills the image, and looks the same everywhere.
    if category != "commutator":
        found = judged(moved)
        assert found.changes[0].name == "position_x"
        assert "further left" in found.reasons[0]


def test_scores_are_compared_as_the_scores_themselves_would_be_without_images_that_a_person_added() -> None:
    """Images that raised an alarm are among the highest scores of a calibration, and of no night."""
    rng = np.random.default_rng(0)
    held_out, added, night = (rng.gamma(2.0, size=50), rng.normal(5, 1, size=30), rng.gamma(2.0, size=401))
    both = np.concatenate([held_out, added])
    order = np.argsort(both)
    reference = Reference(80, {}, np.flatnonzero((order >= 50)[::-1]) + 1.0)
    scale = HeatmapScale(0.0, 1.0)
    with_added = Calibration(both[order].astype(np.float32), scale).p_values(night.astype(np.float32))
    without = Calibration(np.sort(held_out).astype(np.float32), scale).p_values(night.astype(np.float32))
    expected = stats.ks_2samp(night, held_out, method="exact")
    for each, p_values in ((reference, with_added), (Reference(50, {}), without)):
        expected_values = (expected.statistic, expected.pvalue, np.median(without))
        assert each.compare_scores(p_values) == pytest.approx(expected_values)
