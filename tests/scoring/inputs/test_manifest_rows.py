from __future__ import annotations

from stpm.scoring.inputs.manifest_rows import image_id


def test_image_ids_are_stable_64_bit_and_distinct() -> None:
    assert image_id("s3://bucket/a.png") == -520363251256440237
    ids = {image_id(f"file-{i}") for i in range(10_000)}
    assert len(ids) == 10_000
    assert all(-(2**63) <= i < 2**63 for i in ids)
