from __future__ import annotations

import dataclasses
import struct
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event as EventProto

from stpm.fitting.event_files import EventFiles
from stpm.fitting.task import Epoch, FitTask, Outcome
from tests.conftest import TINY

TASK = FitTask("nut", (("a", 1),), dataclasses.replace(TINY, seed=3), "s", "d")


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """Read the records of the one event file: length, checksum, bytes, checksum."""
    (file,) = folder.iterdir()
    data, found = file.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = EventProto.FromString(data[12 : 12 + length])
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        data = data[16 + length :]
    return found


def test_each_epoch_is_written_under_its_seed_and_category(tmp_path: Path) -> None:
    write = EventFiles(str(tmp_path), [TASK])
    write((TASK.key, "decoded"))
    write((TASK.key, Epoch(1, 0.5, 0.75, 20.0)))
    write((TASK.key, Epoch(2, 0.25, 0.5, 40.0)))
    write(Outcome.failed(TASK, "it broke"))
    assert scalars(tmp_path / "seed-3" / "nut") == [
        ("loss/train", 1, 0.5),
        ("loss/validation", 1, 0.75),
        ("images_per_second", 1, 20.0),
        ("loss/train", 2, 0.25),
        ("loss/validation", 2, 0.5),
        ("images_per_second", 2, 40.0),
    ]
