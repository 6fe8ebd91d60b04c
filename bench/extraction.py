"""Patch features: the pipeline's patches a second against the bare network's, and what grows with the images.

    python bench/extraction.py [--images PHOTOS/images] [--backbone mobilenet_v2] [--weights FILE]

Prints one JSON object. Rounds are interleaved, so that other load on the machine meets all parts alike:
- raw_call: `Backbone.features` on patches in memory, torch spreading each operation over all threads;
- raw_streams: the same, one stream a thread with one torch thread each: the most that the machine gives;
- pipeline: `extract_features` from files on disk.
cutting: images a second that threads and processes cut, without a network, from the tenth on, and what that costs this
process: of it, the part that holds the GIL bounds all.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, it would not find its neighbours
from bench import CREATURES, exponent
from models.backbones import Backbone, create_backbone
from models.data.images import DEFAULT_LIMITS, decode_image
from models.embedding.cutting import Source, cut_in_processes, cut_in_threads, decoded_side
from models.embedding.extraction import ImageFeatures, extract_features
from models.embedding.patches import cut_patches, patch_boxes
from models.params import PatchParams
from service.core.process import COMPUTE_ENVIRONMENT


def measure_throughput(args: argparse.Namespace) -> dict[str, Any]:
    backbone = create_backbone(args.backbone, weights=args.weights, precision=args.precision)
    params = PatchParams(size=args.size)
    paths = _sample(args.images, args.n_images)
    patches = torch.cat([_cut(path, params) for path in paths])
    torch.set_num_threads(args.threads)
    parts: dict[str, Callable[[], int]] = {
        "raw_call": lambda: len(backbone.features(patches)),
        "raw_streams": lambda: _run_streams(backbone, patches, args.threads),
        "pipeline": lambda: _run_pipeline(backbone, paths, params, args.threads),
    }
    for part in parts.values():
        part()  # the first run allocates, and compiles oneDNN's kernels
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(args.rounds):
        order = list(parts) if number % 2 == 0 else list(reversed(parts))
        rounds.append({name: _timed(parts[name]) for name in order})
    rates = {name: _median(rounds, name, "patches_per_s") for name in parts}
    cpu = {name: _median(rounds, name, "cpu_ms_per_patch") for name in parts}
    return {
        "backbone": args.backbone,
        "precision": args.precision,
        "threads": args.threads,
        "n_images": len(paths),
        "n_patches": len(patches),
        "patches_per_s": rates,
        "cpu_ms_per_patch": cpu,
        "ratio_to_raw_call": _ratio(rounds, "raw_call"),
        "ratio_to_raw_streams": _ratio(rounds, "raw_streams"),
        "cpu_ratio_to_raw_streams": round(cpu["raw_streams"] / cpu["pipeline"], 3),
        "load_average": os.getloadavg()[0],
    }


def measure_stages(args: argparse.Namespace) -> dict[str, float]:
    """CPU milliseconds an image of each preparing step, on one thread."""
    params = PatchParams(size=args.size)
    data = [path.read_bytes() for path in _sample(args.images, args.n_images)]
    torch.set_num_threads(1)
    start = time.thread_time()
    images = [decode_image(one, DEFAULT_LIMITS, target_side=decoded_side(params)) for one in data]
    decoded = time.thread_time()
    boxes = [patch_boxes(image, params) for image in images]
    segmented = time.thread_time()
    for image, one in zip(images, boxes, strict=True):
        cut_patches(image, one, params.size)
    cut = time.thread_time()
    times = {"decode": decoded - start, "watershed": segmented - decoded, "cut": cut - segmented}
    return {name: round(seconds * 1000 / len(images), 2) for name, seconds in times.items()}


def measure_cutting(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Images a second, and CPU milliseconds an image of this process."""
    params, paths = PatchParams(size=args.size), _sample(args.images, args.n_images)

    def images() -> Iterator[Source]:
        return ((path.name, path.read_bytes) for _ in range(10) for path in paths)

    found: dict[str, dict[str, float]] = {}
    with ThreadPoolExecutor(args.threads, initializer=_use_one_thread) as pool:
        in_threads = cut_in_threads(images(), params, DEFAULT_LIMITS, pool, 4 * args.threads)
        in_processes = cut_in_processes(images(), params, DEFAULT_LIMITS, args.threads)
        for name, cut in (("threads", in_threads), ("processes", in_processes)):
            began = cpu = 0.0
            for number, _ in enumerate(cut):
                if number == 10:
                    began, cpu = time.perf_counter(), time.process_time()
            n, seconds, cpu = number - 10, time.perf_counter() - began, time.process_time() - cpu
            found[name] = {"images_per_s": round(n / seconds, 1), "own_cpu_ms_per_image": round(1000 * cpu / n, 2)}
    return found


def measure_growth(args: argparse.Namespace) -> list[dict[str, float]]:
    """Peak resident MiB and CPU seconds of fresh processes that extract 1, 10 and 100 times the images.

    exponent: of the time, from the size before to this one.
    """
    found: list[dict[str, float]] = []
    environment = {**os.environ, **COMPUTE_ENVIRONMENT}
    for n_images in (args.growth_images, 10 * args.growth_images, 100 * args.growth_images):
        command = [sys.executable, __file__, "--growth-of", str(n_images), "--images", str(args.images)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        peak, seconds = (float(field) for field in done.stdout.split())
        one = {"images": n_images, "peak_rss_mib": round(peak), "cpu_s": round(seconds, 2)}
        if found:
            one["exponent"] = round(exponent(seconds, n_images, found[-1]["cpu_s"], found[-1]["images"]), 3)
        found.append(one)
    return found


def print_growth(args: argparse.Namespace) -> None:
    """Extracts with the small network, which leaves the pipeline's own time and memory in view."""
    backbone = create_backbone("small_cnn", weights=None)
    paths = _sample(args.images, args.growth_of)
    images = ((str(number), paths[number % len(paths)].read_bytes) for number in range(args.growth_of))
    began = time.process_time()
    for _ in extract_features(images, backbone, PatchParams(size=96), n_threads=args.threads):
        pass
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, time.process_time() - began)


def _sample(folder: Path, n: int) -> list[Path]:
    paths = sorted(folder.glob("*/*.jpg"))
    return paths[:: max(1, len(paths) // n)][:n]


def _cut(path: Path, params: PatchParams) -> torch.Tensor:
    image = decode_image(path.read_bytes(), DEFAULT_LIMITS, target_side=decoded_side(params))
    return cut_patches(image, patch_boxes(image, params), params.size)


def _run_streams(backbone: Backbone, patches: torch.Tensor, n_threads: int) -> int:
    before = torch.get_num_threads()
    parts = [patches[start : start + backbone.max_batch] for start in range(0, len(patches), backbone.max_batch)]
    with ThreadPoolExecutor(n_threads, initializer=_use_one_thread) as pool:
        n = sum(len(rows) for rows in pool.map(backbone.features, parts))
    torch.set_num_threads(before)
    return n


def _use_one_thread() -> None:
    torch.get_num_threads()
    torch.set_num_threads(1)


def _run_pipeline(backbone: Backbone, paths: list[Path], params: PatchParams, n_threads: int) -> int:
    images = ((path.name, path.read_bytes) for path in paths)
    results = extract_features(images, backbone, params, n_threads=n_threads)
    return sum(len(result.features) for result in results if isinstance(result, ImageFeatures))


def _timed(part: Callable[[], int]) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    n = part()
    return {
        "patches_per_s": n / (time.perf_counter() - wall),
        "cpu_ms_per_patch": 1000 * (time.process_time() - cpu) / n,
    }


def _median(rounds: list[dict[str, dict[str, float]]], part: str, what: str) -> float:
    return round(statistics.median(one[part][what] for one in rounds), 2)


def _ratio(rounds: list[dict[str, dict[str, float]]], raw: str) -> dict[str, float]:
    ratios = sorted(one["pipeline"]["patches_per_s"] / one[raw]["patches_per_s"] for one in rounds)
    return {
        "median": round(statistics.median(ratios), 3),
        "lowest": round(ratios[0], 3),
        "highest": round(ratios[-1], 3),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=CREATURES / "images")
    parser.add_argument("--backbone", default="mobilenet_v2")
    parser.add_argument("--weights", type=Path, help="a .pth or .safetensors file; untrained otherwise (same speed)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--size", type=int, default=224, help="side of a patch in pixels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--n-images", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--growth-images", type=int, default=60, help="and 10 and 100 times as many; 0: leave growth out"
    )
    parser.add_argument("--growth-of", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.growth_of:
        print_growth(args)
        return
    result = {**measure_throughput(args), "prepare_cpu_ms_per_image": measure_stages(args)}
    result["cutting"] = measure_cutting(args)
    if args.growth_images:
        result["growth"] = measure_growth(args)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
