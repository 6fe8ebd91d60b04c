"""What the inference process keeps loaded: knowledge sources, embedders, classifiers with their class tables."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
from safetensors.numpy import load_file

from models.base import FloatArray
from models.embedding.class_embedder import ClassEmbedder
from models.errors import InvalidInput
from models.knowledge.base import KnowledgeSource, Lookup, require
from models.knowledge.names import normalize_class_name
from models.params import BackboneParams
from models.zero_shot.base import load_classifier
from service.core import repositories
from service.core.artifacts import ArtifactStore
from service.core.db import Database
from service.core.errors import Conflict
from service.core.process import launch
from service.core.repositories import ClassifierState
from service.core.settings import Settings
from service.core.tables import Classifier, EmbeddingSet, Knowledge
from workers.backbones import BACKBONE_FILE
from workers.embedding import provenance, vector_bytes
from workers.known_classes import Competing, KnownClasses, among_all
from workers.model_cache import ModelCache, Parts, parts_of
from workers.predictions import Resident
from workers.sources import (
    fast_backbone,
    feature_network,
    may_become_faster,
    open_backbone,
    open_knowledge,
    unpack,
)
from workers.training import CLASSES_FILE, DIMENSIONS_FILE
from workers.training_inputs import EMBEDDER_FILES

if TYPE_CHECKING:
    from models.backbones import FeatureNetwork

CLASSIFIER_FILES = ("manifest.json", "model.safetensors")


@dataclass(frozen=True)
class NewClass:
    """A predicted class: vector as little-endian float32 bytes, and how it came about."""

    name: str
    vector: bytes
    provenance: dict[str, Any]


class Library:
    """Loads by id and keeps what was used lately. All methods may be called from any thread."""

    def __init__(self, database: Database, store: ArtifactStore, settings: Settings, *, device: str) -> None:
        self._database = database
        self._store = store
        self._settings = settings
        self._device = device
        self._cache: ModelCache[Any] = ModelCache(settings.max_resident_bytes, _parts)
        self._uses: dict[str, str] = {}  # digest of a backbone -> a classifier that was trained with it
        self._scopes: WeakKeyDictionary[Resident, tuple[KnownClasses, dict[str, Competing]]] = WeakKeyDictionary()
        self._n_exchanged = 0  # networks that gave way to faster ones
        self._prepared: set[tuple[str, int]] = set()  # digest and size of networks that were, or are being, prepared

    def resident_names(self) -> list[str]:
        """Ids of the classifiers held."""
        return [key.removeprefix("classifier:") for key in self._cache.names() if key.startswith("classifier:")]

    def held(self) -> tuple[int, int]:
        """How many classifiers are held, and the bytes of all that is."""
        return len(self.resident_names()), self._cache.n_bytes

    def newest_classifier(self) -> str | None:
        """Id of the newest one that is ready and reads images."""
        with self._database.read() as session:
            newest = repositories.newest_classifier(session)
            reads_images = newest and repositories.get(session, Classifier, newest).metrics.get("backbone")
        return newest if reads_images else None

    def lookup(self, knowledge_id: str, names: Sequence[str]) -> Lookup:
        """How names resolve in a knowledge source."""
        source: KnowledgeSource = self._cache.get(
            f"knowledge:{knowledge_id}", lambda: self._open_knowledge(knowledge_id)
        )
        return source.lookup(names)

    def relate(
        self, set_id: str, names: Sequence[str], relation: str | None = None, *, field: str = "class_names"
    ) -> list[NewClass]:
        """Embeddings of new unseen classes; MissingKnowledge, which tells `field`, where their names do not resolve."""
        with self._database.read() as session:
            row = repositories.get(session, EmbeddingSet, set_id)
        if row.status != "ready":
            raise Conflict(f"Embedding set {set_id!r} is {row.status}.")
        embedder: ClassEmbedder = self._cache.get(f"embedder:{set_id}", lambda: self._open_embedder(set_id))
        if relation is not None and relation != embedder.relation:
            embedder = dataclasses.replace(embedder, relation=relation)  # type: ignore[arg-type]  # the API checked it
        lookup = self.lookup(row.knowledge_id, names)
        vectors, relations = embedder.embed(require(lookup, field=field))
        return [
            NewClass(resolution.name, vector_bytes(vector), provenance(embedder, coefficients, resolution))
            for resolution, vector, coefficients in zip(lookup.resolutions, vectors, relations, strict=True)
        ]

    def state(self, classifier_id: str) -> ClassifierState:
        """How a classifier stands now; NotFound where there is none."""
        with self._database.read() as session:
            return repositories.classifier_state(session, classifier_id)

    def competing(self, state: ClassifierState, scope: str, class_names: Sequence[str] | None) -> Competing:
        """The classes of a request: all of a scope, or those named; names it does not know are predicted."""
        with self._cache.together():
            resident = self._resident(state.id)
            table: KnownClasses = self._cache.get(
                f"classes:{state.id}",
                lambda: self._read_table(state),
                fits=lambda table: bool(table.version >= state.version),
            )
            if class_names is None:
                return self._of_scope(resident, table, state, scope)
            return self._among(resident, table, state, scope, class_names)

    def _resident(self, classifier_id: str) -> Resident:
        key, n_exchanged = f"classifier:{classifier_id}", self._n_exchanged
        resident: Resident = self._cache.get(key, lambda: self._open_classifier(classifier_id))
        if self._n_exchanged == n_exchanged:
            return resident
        self._cache.drop(key)  # it was opened while a network was exchanged, perhaps with the earlier one
        return self._resident(classifier_id)

    def competing_at_once(self, state: ClassifierState, scope: str) -> Competing | None:
        """All classes of a scope; None where that would take a look at a disk or a database."""
        resident: Resident | None = self._cache.held(f"classifier:{state.id}")
        table: KnownClasses | None = self._cache.held(f"classes:{state.id}")
        if resident is None or table is None or table.version < state.version:
            return None
        return self._of_scope(resident, table, state, scope)

    def _of_scope(self, resident: Resident, table: KnownClasses, state: ClassifierState, scope: str) -> Competing:
        """All classes of a scope; the same object until model or classes change: its requests are answered together."""
        known = self._scopes.get(resident)
        if known is None or known[0] is not table:  # what was made of earlier tables goes with them
            known = self._scopes[resident] = table, {}
        competing = known[1].get(scope)
        if competing is None:
            competing = known[1][scope] = self._among(resident, table, state, scope, None)
        return competing

    def _among(
        self,
        resident: Resident,
        table: KnownClasses,
        state: ClassifierState,
        scope: str,
        class_names: Sequence[str] | None,
    ) -> Competing:
        in_scope = {"all": np.ones_like(table.is_seen), "seen": table.is_seen, "unseen": ~table.is_seen}[scope]
        names = table.names_of(in_scope) if class_names is None else tuple(class_names)
        if not names:
            raise InvalidInput(f"The classifier has no {scope} classes.", field="scope")
        if class_names is not None:
            embeddings, is_seen, origin = self._named(state, table, names, in_scope)
        elif len(names) == len(table.names):  # no copy of what may be large
            embeddings, is_seen, origin = table.embeddings, table.is_seen, table.provenance
        else:
            embeddings, is_seen, origin = table.embeddings[in_scope], table.is_seen[in_scope], table.provenance
        if resident.classifier.is_joint:
            return among_all(resident, table, names, embeddings, is_seen, origin)
        asked = dataclasses.replace(resident, class_names=names, embeddings=embeddings, is_seen=is_seen)
        return Competing(asked, origin)

    def dimension_names(self, classifier_id: str) -> tuple[str, ...] | None:
        """What the dimensions of a classifier's class embeddings are called, where anybody said so."""
        with self._database.read() as session:
            row = repositories.get(session, Classifier, classifier_id)
        key = row.artifacts.get(DIMENSIONS_FILE)
        return None if key is None else tuple(json.loads(self._store.read_bytes(key)))

    def _named(
        self, state: ClassifierState, table: KnownClasses, names: Sequence[str], in_scope: np.ndarray[Any, Any]
    ) -> tuple[FloatArray, np.ndarray[Any, Any], dict[str, dict[str, Any]]]:
        positions = [table.position.get(normalize_class_name(name)) for name in names]
        only_seen = bool((in_scope == table.is_seen).all())  # then names to be predicted are outside, too
        outside = [n for n, p in zip(names, positions, strict=True) if (only_seen if p is None else not in_scope[p])]
        if outside:
            raise InvalidInput(f"{outside[0]!r} is not in the scope asked for.", field="class_names")
        embeddings = np.zeros((len(names), table.embeddings.shape[1]), dtype=np.float32)
        is_seen = np.zeros(len(names), dtype=np.bool_)
        origin: dict[str, dict[str, Any]] = {}
        new = [(i, name) for i, (name, p) in enumerate(zip(names, positions, strict=True)) if p is None]
        for i, position in enumerate(positions):
            if position is not None:
                embeddings[i], is_seen[i] = table.embeddings[position], table.is_seen[position]
                if table.names[position] in table.provenance:
                    origin[names[i]] = table.provenance[table.names[position]]
        for (i, name), (vector, how) in zip(new, self._predicted(state, [name for _, name in new]), strict=True):
            embeddings[i], origin[name] = vector, how
        return embeddings, is_seen, origin

    def _predicted(self, state: ClassifierState, names: Sequence[str]) -> list[tuple[FloatArray, dict[str, Any]]]:
        if not names:
            return []
        if state.embedding_set_id is not None:
            classes = self.relate(state.embedding_set_id, names)
            return [(np.frombuffer(c.vector, dtype="<f4"), c.provenance) for c in classes]
        lookup = self.lookup(state.knowledge_id or "", names)
        vectors = require(lookup, field="class_names")
        return [
            (vector, {"source": "knowledge", "knowledge": resolution.how})
            for vector, resolution in zip(vectors, lookup.resolutions, strict=True)
        ]

    # ---- loading --------------------------------------------------------------------------------

    def _open_knowledge(self, knowledge_id: str) -> KnowledgeSource:
        with self._database.read() as session:
            row = repositories.get(session, Knowledge, knowledge_id)
        if row.status != "ready":
            raise Conflict(f"Knowledge {knowledge_id!r} is {row.status}.")
        return open_knowledge(row, self._store, self._settings)

    def _directory(self, *parts: str) -> Path:
        return self._settings.cache_dir.joinpath("inference", *parts)

    def forget_deleted(self) -> None:
        """Remove what was laid out on the disk for classifiers and embedding sets that are no more."""
        laid_out = [path.name for path in self._directory().glob("*")]  # first: their rows were there before them
        with self._database.read() as session:
            remaining = repositories.remaining(session, laid_out)
        for name in set(laid_out) - remaining:
            shutil.rmtree(self._directory(name), ignore_errors=True)  # another process may do the same

    def _open_embedder(self, set_id: str) -> ClassEmbedder:
        self.forget_deleted()
        with self._database.read() as session:
            row = repositories.get(session, EmbeddingSet, set_id)
        return ClassEmbedder.load(unpack(self._store, row.artifacts, EMBEDDER_FILES, self._directory(set_id)))

    def _open_classifier(self, classifier_id: str) -> Resident:
        self.forget_deleted()
        with self._database.read() as session:
            row = repositories.get(session, Classifier, classifier_id)
        if row.status != "ready":
            raise Conflict(f"Classifier {classifier_id!r} is {row.status}.")
        if not row.metrics.get("backbone"):
            raise InvalidInput(
                "This classifier was trained on precomputed features, so it cannot read images. "
                "Train one on a dataset of images."
            )
        directory = unpack(self._store, row.artifacts, CLASSIFIER_FILES, self._directory(classifier_id))
        model = load_classifier(directory, device=self._device)
        digest, size = row.metrics["backbone"]["digest"], row.metrics["image_size"]
        self._uses[digest] = classifier_id
        backbone = self._cache.get(f"backbone:{digest}", lambda: self._open_backbone(digest))
        network = feature_network(backbone, row.method, size, row.params)
        if network is backbone:  # one for all classifiers on it
            network = self._cache.get(
                f"network:{digest}:{size}", lambda: self._open_network(classifier_id, backbone, size)
            )
        return Resident(
            classifier=model,
            backbone=network,
            size=size,
            class_names=(),
            embeddings=np.zeros((0, 0), dtype=np.float32),
            is_seen=np.zeros(0, dtype=np.bool_),
            gamma=model.gamma_,
            temperature=model.temperature_,
        )

    def _open_network(self, classifier_id: str, backbone: FeatureNetwork, size: int) -> FeatureNetwork:
        """What computes a backbone's features soonest; where that has to be prepared first, the backbone until then."""
        network = fast_backbone(backbone, size, self._settings, may_prepare=False)
        wanted = (backbone.digest, size)
        if wanted not in self._prepared and may_become_faster(backbone, size, self._settings):
            self._prepared.add(wanted)
            if self._settings.backend != "auto":  # nothing else will do
                return self._prepared_network(classifier_id, backbone, size)
            task = (classifier_id, backbone, size)
            threading.Thread(target=self._prepare, args=task, name="prepare", daemon=True).start()
        return network

    def _prepare(self, classifier_id: str, backbone: FeatureNetwork, size: int) -> None:
        network = self._prepared_network(classifier_id, backbone, size)
        if network is not backbone:
            key = f"network:{backbone.digest}:{size}"
            self._cache.drop(key)
            self._cache.get(key, lambda: network)
            self._n_exchanged += 1
            for held in self._cache.names():  # those in use go on with what they have; the next request takes the new
                if held.startswith("classifier:"):
                    self._cache.drop(held)

    def _prepared_network(self, classifier_id: str, backbone: FeatureNetwork, size: int) -> FeatureNetwork:
        """What computes a backbone's features soonest, after seconds of preparation.

        An export lies in the cache directory, so a process of its own makes it. What is compiled belongs to this
        process; torch.compile sees the calls of its own thread only.
        """
        is_exported = self._device == "cpu" and self._settings.backend != "compile"
        if is_exported and not prepare_apart(classifier_id, self._settings):
            return fast_backbone(backbone, size, self._settings, may_prepare=False)
        return fast_backbone(backbone, size, self._settings)

    def prepare(self, classifier_id: str) -> None:
        """Prepare what computes a classifier's features sooner, for all later processes. Takes seconds, and no other
        thread may use a network meanwhile: tracing one catches their calls."""
        with self._database.read() as session:
            row = repositories.get(session, Classifier, classifier_id)
        digest = row.metrics["backbone"]["digest"]
        self._uses[digest] = classifier_id
        fast_backbone(self._open_backbone(digest), row.metrics["image_size"], self._settings)

    def _open_backbone(self, digest: str) -> Any:
        """One network for all classifiers that were trained with it."""
        classifier_id = self._uses[digest]
        with self._database.read() as session:
            row = repositories.get(session, Classifier, classifier_id)
        described = row.metrics["backbone"]
        params = BackboneParams.model_validate({name: described[name] for name in BackboneParams.model_fields})
        weights = None
        if BACKBONE_FILE in row.artifacts:
            weights = (
                unpack(self._store, row.artifacts, (BACKBONE_FILE,), self._directory(classifier_id)) / BACKBONE_FILE
            )
        backbone = open_backbone(params, self._settings, device=self._device, weights=weights)
        if backbone.digest != digest:
            raise Conflict("The weights this classifier was trained with have changed on this server. Train it again.")
        return backbone

    def _read_table(self, state: ClassifierState) -> KnownClasses:
        with self._database.read() as session:
            row = repositories.get(session, Classifier, state.id)
            rows = repositories.classes_of(session, row.embedding_set_id) if row.embedding_set_id else []
        seen, unseen = row.request["seen_classes"], row.request["unseen_classes"]
        if row.embedding_set_id is None:
            directory = unpack(self._store, row.artifacts, (CLASSES_FILE,), self._directory(state.id))
            names = (*seen, *unseen)
            embeddings = load_file(directory / CLASSES_FILE)["embeddings"]
            is_seen = np.arange(len(names)) < len(seen)
            origin: dict[str, dict[str, Any]] = {}
        else:
            # Classes added to the set after training compete too; seen ones the classifier did not train on do not.
            used = [c for c in rows if not c.is_seen or c.name in set(seen)]
            names = tuple(c.name for c in used)
            embeddings = np.stack([np.frombuffer(c.vector, dtype="<f4") for c in used])
            is_seen = np.array([c.name in set(seen) for c in used], dtype=np.bool_)
            origin = {c.name: c.provenance for c in used}
        position = {normalize_class_name(name): i for i, name in enumerate(names)}
        return KnownClasses(state.version, names, embeddings, is_seen, origin, position)


def prepare_apart(classifier_id: str, settings: Settings) -> bool:
    """`Library.prepare` in a process of its own, which dies with this one; whether it went well."""
    command = launch([sys.executable, "-m", "workers.prepare", classifier_id])
    environment = {**os.environ, **settings.to_environment()}
    return subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, check=False).returncode == 0


def _parts(value: Any) -> Parts:
    """What the cache counts a value as."""
    return value.parts if isinstance(value, KnownClasses) else parts_of(value)
