"""Compute AUPRO of random cases with anomalib 2.7: the table that our tests compare with.

    python -m venv PEER && PEER/bin/pip install 'anomalib==2.7.*'
    PEER/bin/python bench/peer_aupro.py > tests/evaluation/peer_aupro.json

Runs in anomalib's environment and imports nothing of ours; the tests make the same cases.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version

import numpy as np
import numpy.typing as npt

CASES = 200
LIMITS = (0.3, 0.05)


def case(seed: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Return (N, H, W) maps and masks: noise around blobs, some with ties, some far below 1."""
    rng = np.random.default_rng(seed)
    count, size = int(rng.integers(1, 5)), int(rng.integers(16, 49))
    masks = np.zeros((count, size, size), bool)
    for mask in masks:
        for _ in range(int(rng.integers(0, 4))):
            y, x = rng.integers(0, size - 6, 2)
            height, width = rng.integers(1, 7, 2)
            mask[y : y + height, x : x + width] = True
    masks[0, 2:5, 2:6] = True
    maps = rng.random(masks.shape) + masks * rng.random() * 0.8
    if seed % 3 == 1:
        maps = np.round(maps, 1)
    return (maps * 10.0 ** rng.integers(-3, 1)).astype(np.float32), masks


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    import torch
    from anomalib.metrics.aupro import _AUPRO

    def anomalib_aupro(maps: npt.NDArray[np.float32], masks: npt.NDArray[np.bool_], limit: float) -> float:
        metric = _AUPRO(fpr_limit=limit)
        metric.update(torch.from_numpy(maps), torch.from_numpy(masks).int())
        return float(metric.compute())

    values = [[round(anomalib_aupro(*case(seed), limit), 7) for limit in LIMITS] for seed in range(CASES)]
    print(json.dumps({"peer": f"anomalib {version('anomalib')}", "limits": LIMITS, "aupro": values}))


if __name__ == "__main__":
    main()
