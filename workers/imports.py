"""Tasks that take files in: image archives, feature files, knowledge."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from sqlalchemy.orm import Session

from models.base import Progress
from models.data.archives import ArchiveEntry, ArchiveLimits, ArchiveRejection, inspect_archive, iterate_archive
from models.data.features import FeatureDataset, load_feature_npz, load_xlsa17
from models.data.images import ImageLimits, probe_image
from models.errors import InvalidInput, TooFewSamples, UnreadableImage
from models.knowledge.names import normalize_class_name, validate_class_names
from models.knowledge.table_files import read_class_table
from models.knowledge.tables import ClassTable, class_table
from models.knowledge.word_vectors import WordVectorIndex
from service.core import repositories
from service.core.ids import new_id
from service.core.tables import Dataset, Image, Knowledge
from workers.runner import Publisher, TaskContext
from workers.sources import describe_text_encoder

INLINE = "inline.json"  # the API's name for vectors that came in the request's body
MAX_REPORTED = 1000  # rejected files named in a result; all of them are counted


def import_archive(context: TaskContext) -> Publisher:
    """Reads every entry of an archive; stores what is an image; reports the rest. One bad file never fails the job."""
    settings = context.settings
    image_limits = ImageLimits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_image_pixels)
    limits = ArchiveLimits(max_entries=settings.max_archive_entries, max_entry_bytes=settings.max_image_bytes)
    context.progress.set_phases([("import", 1.0)])
    path = context.store.local_path(context.job.payload["archive"])
    plan = inspect_archive(path, limits)
    rows: dict[str, Image] = {}
    rejected: list[dict[str, str]] = []
    n_duplicates = 0
    with context.store.batch() as put:  # all of it is durable before `publish` records any
        for done, entry in enumerate(iterate_archive(path, limits, plan), start=1):
            n_duplicates += _take(context, entry, image_limits, rows, rejected, put)
            context.progress(Progress("import", done, plan.n_files, {"accepted": len(rows), "rejected": len(rejected)}))
    if not rows:
        raise TooFewSamples(
            f"None of the archive's {plan.n_files} files could be used. "
            + "; ".join(f"{r['filename']}: {r['reason']}" for r in rejected[:3])
        )

    def publish(session: Session) -> dict[str, Any]:
        n_added, n_present = _add_images(session, context.job.resource_id, rows, rejected)
        return {
            "kind": "dataset",
            "id": context.job.resource_id,
            "href": f"/v1/datasets/{context.job.resource_id}",
            "n_accepted": n_added,
            "n_duplicates": n_duplicates + n_present,
            "n_rejected": len(rejected),
            "rejected": rejected[:MAX_REPORTED],
        }

    return publish


def _take(
    context: TaskContext,
    entry: ArchiveEntry | ArchiveRejection,
    limits: ImageLimits,
    rows: dict[str, Image],
    rejected: list[dict[str, str]],
    put: Callable[[bytes], str],
) -> bool:
    """Adds an entry to `rows` (and stores it) or to `rejected`; True if `rows` holds it already."""
    if not isinstance(entry, ArchiveEntry):
        rejected.append(_rejection(entry.filename, entry.reason))
        return False
    sha256 = hashlib.sha256(entry.data).hexdigest()
    known = rows.get(sha256)
    try:
        (class_name,) = validate_class_names([entry.class_name])
        if known is None:
            rows[sha256] = _image_row(context, entry, class_name, sha256, limits)
            put(entry.data)
            return False
    except (InvalidInput, UnreadableImage) as error:
        reason = error.reason if isinstance(error, UnreadableImage) else str(error)
        rejected.append(_rejection(entry.filename, reason))
        return False
    if known.class_name != class_name:
        rejected.append(_rejection(entry.filename, f"The same image is also in class {known.class_name!r}."))
        return False
    return True


def _rejection(filename: str, reason: str) -> dict[str, str]:
    return {"filename": filename[-512:], "reason": reason}


def _image_row(context: TaskContext, entry: ArchiveEntry, class_name: str, sha256: str, limits: ImageLimits) -> Image:
    info = probe_image(entry.data, limits)
    return Image(
        id=new_id("image"),
        dataset_id=context.job.resource_id,
        sha256=sha256,
        class_name=class_name,
        filename=entry.filename[-512:],
        width=info.width,
        height=info.height,
        size_bytes=len(entry.data),
        split=entry.split,
    )


def _add_images(
    session: Session, dataset_id: str, rows: dict[str, Image], rejected: list[dict[str, str]]
) -> tuple[int, int]:
    """Adds the rows that the dataset lacks; classes spelled differently from existing ones are rejected.

    (added, already there in the same class).
    """
    present = repositories.images_by_content(session, dataset_id, list(rows))
    spelled = {normalize_class_name(c.class_name): c.class_name for c in repositories.class_counts(session, dataset_id)}
    n_added = n_present = 0
    for sha256, row in rows.items():
        existing = spelled.setdefault(normalize_class_name(row.class_name), row.class_name)
        if sha256 in present:
            known = present[sha256].class_name
            if known == row.class_name:
                n_present += 1
            else:
                rejected.append(_rejection(row.filename, f"The same image is already here, as {known!r}."))
        elif existing != row.class_name:
            reason = f"The class {row.class_name!r} exists already, spelled {existing!r}."
            rejected.append(_rejection(row.filename, reason))
        else:
            session.add(row)
            n_added += 1
    return n_added, n_present


def import_features(context: TaskContext) -> Publisher:
    """Reads an xlsa17 pair or an .npz into a features-only dataset."""
    context.progress.set_phases([("import", 1.0)])
    context.progress(Progress("import", 0, 1))
    dataset = read_feature_files(context, context.job.payload["files"])
    context.progress(Progress("import", 1, 1))
    counts = {name: int((dataset.labels == i).sum()) for i, name in enumerate(dataset.class_names)}
    train = dataset.labels[dataset.train_rows]
    summary = {
        "n_rows": len(dataset.labels),
        "feature_dim": int(dataset.features.shape[1]),
        "n_classes": len(dataset.class_names),
        "classes": counts,
        "train_classes": {name: int((train == i).sum()) for i, name in enumerate(dataset.class_names)},
        "seen_classes": list(dataset.seen_classes),
        "unseen_classes": list(dataset.unseen_classes),
        "validation_classes": list(dataset.validation_classes),
        "n_train": len(dataset.train_rows),
        "n_test_seen": len(dataset.test_seen_rows),
        "n_test_unseen": len(dataset.test_unseen_rows),
        "fingerprint": dict(dataset.fingerprint),
    }

    def publish(session: Session) -> dict[str, Any]:
        row = repositories.get(session, Dataset, context.job.resource_id)
        if repositories.count_images(session, [row.id]) or row.kind == "features":
            raise InvalidInput(f"Dataset {row.id!r} was filled by another request meanwhile; use a new one.")
        row.kind, row.artifacts, row.summary = "features", context.job.payload["files"], summary
        return {"kind": "dataset", "id": row.id, "href": f"/v1/datasets/{row.id}", **summary}

    return publish


def read_feature_files(context: TaskContext, files: dict[str, str]) -> FeatureDataset:
    """The feature dataset behind stored files ('res101' and 'att_splits', or 'features' and perhaps 'splits')."""
    suffixes = {"features": ".npz", "splits": ".json"}
    paths = {name: _linked(context, name + suffixes.get(name, ".mat"), key) for name, key in files.items()}
    if "res101" in paths:
        return load_xlsa17(paths["res101"], paths["att_splits"])
    return load_feature_npz(paths["features"], paths.get("splits"))


def index_knowledge(context: TaskContext) -> Publisher:
    """Reads a knowledge file once into what lookups need: an index of word vectors, or a class table."""
    payload = context.job.payload
    context.progress.set_phases([("import", 1.0)])
    with context.database.read() as session:
        row = repositories.get(session, Knowledge, context.job.resource_id)
        name, kind = row.name, row.kind
    directory = context.scratch_dir / "knowledge"
    summary: dict[str, Any] = {}
    if kind == "text_encoder":
        dim, summary = describe_text_encoder(payload["model"], payload["template"], context.settings)
        n_entries = None
    elif kind == "word_vectors":
        source = _linked(context, f"source-{Path(payload['filename']).name}", payload["file"])
        index = WordVectorIndex.build(source, directory, on_progress=context.progress)
        dim, n_entries = index.dim, index.manifest.n_rows
        manifest = index.manifest
        summary = {
            "file": payload["filename"],
            "format": manifest.source_format,
            "n_duplicates": manifest.n_duplicates,
            "n_skipped": manifest.n_skipped,
            "skipped_examples": list(manifest.skipped_examples),
        }
    else:
        table = _read_table(context, kind, payload)
        directory.mkdir()
        table.save(directory)
        dim, n_entries = table.dim, len(table.class_names)
        summary = _table_summary(table, payload["filename"])
    keys = put_directory(context, directory)

    def publish(session: Session) -> dict[str, Any]:
        row = repositories.get(session, Knowledge, context.job.resource_id)
        row.status, row.dim, row.n_entries, row.artifacts, row.summary = "ready", dim, n_entries, keys, summary
        href = f"/v1/knowledge/{row.id}"
        return {"kind": "knowledge", "id": row.id, "href": href, "name": name, "dim": dim, "n_entries": n_entries}

    return publish


def _linked(context: TaskContext, name: str, key: str) -> Path:
    """A link to a stored file under a name that says what it is: readers go by the suffix, errors quote the name."""
    link = context.scratch_dir / name
    if not link.exists():
        link.symlink_to(context.store.local_path(key))
    return link


def _read_table(context: TaskContext, kind: Any, payload: dict[str, str]) -> ClassTable:
    path = context.store.local_path(payload["file"])
    if payload["filename"] != INLINE:
        return read_class_table(path, kind, filename=payload["filename"])
    inline = orjson.loads(path.read_bytes())
    vectors = inline["vectors"]
    return class_table(kind, list(vectors), np.array(list(vectors.values()), np.float32), inline["attribute_names"])


def _table_summary(table: ClassTable, filename: str) -> dict[str, Any]:
    return {
        "file": filename,
        "class_names": list(table.class_names[:100]),
        "attribute_names": list(table.attribute_names or ())[:200],
        "has_attribute_vectors": table.attribute_vectors is not None,
    }


def put_directory(context: TaskContext, directory: Path) -> dict[str, str]:
    """Puts every file of a directory into the store: file name -> key. Empty for a directory that does not exist."""
    if not directory.exists():
        return {}
    return {path.name: context.store.put_file(path) for path in sorted(directory.iterdir()) if path.is_file()}
