"""The backends on this machine's CPU: time for an image, and how far their features are from those of torch in fp32.

    python bench/backends.py [mobilenet_v2 resnet50 ...] [--batches 1 8 32] [--weights FILE]
    python bench/backends.py mobilenet_v2 --weights FILE --drift DATASET_FOLDER

Time: CPU time of one thread, so that other processes count little; all take turns, medians of 7. Cosines and the
largest difference (as a share of the largest feature) are to the features of torch in fp32.
Drift, on the photos of a data set: each test photo is given to the class whose mean is nearest to it (cosine; means of
the training photos' features, from torch in fp32). Agreement: photos with the same class as from torch in fp32. The
rows "turned" are those features turned at random by so much: what a bound on the cosine alone would let pass.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, it would not find the packages
from models.backbones import Backbone, FeatureNetwork, create_backbone
from models.backends.base import Place
from models.backends.choice import BackendName, fast_network
from workers.engine import prepare_image

ROUNDS = 7
BATCH = 32
EXACT = "torch fp32"
TURNS = (1e-6, 1e-5, 1e-4, 1e-3)
"""1 - cosine of features that are turned at random."""


def open_all(name: str, weights: Path | None, folder: Path) -> dict[str, FeatureNetwork]:
    """Every backend at every precision, by what it is called in the tables."""
    exact = create_backbone(name, weights=weights)
    rounded = create_backbone(name, weights=weights, precision="bf16")

    def fast(network: Backbone, backend: BackendName) -> FeatureNetwork:
        return fast_network(network, Place(network.input_size, folder, threads=1), backend=backend)

    return {
        EXACT: exact,
        "OpenVINO fp32": fast(exact, "openvino"),
        "ONNX Runtime fp32": fast(exact, "onnxruntime"),
        "torch bf16": rounded,
        "OpenVINO bf16": fast(rounded, "openvino"),
    }


def cpu_ms(network: FeatureNetwork, images: Tensor) -> float:
    """CPU time of one call."""
    started = time.process_time()
    network.features(images)
    return 1000 * (time.process_time() - started)


def apart(found: Tensor, exact: Tensor) -> tuple[float, float]:
    """1 - the least cosine of two rows, and the largest difference as a share of the largest feature."""
    cosines = functional.cosine_similarity(found.double(), exact.double(), dim=1)
    return max(0.0, float(1 - cosines.min())), float((found - exact).abs().max() / exact.abs().max())


def print_times(name: str, networks: dict[str, FeatureNetwork], side: int, batches: Sequence[int]) -> None:
    """A row of Markdown for each batch and backend."""
    for batch in batches:
        images = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)
        features = {backend: network.features(images) for backend, network in networks.items()}
        rounds = [{backend: cpu_ms(network, images) for backend, network in networks.items()} for _ in range(ROUNDS)]
        for backend in networks:
            ms = median(each[backend] for each in rounds) / batch
            ratio = median(each[EXACT] / each[backend] for each in rounds)
            angle, largest = apart(features[backend], features[EXACT])
            print(
                f"| {name} | {batch} | {backend} | {ms:.1f} | {ratio:.2f} | {angle:.0e} | {largest:.0e} |", flush=True
            )


def features_of(paths: Sequence[Path], networks: dict[str, FeatureNetwork], side: int) -> dict[str, Tensor]:
    """Features of the photos, (n, feature_dim) by backend."""
    rows: dict[str, list[Tensor]] = {backend: [] for backend in networks}
    for start in range(0, len(paths), BATCH):
        images = torch.stack([prepare_image(path.read_bytes(), side) for path in paths[start : start + BATCH]])
        for backend, network in networks.items():
            rows[backend].append(network.features(images))
    return {backend: torch.cat(parts) for backend, parts in rows.items()}


def turned(rows: Tensor, by: float) -> Tensor:
    """Each of the rows (n, d), as long as before, in a random direction whose cosine with it is 1 - `by`."""
    rows = rows.double()
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ahead = functional.normalize(rows)
    aside = functional.normalize(noise - (noise * ahead).sum(dim=1, keepdim=True) * ahead)
    cosine = 1 - by
    found: Tensor = (cosine * ahead + (1 - cosine**2) ** 0.5 * aside) * rows.norm(dim=1, keepdim=True)
    return found.float()


def print_drift(name: str, networks: dict[str, FeatureNetwork], side: int, data: Path) -> None:
    """A row of Markdown for each backend."""
    splits = json.loads((data / "splits.json").read_text())
    train = [data / photo for photo in splits["train"]]
    test = [data / photo for photo in (*splits["test_seen"], *splits["test_unseen"])]
    classes = sorted({path.parent.name for path in train})
    labels = torch.tensor([classes.index(path.parent.name) for path in train])
    known = features_of(train, {EXACT: networks[EXACT]}, side)[EXACT]
    means = functional.normalize(torch.stack([known[labels == i].mean(dim=0) for i in range(len(classes))]))
    found = features_of(test, networks, side)
    found |= {f"turned by {by:.0e}": turned(found[EXACT], by) for by in TURNS}
    top = {backend: (rows @ means.T).argmax(dim=1) for backend, rows in found.items()}
    for backend, rows in found.items():
        same = int((top[backend] == top[EXACT]).sum())
        angle, largest = apart(rows, found[EXACT])
        agreement = f"{same} of {len(test)} | {100 * same / len(test):.2f} %"
        print(f"| {name} | {data.name} | {backend} | {agreement} | {angle:.0e} | {largest:.0e} |")


def main() -> None:
    """Prints a table of Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=["mobilenet_v2", "resnet50"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--weights", type=Path, help="of a single network; default: untrained")
    parser.add_argument("--drift", type=Path, help="folder of photos and splits.json: measure drift, not time")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.drift:
        print("| network | photos | backend | same class | agreement | 1 - least cosine | largest difference |")
    else:
        print("| network | batch | backend | ms an image | torch fp32 ÷ it | 1 - least cosine | largest difference |")
    print("|---|---|---|---|---|---|---|")
    for name in asked.networks:
        with tempfile.TemporaryDirectory() as folder:
            networks = open_all(name, asked.weights, Path(folder))
            side = create_backbone(name, weights=None).input_size
            if asked.drift:
                print_drift(name, networks, side, asked.drift)
            else:
                print_times(name, networks, side, asked.batches)


if __name__ == "__main__":
    main()
