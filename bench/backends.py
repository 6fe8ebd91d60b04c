"""torch against OpenVINO on this machine's CPU: time for an image, and how far the features are apart.

    python bench/backends.py [mobilenet_v2 resnet50 ...] [--batches 1 8 32] [--weights FILE]

CPU time of one thread, so that other processes count little; the two take turns, medians of 7. Difference: the largest
one of any feature, as a share of the largest feature.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from models.backbones import FeatureNetwork, create_backbone
from models.backends import fast_network

ROUNDS = 7


def cpu_ms(network: FeatureNetwork, images: torch.Tensor) -> float:
    """CPU time of one call."""
    started = time.process_time()
    network.features(images)
    return 1000 * (time.process_time() - started)


def main() -> None:
    """Prints a row of Markdown for each network and batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=["mobilenet_v2", "resnet50"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--weights", type=Path, help="of a single network; default: untrained")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print("| network | batch | torch, ms an image | OpenVINO | ratio | largest difference |\n|---|---|---|---|---|---|")
    for name in asked.networks:
        own = create_backbone(name, weights=asked.weights)
        with tempfile.TemporaryDirectory() as folder:
            fast = fast_network(own, own.input_size, backend="openvino", directory=Path(folder), threads=1)
            for batch in asked.batches:
                images = torch.randint(0, 256, (batch, 3, own.input_size, own.input_size), dtype=torch.uint8)
                expected, found = own.features(images), fast.features(images)
                times = [(cpu_ms(own, images), cpu_ms(fast, images)) for _ in range(ROUNDS)]
                slow, quick = (median(column) / batch for column in zip(*times, strict=True))
                apart = float((expected - found).abs().max() / expected.abs().max())
                print(f"| {name} | {batch} | {slow:.1f} | {quick:.1f} | {slow / quick:.2f} | {apart:.0e} |", flush=True)


if __name__ == "__main__":
    main()
