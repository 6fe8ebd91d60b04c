"""Embeddings of seen and unseen classes from seen-class embeddings and outside knowledge (VGSE section 3.2, Eq. 12).

A frozen object that can be saved: later classes are embedded from it in milliseconds, without images.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors.numpy import load_file, save_file

from models.base import FloatArray
from models.embedding.relations import (
    Matrix,
    SimilarityOptimizer,
    check_knowledge,
    check_rows,
    normalized_average,
    unit_rows,
)
from models.errors import InvalidInput, ShapeMismatch, TooFewSamples, UnknownName
from models.params import RelationParams

Relation = Literal["smo", "wavg"]
RELATIONS: tuple[Relation, ...] = ("smo", "wavg")

FORMAT = 1
_MANIFEST, _ARRAYS = "class_embedder.json", "class_embedder.safetensors"


@dataclass(frozen=True, eq=False)
class ClassEmbedder:
    """Composes unseen-class embeddings of seen ones.

    class_names: the S seen classes.
    seen_embeddings: (S, E) their embeddings as the clustering gives them (Eq. 8), any scale.
    knowledge_seen: (S, Dw) their knowledge vectors; directions count, lengths do not.
    """

    class_names: tuple[str, ...]
    seen_embeddings: FloatArray
    knowledge_seen: FloatArray
    relation: Relation
    params: RelationParams

    def __post_init__(self) -> None:
        if self.relation not in RELATIONS:
            raise UnknownName("relation", str(self.relation), RELATIONS, field="relation")
        n_classes = len(self.class_names)
        object.__setattr__(self, "seen_embeddings", check_rows(self.seen_embeddings, "seen_embeddings"))
        object.__setattr__(self, "knowledge_seen", check_rows(self.knowledge_seen, "knowledge_seen"))
        for name, rows in (("seen_embeddings", self.seen_embeddings), ("knowledge_seen", self.knowledge_seen)):
            if len(rows) != n_classes:
                raise ShapeMismatch(f"{name} has {len(rows)} rows for {n_classes} class names.", field=name)
        if self.params.form != "plain" and n_classes < 2:
            raise TooFewSamples(
                f"The form {self.params.form!r} subtracts the mean of the seen classes and needs at least 2 of them, "
                f"but there is {n_classes}; use the form 'plain'.",
                field="params/relation/form",
            )

    @property
    def embedding_dim(self) -> int:
        """Length of every vector this gives."""
        own = int(self.seen_embeddings.shape[1])
        return own + int(self.knowledge_seen.shape[1]) if self.params.form == "fused" else own

    def relations(self, knowledge: FloatArray) -> Matrix:
        """Coefficients of the seen classes for each row of `knowledge`, summing to one: (U, Dw) -> (U, S).

        WAvg's weights as printed (Eq. 10) sum to far less; only their proportions reach vectors of length one.
        """
        unseen, _ = check_knowledge(knowledge, self.knowledge_seen)
        if self.relation == "smo":
            return self._optimizer.solve(unit_rows(unseen), alpha=float(self.params.alpha))
        return normalized_average(unseen, self.knowledge_seen, n_neighbors=self.params.n_neighbors, eta=self.params.eta)

    def embed(self, knowledge: FloatArray) -> tuple[Matrix, Matrix]:
        """Unseen classes by their knowledge (U, Dw): vectors (U, E') of length one, and relations (U, S).

        A class that lies exactly on the mean of the seen ones has no direction in the centred form: zeros.
        """
        relations = self.relations(knowledge)
        return self.compose(relations, knowledge), relations

    def compose(self, relations: Matrix, knowledge: FloatArray) -> Matrix:
        """Vectors (U, E') of given relations (U, S); `embed` with the relations at hand already."""
        return self._in_form(relations @ self.seen_embeddings, knowledge)

    def seen_vectors(self) -> Matrix:
        """The seen classes in the same form and length: (S, E')."""
        return self._in_form(self.seen_embeddings, self.knowledge_seen)

    def contributions(self, row: FloatArray, k: int = 5) -> list[tuple[str, float]]:
        """The `k` seen classes with the largest coefficients (by size) in one row of relations (S,)."""
        coefficients = np.asarray(row, dtype=np.float64)
        if coefficients.shape != (len(self.class_names),):
            raise ShapeMismatch(
                f"The relation has shape {coefficients.shape}, but there are {len(self.class_names)} seen classes."
            )
        order = np.argsort(-np.abs(coefficients), kind="stable")[:k]
        return [(self.class_names[i], float(coefficients[i])) for i in order if coefficients[i] != 0]

    def save(self, directory: Path) -> None:
        """Write arrays (safetensors) and manifest (JSON) into `directory`."""
        directory.mkdir(parents=True, exist_ok=True)
        arrays = {"seen_embeddings": self.seen_embeddings, "knowledge_seen": self.knowledge_seen}
        save_file({name: np.ascontiguousarray(rows) for name, rows in arrays.items()}, directory / _ARRAYS)
        manifest = {
            "format": FORMAT,
            "class_names": list(self.class_names),
            "relation": self.relation,
            "params": self.params.model_dump(),
        }
        (directory / _MANIFEST).write_text(json.dumps(manifest, ensure_ascii=False, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> ClassEmbedder:
        """What `save` wrote; InvalidInput if it is not that."""
        manifest = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))
        if manifest.get("format") != FORMAT:
            raise InvalidInput(f"{directory / _MANIFEST} has format {manifest.get('format')!r}; this reads {FORMAT}.")
        arrays = load_file(directory / _ARRAYS)
        return cls(
            class_names=tuple(manifest["class_names"]),
            seen_embeddings=arrays["seen_embeddings"],
            knowledge_seen=arrays["knowledge_seen"],
            relation=manifest["relation"],
            params=RelationParams.model_validate(manifest["params"]),
        )

    @cached_property
    def _optimizer(self) -> SimilarityOptimizer:
        return SimilarityOptimizer(unit_rows(self.knowledge_seen), ridge=self.params.ridge)

    @cached_property
    def _embedding_mean(self) -> Matrix:
        return np.asarray(self.seen_embeddings.mean(axis=0))

    @cached_property
    def _knowledge_mean(self) -> Matrix:
        return np.asarray(unit_rows(self.knowledge_seen).mean(axis=0))

    def _in_form(self, embeddings: FloatArray, knowledge: FloatArray) -> Matrix:
        if self.params.form == "plain":
            return unit_rows(embeddings)
        centred = unit_rows(embeddings - self._embedding_mean)
        if self.params.form == "centred":
            return centred
        return unit_rows(np.hstack([centred, unit_rows(unit_rows(knowledge) - self._knowledge_mean)]))
