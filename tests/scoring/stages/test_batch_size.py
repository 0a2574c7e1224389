from stpm.scoring.stages.batch_size import BatchSize


def final_size(speeds: dict[int, float], fixed: int = 0, grows: bool = True) -> int:
    """The size after many batches, if a batch of n runs at speeds[n] images per second."""
    batch_size = BatchSize(fixed, grows)
    for _ in range(40):
        batch_size.update(batch_size.current, batch_size.current / speeds[batch_size.current])
    return batch_size.current


def test_batch_size_grows_while_that_is_faster() -> None:
    assert final_size({16: 100.0, 32: 190.0, 64: 300.0, 128: 305.0}) == 64
    assert final_size({16: 100.0, 32: 90.0}) == 16
    assert final_size({16: 1.0, 32: 2.0, 64: 4.0, 128: 8.0, 256: 16.0}) == 256
    assert final_size({16: 1.0}, grows=False) == 16
    assert final_size({5: 1.0}, fixed=5) == 5


def test_batch_size_is_halved_and_grows_no_more() -> None:
    batch_size = BatchSize(0, grows=True)
    batch_size.halve(11)
    for _ in range(4):
        batch_size.update(5, 0.001)
    assert batch_size.current == 5
    batch_size.halve(1)
    assert batch_size.current == 1
