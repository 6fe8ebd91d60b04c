"""A picture of what clusters mean: for some of them the patches nearest to each, and the classes they come from.

    python bench/gallery.py --data-dir data --set es_… -o docs/clusters-animals.png

Reads a service's data directory (database and artifacts); changes nothing. Rows are clusters: those with the most
confident patches, of several classes each. Under each patch stands its class; a row's title says how the cluster's
mass spreads over classes.
"""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from safetensors.numpy import load_file

from models.data.images import decode_image
from models.embedding.clustering import PatchClustering
from models.embedding.cutting import decoded_side
from models.params import EmbeddingSetParams
from service.core import caches, repositories
from service.core.artifacts import ArtifactStore, image_key
from service.core.db import Database, make_engine
from service.core.settings import Settings
from service.core.tables import Dataset, EmbeddingSet, FeatureRows
from workers.rows import ImageRow, split_rows
from workers.sources import unpack

SIDE = 104
GAP = 8
CAPTION = 16
TITLE = 22


@dataclass(frozen=True)
class Patches:
    """Every training patch: which image, where, and its soft assignment to the clusters."""

    image: NDArray[np.int64]
    boxes: NDArray[np.int32]
    assignments: NDArray[np.float32]


def read_patches(database: Database, store: ArtifactStore, rows: list[ImageRow], model: PatchClustering) -> Patches:
    """The cached patch features of the rows, through the clusters' heads."""
    with database.read() as session:
        specs = {row.spec for row in session.query(FeatureRows).filter(FeatureRows.sha256 == rows[0].sha256)}
        found = [caches.features(session, spec, [row.sha256 for row in rows]) for spec in specs]
    # Whole images are cached too, under a spec of their own with one row an image; patches have more.
    cached = max(found, key=lambda of: sum(entry.count for entry in of.values()))
    shards = {key: load_file(store.local_path(key)) for key in {entry.shard for entry in cached.values()}}
    image, boxes, assignments = [], [], []
    for number, row in enumerate(rows):
        if row.sha256 in cached:
            entry = cached[row.sha256]
            span = slice(entry.start, entry.start + entry.count)
            image.append(np.full(entry.count, number))
            boxes.append(shards[entry.shard]["boxes"][span])
            assignments.append(model.assign(shards[entry.shard]["features"][span]))
    return Patches(np.concatenate(image), np.concatenate(boxes), np.concatenate(assignments))


def nearest(patches: Patches, cluster: int, n: int) -> list[int]:
    """The `n` patches with the largest share in the cluster, at most one an image."""
    chosen: list[int] = []
    images: set[int] = set()
    for patch in np.argsort(-patches.assignments[:, cluster]):
        if int(patches.image[patch]) not in images:
            images.add(int(patches.image[patch]))
            chosen.append(int(patch))
        if len(chosen) == n:
            break
    return chosen


def choose_clusters(patches: Patches, rows: list[ImageRow], n_clusters: int, n_patches: int) -> list[int]:
    """The clusters whose nearest patches are the surest, among those that gather at least two classes."""
    sureness = {}
    for cluster in range(patches.assignments.shape[1]):
        top = nearest(patches, cluster, n_patches)
        if len({rows[patches.image[p]].class_name for p in top}) >= 2:
            sureness[cluster] = float(patches.assignments[top, cluster].mean())
    return sorted(sureness, key=lambda cluster: -sureness[cluster])[:n_clusters]


def draw(
    patches: Patches, rows: list[ImageRow], clusters: list[int], n_patches: int, store: ArtifactStore, side: int
) -> Image.Image:
    """The gallery."""
    font = ImageFont.load_default(12)
    width = GAP + n_patches * (SIDE + GAP)
    row_height = TITLE + SIDE + CAPTION + GAP
    sheet = Image.new("RGB", (width, GAP + len(clusters) * row_height), "white")
    pen = ImageDraw.Draw(sheet)
    for line, cluster in enumerate(clusters):
        top = GAP + line * row_height
        pen.text((GAP, top), title_of(patches, rows, cluster), fill="black", font=font)
        for column, patch in enumerate(nearest(patches, cluster, n_patches)):
            row = rows[patches.image[patch]]
            picture = Image.fromarray(decode_image(store.read_bytes(image_key(row.sha256)), target_side=side))
            left = GAP + column * (SIDE + GAP)
            x0, y0, x1, y1 = (int(edge) for edge in patches.boxes[patch])
            sheet.paste(
                picture.crop((x0, y0, x1, y1)).resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, top + TITLE)
            )
            label = textwrap.shorten(row.class_name.replace("_", " "), 17, placeholder="…")
            pen.text((left, top + TITLE + SIDE + 1), label, fill="#555555", font=font)
    return sheet


def title_of(patches: Patches, rows: list[ImageRow], cluster: int) -> str:
    """'cluster 17: zebra 61 %, tiger 12 %, …': the share of the cluster's mass that each class brings."""
    mass: dict[str, float] = {}
    for image, share in zip(patches.image, patches.assignments[:, cluster], strict=True):
        mass[rows[image].class_name] = mass.get(rows[image].class_name, 0.0) + float(share)
    total = sum(mass.values())
    top = sorted(mass, key=lambda name: -mass[name])[:5]
    return f"cluster {cluster}: " + ", ".join(f"{n.replace('_', ' ')} {100 * mass[n] / total:.0f} %" for n in top)


def main() -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--set", required=True, help="id or name of an embedding set built with method vgse")
    parser.add_argument("--clusters", type=int, default=8)
    parser.add_argument("--patches", type=int, default=9)
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args()
    settings = Settings(data_dir=options.data_dir)
    database = Database(make_engine(settings.resolved_database_url))
    store = ArtifactStore(settings.resolved_store_url, settings.cache_dir)
    with database.read() as session:
        row = repositories.find_embedding_set(session, options.set)
        dataset = repositories.get(session, Dataset, row.dataset_id)
        rows = list(split_rows(session, dataset, row.request["seen_classes"], ()).train)
    model = PatchClustering.load(_unpacked(store, row, settings))
    patches = read_patches(database, store, rows, model)
    clusters = choose_clusters(patches, rows, options.clusters, options.patches)
    side = decoded_side(EmbeddingSetParams.model_validate(row.params).patches)
    draw(patches, rows, clusters, options.patches, store, side).save(options.out, optimize=True)


def _unpacked(store: ArtifactStore, row: EmbeddingSet, settings: Settings) -> Path:
    return unpack(store, row.artifacts, tuple(row.artifacts), settings.cache_dir / "gallery" / row.id)


if __name__ == "__main__":
    main()
