"""Retries after the loss of nodes, without Ray."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import ray.train

from stpm.fitting.worker_group import retry_after_node_loss


def failing(times: int) -> tuple[Callable[[], None], list[int]]:
    calls: list[int] = []

    def train() -> None:
        calls.append(len(calls))
        if len(calls) <= times:
            raise ray.train.TrainingFailedError

    return train, calls


def test_training_is_retried_as_often_as_nodes_are_lost() -> None:
    train, calls = failing(20)
    retry_after_node_loss(train, lambda: len(calls))
    assert len(calls) == 21
    train, calls = failing(20)
    with pytest.raises(ray.train.TrainingFailedError):
        retry_after_node_loss(train, lambda: min(len(calls), 3))
    assert len(calls) == 4
