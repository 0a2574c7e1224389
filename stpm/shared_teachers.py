"""The teachers of a process: detectors whose specs are equal share one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from weakref import WeakValueDictionary

import torch

from stpm.method.arithmetic import Arithmetic
from stpm.method.backbones import Backbone
from stpm.method.preprocessing import Preprocessing
from stpm.method.recipe import Precision, Recipe
from stpm.method.teacher import Teacher
from stpm.method.views import View, choose_views, levels_of_teacher
from stpm.models.record import ModelRecord
from stpm.models.store import ModelStore
from stpm.options import Backend


@dataclass(frozen=True)
class TeacherSpec:
    """What a teacher is made from: name and levels in the recipe, its weights' SHA-256, and what computes it."""

    name: str
    levels: tuple[int, ...]
    digest: str
    preprocessing: Preprocessing
    views: tuple[View, ...]
    precision: Precision
    device: torch.device
    backend: Backend

    @classmethod
    def to_fit(
        cls, recipe: Recipe, digest: str, preprocessing: Preprocessing, device: torch.device, arithmetic: Arithmetic
    ) -> TeacherSpec:
        """Return the spec with which a model is fitted."""
        levels, views = levels_of_teacher(recipe), choose_views(recipe, preprocessing)
        shared, precision = replace(preprocessing, roi=None), arithmetic.precision_to_fit(recipe.precision)
        return cls(recipe.teacher, levels, digest, shared, views, precision, device, arithmetic.backend)

    @classmethod
    def of_model(cls, record: ModelRecord, device: torch.device, arithmetic: Arithmetic) -> TeacherSpec:
        """Return the spec with which a stored model scores."""
        fitted = cls.to_fit(record.recipe, record.teacher_digest, record.preprocessing, device, arithmetic)
        return replace(fitted, precision=arithmetic.precision_to_score(record.precision))


# Each lives as long as a detector that uses it.
_teachers: WeakValueDictionary[TeacherSpec, Teacher] = WeakValueDictionary()


def share_teacher(spec: TeacherSpec, load_backbone: Callable[[], Backbone]) -> Teacher:
    """Return the teacher of another detector of this process whose spec is equal, or else make one."""
    if not (teacher := _teachers.get(spec)):
        teacher = Teacher(load_backbone(), spec.preprocessing, spec.device, spec.precision, spec.backend, spec.views)
        _teachers[spec] = teacher
    return teacher


def load_teacher(store: ModelStore, spec: TeacherSpec) -> Teacher:
    """Load a teacher from a store, unless a detector of this process has it; raise ModelError if that fails."""
    return share_teacher(spec, lambda: store.load_teacher(spec.name, spec.levels, spec.digest))
