"""The Python client of the REST API. Needs httpx and numpy, no torch.

    from unseen import Client

    with Client("http://127.0.0.1:8000") as client:
        dataset = client.create_dataset("animals")
        client.upload_folder(dataset["id"], "photos")
        knowledge = client.wait(client.add_knowledge("glove", file="glove.6B.300d.txt"))
        job = client.create_embedding_set(dataset["id"], knowledge["resource"]["id"], unseen_classes=["zebra"])
        names, seen, vectors = client.class_embeddings(client.wait(job)["resource"]["id"])

Every method answers the JSON that the REST API documents. Errors are `UnseenError`s whose text says what to do.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.client_base import Connection, as_object
from service.client_http import ApiError, Form, Json, ServiceUnreachable, UnseenError
from service.client_jobs import JobFailed, WaitTimeout
from service.client_uploads import (
    FolderUpload,
    ImageSource,
    LabelledImage,
    batches,
    guess_kind,
    labelled,
    named_content,
    plain_vectors,
    read_folder,
)

__all__ = [
    "ApiError",
    "ClassEmbeddings",
    "Client",
    "FolderUpload",
    "JobFailed",
    "ServiceUnreachable",
    "UnseenError",
    "WaitTimeout",
]

CLASSIFY_BATCH = 32
NAMES_BATCH = 100
EXPORT_FORMATS = ("npz", "mat", "csv", "parquet", "safetensors")
OnCount = Callable[[int, int], None]
"""Called with what is done and the total."""


class ClassEmbeddings(NamedTuple):
    """Vectors of classes: names, seen (n_classes,) bool, vectors (n_classes, dim) float32, in one order."""

    names: list[str]
    seen: NDArray[np.bool_]
    vectors: NDArray[np.float32]


class Client(Connection):
    """A connection to one service; use it as a context manager, or `close` it.

    `base_url`, `api_key`: by default `UNSEEN_URL` and `UNSEEN_API_KEY` of the environment; an empty key: none.
    `timeout`: seconds one answer may take. `retries`: how often a request is sent again after a broken connection,
    429 or 503; that is safe, as each POST carries an Idempotency-Key. `transport`: for tests.
    """

    # ---- datasets ---------------------------------------------------------------------------------

    def create_dataset(self, name: str, **fields: Any) -> Json:
        """A new, empty dataset; `fields`: description, metadata, test_fraction."""
        return as_object(self._http.json("POST", "/v1/datasets", json={"name": name, **fields}))

    def upload_images(
        self,
        dataset_id: str,
        images: Sequence[ImageSource],
        class_name: str | None = None,
        *,
        labels: Sequence[str] | None = None,
        split: Literal["train", "test"] | None = None,
    ) -> Json:
        """Adds images of one class, or of `labels`, one for each: {accepted, rejected}, in batches as needed."""
        merged: Json = {"accepted": [], "rejected": []}
        for answer, _ in self._upload(dataset_id, labelled(images, class_name, labels, split)):
            merged["accepted"] += answer["accepted"]
            merged["rejected"] += answer["rejected"]
        return merged

    def upload_folder(
        self,
        dataset_id: str,
        folder: str | Path,
        *,
        classes: Iterable[str] | None = None,
        test_classes: Iterable[str] = (),
        on_progress: OnCount | None = None,
    ) -> FolderUpload:
        """Adds <class>/<file>, heeding a splits.json; `classes`: only these.

        Images of `test_classes` that splits.json says nothing of are kept for evaluation.
        """
        images, report = read_folder(Path(folder), classes=classes, test_classes=test_classes)
        done = 0
        for answer, n_files in self._upload(dataset_id, images):
            report.add(answer)
            done += n_files
            if on_progress is not None:
                on_progress(done, len(images))
        return report

    def upload_archive(self, dataset_id: str, path: str | Path) -> Json:
        """Imports a zip or tar with one folder a class: the job."""
        path = Path(path)
        kind = "application/zip" if path.suffix.lower() == ".zip" else "application/x-tar"
        headers = {"Content-Type": kind}
        return as_object(self._http.json("POST", f"/v1/datasets/{dataset_id}/archive", content=path, headers=headers))

    def upload_features(
        self,
        dataset_id: str,
        *,
        features: str | Path | None = None,
        splits: str | Path | None = None,
        res101: str | Path | None = None,
        att_splits: str | Path | None = None,
    ) -> Json:
        """Fills an empty dataset from `features` (.npz, with `splits`), or xlsa17's two .mat files: the job."""
        given = {"features": features, "splits": splits, "res101": res101, "att_splits": att_splits}
        files = tuple((name, Path(path).name, Path(path)) for name, path in given.items() if path is not None)
        return as_object(self._http.json("POST", f"/v1/datasets/{dataset_id}/features", form=Form(files)))

    # ---- knowledge --------------------------------------------------------------------------------

    def add_knowledge(
        self,
        name: str,
        *,
        file: str | Path | None = None,
        vectors: Mapping[str, Any] | None = None,
        model: str | None = None,
        kind: str | None = None,
        attribute_names: Sequence[str] | None = None,
        template: str | None = None,
    ) -> Json:
        """Adds a file, vectors by class name, or a text encoder by its name: the job that reads it."""
        if sum(source is not None for source in (file, vectors, model)) != 1:
            raise UnseenError("Give one of file, vectors and model.")
        if file is not None:
            path = Path(file)
            fields = {"name": name, "kind": kind or guess_kind(path)}
            return as_object(self._http.json("POST", "/v1/knowledge", form=Form((("file", path.name, path),), fields)))
        default = "text_encoder" if model is not None else "attributes" if attribute_names else "class_vectors"
        body: Json = {"name": name, "kind": kind or default}
        if vectors is not None:
            body["vectors"] = plain_vectors(vectors)
        if attribute_names is not None:
            body["attribute_names"] = list(attribute_names)
        body |= _given(model=model, template=template)
        return as_object(self._http.json("POST", "/v1/knowledge", json=body))

    def lookup(self, knowledge_id: str, names: Sequence[str]) -> list[Json]:
        """How each name resolves: {name, found, how, tokens, missing_tokens, suggestions}."""
        found: list[Json] = []
        for part in _parts(names, NAMES_BATCH):
            answer = self._http.json("GET", f"/v1/knowledge/{knowledge_id}/lookup", params={"names": list(part)})
            found += answer["data"]
        return found

    # ---- embedding sets ---------------------------------------------------------------------------

    def create_embedding_set(
        self,
        dataset_id: str,
        knowledge_id: str,
        *,
        unseen_classes: Sequence[str] = (),
        seen_classes: Sequence[str] | None = None,
        validate_only: bool = False,
        **fields: Any,
    ) -> Json:
        """Builds class embeddings: the job, or with `validate_only` the estimate and every problem.

        `fields`: name, method (vgse, kmeans, backbone), relation (auto, smo, wavg), params; see `methods`.
        """
        body: Json = {"dataset_id": dataset_id, "knowledge_id": knowledge_id, "unseen_classes": list(unseen_classes)}
        if seen_classes is not None:
            body["seen_classes"] = list(seen_classes)
        return self._create("/v1/embedding-sets", body | fields, validate_only)

    def embedding_set(self, set_id: str) -> Json:
        """One embedding set: status, dimension, report."""
        return self.get(set_id)

    def classes(self, set_id: str, names: Sequence[str] | None = None) -> Iterator[Json]:
        """Each class's {name, seen, embedding (base64 float32), provenance}; all of them, or those named."""
        path, query = f"/v1/embedding-sets/{set_id}/classes", {"encoding_format": "base64"}
        if names is None:
            yield from self._pages(path, query)
            return
        for part in _parts(names, NAMES_BATCH):
            yield from self._http.json("GET", path, params={**query, "names": list(part)})["data"]

    def class_embeddings(self, set_id: str, names: Sequence[str] | None = None) -> ClassEmbeddings:
        """All vectors, or those of `names` in that order: (names, seen, vectors)."""
        rows = list(self.classes(set_id, names))
        if names is not None:
            by_name = {row["name"]: row for row in rows}
            rows = [by_name[name] for name in names]
        return _table(rows)

    def add_classes(
        self, set_id: str, class_names: Sequence[str], *, relation: Literal["smo", "wavg"] | None = None
    ) -> list[Json]:
        """Adds unseen classes at once: each one's {name, seen, embedding, provenance, created}."""
        body: Json = {"class_names": list(class_names)} | ({"relation": relation} if relation else {})
        return list(self._http.json("POST", f"/v1/embedding-sets/{set_id}/classes", json=body)["data"])

    def embeddings(
        self,
        model: str,
        input: str | Sequence[str],
        *,
        encoding_format: Literal["float", "base64"] = "float",
        dimensions: int | None = None,
    ) -> Json:
        """OpenAI's shape: vectors of class names, stored or predicted on the fly; `model`: an embedding set."""
        names = input if isinstance(input, str) else list(input)
        body = _given(model=model, input=names, encoding_format=encoding_format, dimensions=dimensions)
        return as_object(self._http.json("POST", "/v1/embeddings", json=body))

    def export(self, set_id: str, path: str | Path, format: str | None = None) -> Path:
        """Writes all vectors into a file: npz, mat (xlsa17), csv, parquet or safetensors, told by its suffix."""
        path = Path(path)
        wanted = (format or path.suffix.removeprefix(".")).lower()
        if wanted not in EXPORT_FORMATS:
            raise UnseenError(f"{wanted or str(path)!r} is no format to export; use {', '.join(EXPORT_FORMATS)}.")
        response = self._http.request("GET", f"/v1/embedding-sets/{set_id}/export", params={"format": wanted})
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            aside.write_bytes(response.content)
            aside.replace(path)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise UnseenError(f"{path} cannot be written: {error.strerror}.") from error
        return path

    # ---- classifiers ------------------------------------------------------------------------------

    def create_classifier(
        self,
        dataset_id: str,
        *,
        embedding_set_id: str | None = None,
        knowledge_id: str | None = None,
        validate_only: bool = False,
        **fields: Any,
    ) -> Json:
        """Trains a classifier on class embeddings or on a knowledge source's own vectors: the job.

        With `validate_only` nothing is trained: the memory it would hold, and every problem.
        `fields`: name, method (sje, eszsl, …), params, seen_classes, unseen_classes, backbone, dimension_names,
        dimension_knowledge_id, evaluate, seed, …
        """
        source = _given(embedding_set_id=embedding_set_id, knowledge_id=knowledge_id)
        return self._create("/v1/classifiers", {"dataset_id": dataset_id, **fields, **source}, validate_only)

    def classifier(self, classifier_id: str) -> Json:
        """One classifier with its metrics."""
        return self.get(classifier_id)

    def classify(
        self,
        images: ImageSource | Sequence[ImageSource],
        *,
        classifier_id: str | None = None,
        scope: Literal["unseen", "seen", "all"] = "all",
        class_names: Sequence[str] | None = None,
        top_k: int = 5,
        gamma: float | None = None,
        explain: bool = False,
        min_score: float | None = None,
        timeout_s: float | None = None,
    ) -> Json:
        """{classifier_id, scope, gamma, data}: predictions for each image in order; default: the newest classifier.

        `min_score`: `abstained` is true where the best is lower. `timeout_s`: a later answer is of no use (504).
        """
        names = class_names and list(class_names)
        params = _given(classifier_id=classifier_id, scope=scope, class_names=names, top_k=top_k, gamma=gamma)
        params |= _given(explain=str(explain).lower(), min_score=min_score, timeout_s=timeout_s)
        return self._of_images("/v1/classify", images, params, pinned="classifier_id")

    def infer(
        self,
        images: ImageSource | Sequence[ImageSource],
        *,
        classifier_id: str | None = None,
        class_names: Sequence[str] | None = None,
        tau: float = 0.0,
        top_k: int = 10,
        timeout_s: float | None = None,
    ) -> Json:
        """{classifier_id, tau, data}: known classes that each image is like, and unlike; default: the newest PSR."""
        names = class_names and list(class_names)
        params = _given(classifier_id=classifier_id, class_names=names, tau=tau, top_k=top_k, timeout_s=timeout_s)
        return self._of_images("/v1/infer", images, params, pinned="classifier_id")

    def create_predictions(self, dataset_id: str, **fields: Any) -> Json:
        """Classifies all images of a dataset, however many: the job.

        `fields`: classifier_id, only_classes, scope, class_names, top_k, gamma, min_score, name.
        """
        return self._create("/v1/predictions", {"dataset_id": dataset_id, **fields}, False)

    def predicted_images(self, predictions_id: str) -> Iterator[Json]:
        """Each image with its predictions, in the order of the dataset's classes."""
        return self._pages(f"/v1/predictions/{predictions_id}/items", {"limit": 100})

    def attention(
        self,
        classifier_id: str,
        images: ImageSource | Sequence[ImageSource],
        *,
        class_name: str | None = None,
        top_k: int = 8,
        timeout_s: float | None = None,
    ) -> Json:
        """{classifier_id, data}: where a classifier on feature maps looks in each image, as maps of its places.

        class_name: what it looks for; default: the likeliest class. top_k: dimensions to tell of. `timeout_s`: a later
        answer is of no use (504).
        """
        params = _given(class_name=class_name, top_k=top_k, timeout_s=timeout_s)
        return self._of_images(f"/v1/classifiers/{classifier_id}/attention", images, params)

    def attention_picture(self, classifier_id: str, image: ImageSource, **options: Any) -> bytes:
        """The same of one image as a JPEG: the photo with the maps laid over it; `options` as in `attention`."""
        name, content = named_content(image, 0)
        response = self._http.request(
            "POST",
            f"/v1/classifiers/{classifier_id}/attention",
            params=_given(**options),
            form=Form((("images", name, content),)),
            headers={"Accept": "image/jpeg"},
        )
        return response.content

    # ---- inside -----------------------------------------------------------------------------------

    def _create(self, path: str, body: Json, validate_only: bool) -> Json:
        params = {"validate_only": "true"} if validate_only else None
        return as_object(self._http.json("POST", path, json=body, params=params))

    def _of_images(
        self, path: str, images: ImageSource | Sequence[ImageSource], params: Json, *, pinned: str | None = None
    ) -> Json:
        """The answers of all images in order, some of them a request; `pinned`: what the first answer settles."""
        sources: Sequence[ImageSource] = [images] if isinstance(images, str | Path | bytes | tuple) else images
        merged: Json = {"data": []}
        for start in range(0, len(sources), CLASSIFY_BATCH):
            named = [named_content(s, start + i) for i, s in enumerate(sources[start : start + CLASSIFY_BATCH])]
            form = Form(tuple(("images", name, content) for name, content in named))
            answer = self._http.json("POST", path, params=params, form=form)
            if pinned is not None:
                params = {**params, pinned: answer[pinned]}
            rows = [{**row, "index": start + row["index"]} for row in answer["data"]]
            merged = {**answer, "data": merged["data"] + rows}
        return merged

    def _upload(self, dataset_id: str, images: Sequence[LabelledImage]) -> Iterator[tuple[Json, int]]:
        for form, n_files in batches(images):
            yield self._http.json("POST", f"/v1/datasets/{dataset_id}/images", form=form), n_files


def _given(**options: Any) -> Json:
    return {name: value for name, value in options.items() if value is not None}


def _parts(names: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(names), size):
        yield names[start : start + size]


def _table(rows: Sequence[Json]) -> ClassEmbeddings:
    raw = b"".join(base64.b64decode(row["embedding"]) for row in rows)
    vectors = np.frombuffer(raw, dtype="<f4").astype(np.float32).reshape(len(rows), -1 if rows else 0)
    return ClassEmbeddings([row["name"] for row in rows], np.array([row["seen"] for row in rows], dtype=bool), vectors)
