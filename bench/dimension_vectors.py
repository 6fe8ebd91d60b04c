"""Where should SC-EGG's vectors v_n start, when dimensions are clusters without names? On seen classes only.

    python bench/dimension_vectors.py animals glove-300d --groups 4 --epochs 10

Groups of seen classes play unseen in turn (as in bench/relations.py). Clusters are learned without them, their vectors
are composed of the other classes', and stage 1 of SC-EGG (attention and local embedding p_l) learns from the others'
feature maps. Printed for each group and start of v_n: T1 of p_l in percent among the left-out classes with the composed
vectors, T1 with vectors from their own photos (a perfect relation), the entropy of the attention maps as a share of the
most there is, and the mean correlation of two dimensions' maps. Test rows are never read. Features are kept in
bench/out/.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, it would not find its neighbours
from bench.relations import WEIGHTS, Group, Photos, groups, load
from bench.sc_egg import load_maps
from models.base import FloatArray, IntArray, ignore_progress
from models.embedding.class_embedder import ClassEmbedder, Relation
from models.embedding.clustering import PatchClustering
from models.embedding.relations import unit_rows
from models.generative_params import SCEGGParams
from models.params import ALL_NEIGHBORS, RelationParams
from models.zero_shot.gradient import TrainingData
from models.zero_shot.scen import SCEN, train_scen

Form = Literal["centred", "fused"]
FEW = 50
"""Seen classes below which relations are SMO's, as `auto` has it on such sets."""
PART = 64


def starts(clusters: PatchClustering, features: FloatArray, n_dims: int) -> dict[str, FloatArray | None]:
    """Where v_n may start, (n_dims, V) each: at random, at what each answers to, at its cluster's centre.

    Numbers of the knowledge, beside clusters in the fused form, answer to what S reads of clusters, through H.
    """
    heads = clusters.heads_
    rows = heads.directions()  # (E, D)
    if n_dims > len(rows):
        read = torch.nn.functional.normalize(heads.knowledge.weight.detach() @ rows, dim=1)  # (Dw, D)
        return {"random": None, "directions": torch.cat([rows, read]).numpy()}
    shares = clusters.assign(features)  # (P, E)
    centres = shares.T @ features / shares.sum(axis=0)[:, None]
    return {"random": None, "directions": rows.numpy(), "centres": centres}


class Stage:
    """Stage 1 on the maps of the classes kept, judged on those left out."""

    def __init__(self, maps: FloatArray, channels: int, photos: Photos, left_out: IntArray, seed: int) -> None:
        self._kept = np.setdiff1d(np.arange(len(photos.class_names)), left_out)
        self._left_out, self._labels = left_out, photos.labels
        self._maps, self._channels, self._seed = maps, channels, seed

    def rows(self, classes: IntArray) -> tuple[FloatArray, IntArray]:
        """Maps of `classes`, and labels from 0 in their order."""
        chosen = np.isin(self._labels, classes)
        return self._maps[chosen], np.searchsorted(classes, self._labels[chosen])

    def learned(self, embeddings: FloatArray, vectors: FloatArray | None, params: SCEGGParams) -> SCEN:
        """The network after stage 1 with seen vectors (S, E)."""
        chance = torch.Generator().manual_seed(self._seed)
        drawn = torch.randn(embeddings.shape[1], params.vector_dim, generator=chance)
        begin = drawn if vectors is None else torch.from_numpy((vectors - vectors.mean(axis=0)).astype(np.float32))
        network = SCEN(self._channels, begin, len(embeddings), params, chance)
        maps, labels = self.rows(self._kept)
        data = TrainingData(
            torch.from_numpy(maps.astype(np.float32)),
            torch.from_numpy(labels),
            torch.from_numpy(unit_rows(embeddings).astype(np.float32)),
            torch.Generator().manual_seed(self._seed),
        )
        train_scen(network, params, data, ignore_progress)
        return network

    @torch.no_grad()
    def judged(self, network: SCEN, wanted: Mapping[str, FloatArray]) -> dict[str, float]:
        """T1 with each of the vectors (U, E) in `wanted`; how the maps spread, and how alike they are."""
        maps, labels = self.rows(self._left_out)
        answers, entropies, alike = [], [], []
        for part in np.array_split(maps, max(1, len(maps) // PART)):
            attention, places = network.look(torch.from_numpy(part.astype(np.float32)))  # (B, A, R)
            answers.append(network.semantic(attention, places).numpy())
            n_dims, n_places = attention.shape[1:]
            entropy = -(attention * attention.clamp_min(1e-12).log()).sum(dim=2).mean() / np.log(n_places)
            entropies.append(float(entropy))
            correlation = torch.corrcoef(attention.transpose(0, 1).reshape(n_dims, -1))
            alike.append(float(correlation[~torch.eye(n_dims, dtype=torch.bool)].nanmean()))
        scores = np.concatenate(answers)
        found = {name: _t1(scores @ unit_rows(rows).T, labels) for name, rows in wanted.items()}
        return {**found, "entropy": float(np.mean(entropies)), "correlation": float(np.mean(alike))}


def _t1(scores: FloatArray, labels: IntArray) -> float:
    right = np.bincount(labels, weights=scores.argmax(axis=1) == labels)
    return 100 * float((right / np.bincount(labels)).mean())


def vectors_of(group: Group, clusters: PatchClustering, form: Form) -> tuple[FloatArray, dict[str, FloatArray]]:
    """Vectors of the classes kept, and of those left out: composed, and, of clusters alone, from their own photos."""
    is_small = len(group.images.class_names) < FEW
    relation: Relation = "smo" if is_small else "wavg"
    of_few, of_many = {"ridge": 1.0}, {"n_neighbors": ALL_NEIGHBORS, "eta": 10.0}
    params = RelationParams(form=form, **(of_few if is_small else of_many))
    names, known = group.images.class_names, clusters.class_embeddings_
    embedder = ClassEmbedder(names, known, group.knowledge, relation, params)
    wanted: dict[str, FloatArray] = {"composed": embedder.embed(group.asked)[0]}
    if form == "centred":
        wanted["own photos"] = group.own_vectors(clusters) - known.mean(axis=0)
    return embedder.seen_vectors(), wanted


def main() -> None:
    """Prints a line for each group and start, then the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("knowledge")
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument(
        "--form", choices=["centred", "fused"], default="centred", help="fused: knowledge beside clusters"
    )
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--weights-dir", type=Path, default=Path("../shared/weights"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    folder, weights = asked.data / asked.dataset, asked.weights_dir / WEIGHTS
    photos = load(folder, weights)
    maps, channels = load_maps(folder, weights, json.loads((folder / "splits.json").read_text())["train"])
    stored = np.load(folder / "knowledge" / f"{asked.knowledge}.npz")
    row = {str(known): i for i, known in enumerate(stored["class_names"])}
    knowledge = stored["vectors"][[row[name] for name in photos.class_names]].astype(np.float64)
    params = SCEGGParams(embedding_epochs=asked.epochs, compression_epochs=0)
    lines: dict[str, list[dict[str, float]]] = {}
    for seed, left_out in enumerate(groups(len(photos.class_names), asked.groups)):
        group = Group(photos, left_out, seed)
        group.ask(knowledge)
        clusters = group.clusters("VGSE")
        seen, wanted = vectors_of(group, clusters, asked.form)
        stage = Stage(maps, channels, photos, left_out, seed)
        for name, vectors in starts(clusters, group.patches.features.astype(np.float32), seen.shape[1]).items():
            found = stage.judged(stage.learned(seen, vectors, params), wanted)
            lines.setdefault(name, []).append(found)
            print(seed, name, json.dumps({key: round(value, 2) for key, value in found.items()}), flush=True)
    for name, all_found in lines.items():
        means = {key: round(float(np.mean([found[key] for found in all_found])), 2) for key in all_found[0]}
        print("mean", name, json.dumps(means))


if __name__ == "__main__":
    main()
