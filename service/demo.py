"""`unseen demo`: the whole service, used from outside as anybody would: photos in, embeddings and predictions out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from models.data.folders import FolderScan, scan_folder
from service.cli_output import (
    console,
    contributions,
    duration,
    readable,
    share,
    show_contributions,
    show_embedding_set,
    show_named_lists,
)
from service.client import Client, UnseenError
from service.client_http import Json
from service.steps import EmbedOptions, Network, add_knowledge, build, private_service, train, upload

CREATURES = Path(__file__).resolve().parents[1] / "examples" / "creatures"
TOP_K = 3


@dataclass(frozen=True)
class Plan:
    """What the demo runs on. `live`: an unseen class that is added only after the embeddings were built."""

    folder: Path
    knowledge: Path
    network: Network
    seen: tuple[str, ...]
    unseen: tuple[str, ...]
    live: str | None
    photos: dict[str, Path]
    params: Json
    classifier_params: Json
    image_size: int | None


def plan_demo(
    folder: Path | None,
    *,
    knowledge: Path | None = None,
    weights: str | None = None,
    backbone: str | None = None,
    unseen: Sequence[str] = (),
    fast: bool = False,
) -> Plan:
    """Everything decided before anything is started; UnseenError says what is missing."""
    folder = folder or CREATURES
    if folder == CREATURES and not folder.is_dir():
        raise UnseenError(f"The demo's pictures are not at {folder}; run it from a checkout, or give --data DIR.")
    scan = scan_folder(folder)
    without_photos = tuple(unseen) or scan.unseen_classes or ()
    if not without_photos:
        raise UnseenError("Which classes shall stay unseen? Give --unseen a,b,c, or a splits.json beside the images.")
    seen = tuple(n for n in (scan.seen_classes or scan.class_names) if n not in set(without_photos))
    empty = [name for name in seen if name not in set(scan.class_names)]
    if empty:
        raise UnseenError(
            f"{folder} holds no photos of {len(empty)} classes that it shall learn from, {empty[0]!r} first."
        )
    network = Network(backbone, weights or "scratch")
    if network.name is None:
        raise UnseenError(f"Which network are {Path(weights or '').name} the weights of? Say it with --backbone.")
    params = demo_params(network, scan, set(without_photos), fast=fast)
    return Plan(
        folder=folder,
        knowledge=knowledge or find_knowledge(folder),
        network=network,
        seen=seen,
        unseen=without_photos,
        live=without_photos[-1] if len(without_photos) > 2 else None,
        photos=first_photos(scan, without_photos),
        params=params,
        classifier_params={"epochs": 10, "early_stopping": False} if fast else {},
        image_size=96 if network.name == "small_cnn" else None,
    )


def demo_params(network: Network, scan: FolderScan, unseen: set[str], *, fast: bool) -> Json:
    """The service's defaults, but for small patches, which suit the small network; `fast`: as little as works."""
    params: Json = {"backbone": network.params(), "patches": {}, "clustering": {}}
    if network.name == "small_cnn":
        params["patches"] = {"size": 48}
    validation = [name for name in scan.validation_classes or () if name not in unseen]
    if validation:
        params["validation_classes"] = validation
    if fast:
        params["patches"] |= {"size": 32, "n_patches": 2}
        params["clustering"] |= {"n_clusters": 16, "epochs": 2, "early_stopping": False}
    return params


def find_knowledge(folder: Path) -> Path:
    """The table beside the images: attributes, which tell most, before vectors of the classes' names."""
    found = sorted(folder.glob("knowledge/*.npz"))
    if not found:
        raise UnseenError(f"{folder} holds no knowledge/*.npz; give a file of word or class vectors with --knowledge.")
    return next((path for path in found if path.stem == "attributes"), found[0])


def first_photos(scan: FolderScan, classes: Sequence[str]) -> dict[str, Path]:
    """One photo of each class that has any: the first, as they come."""
    photos: dict[str, Path] = {}
    for image in scan.images:
        photos.setdefault(image.class_name, image.path)
    return {name: photos[name] for name in classes if name in photos}


def run(plan: Plan, data_dir: Path, *, keep: bool = False) -> None:
    """The demo, start to end; the service is stopped at its end, or with Ctrl-C if `keep`."""
    began = time.monotonic()
    with private_service(data_dir, plan.network.weights_dir) as (service, client):
        console.print(f"The service runs at [bold]{service.url}[/]. From here on, all goes over REST.\n")
        started = time.monotonic()
        play(client, plan)
        took, waited = time.monotonic() - started, started - began
        console.print(f"\nDone in {duration(took)}, after {duration(waited)} of starting the service.")
        where = escape(str(data_dir))
        console.print(
            f"To keep a service running: [bold]make serve[/] (or [bold]unseen serve[/]). "
            f"With what you just saw: [bold]UNSEEN_DATA_DIR={where} make serve[/]",
            soft_wrap=True,
        )
        if keep:
            console.print(f"It goes on at {service.url} (docs: {service.url}/docs) until you press Ctrl-C.")
            wait_for_interrupt()


def play(client: Client, plan: Plan) -> None:
    """Photos and knowledge in; embeddings, a live class, classifiers, predictions and accuracy out."""
    dataset, report = upload(client, plan.folder, classes=[*plan.seen, *plan.unseen], test_classes=plan.unseen)
    console.print(
        f"{report.n_accepted + report.n_duplicates:,} photos of {len(report.class_names)} classes. Photos of "
        f"{len(plan.unseen)} classes are kept for the final test: no step before it sees them.\n"
    )
    knowledge_id = add_knowledge(client, str(plan.knowledge))
    at_first = [name for name in plan.unseen if name != plan.live]
    row = build(client, dataset["id"], knowledge_id, EmbedOptions(at_first, plan.seen, params=plan.params))
    console.print()
    show_embedding_set(row)
    console.print()
    show_contributions([c for c in client.classes(row["id"]) if not c["seen"]])
    if plan.live is not None:
        add_live(client, row["id"], plan.live)
    console.print()
    ours, raw = train_both(client, plan, dataset["id"], knowledge_id, row["id"])
    console.print()
    show_predictions(client, plan, ours["id"])
    console.print()
    show_accuracy(ours, raw, len(plan.unseen), plan.knowledge.stem)


def add_live(client: Client, set_id: str, name: str) -> None:
    """Adds a class that nobody mentioned before, and says how long that took."""
    started = time.perf_counter()
    added = client.add_classes(set_id, [name])[0]
    took_ms = 1000 * (time.perf_counter() - started)
    console.print(
        f"\nA new class, added live in {took_ms:.0f} ms: [bold]{escape(readable(name))}[/] = "
        f"{escape(', '.join(contributions(added['provenance'])))}",
        soft_wrap=True,
    )


def train_both(client: Client, plan: Plan, dataset_id: str, knowledge_id: str, set_id: str) -> tuple[Json, Json]:
    """The same classifier on our embeddings and on the knowledge vectors as they are."""
    common: dict[str, Any] = {
        "method": "sje",
        "params": plan.classifier_params,
        "seen_classes": list(plan.seen),
        "unseen_classes": list(plan.unseen),
        "evaluate": True,
    }
    if "validation_classes" in plan.params:
        common["validation_classes"] = plan.params["validation_classes"]
    if plan.image_size:
        common["image_size"] = plan.image_size
    ours = train(client, "Classifier on class embeddings", dataset_id, embedding_set_id=set_id, **common)
    raw = train(
        client,
        "Classifier on raw knowledge",
        dataset_id,
        knowledge_id=knowledge_id,
        backbone=plan.network.params(),
        **common,
    )
    return ours, raw


def show_predictions(client: Client, plan: Plan, classifier_id: str) -> None:
    """The best guesses for one photo of each unseen class, the right answer beside them."""
    names = list(plan.photos)
    photos = [plan.photos[name] for name in names]
    answer = client.classify(photos, classifier_id=classifier_id, scope="unseen", top_k=TOP_K)
    rows = []
    for name, row in zip(names, answer["data"], strict=True):
        is_right = bool(row["predictions"]) and row["predictions"][0]["label"] == name
        guesses = [f"{p['score']:.2f} {readable(p['label'])}" for p in row["predictions"]]
        rows.append(("[green]✓[/]" if is_right else "[red]✗[/]", name, guesses or [str(row["error"])]))
    n_right = sum("green" in mark for mark, _, _ in rows)
    title = f"One photo of each unseen class: {n_right} of {len(rows)} recognised among the unseen classes"
    show_named_lists(title, ("right answer", f"best {TOP_K} guesses"), rows)


def show_accuracy(ours: Json, raw: Json, n_unseen: int, knowledge: str) -> None:
    """Accuracy against chance and against the knowledge vectors as they are."""
    table = Table(title="Accuracy on photos that no step has seen", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for title in ("T1 unseen", "U", "S", "H"):
        table.add_column(title, justify="right")
    table.add_row("chance", share(1 / n_unseen), "", "", "")
    for title, row in ((f"raw knowledge vectors ({knowledge})", raw), ("[bold]Unseen's class embeddings[/]", ours)):
        zsl, gzsl = row["metrics"].get("zsl") or {}, row["metrics"].get("gzsl") or {}
        table.add_row(title, share(zsl.get("t1")), *(share(gzsl.get(part)) for part in ("u", "s", "h")))
    console.print(table)
    console.print(
        "[dim]T1: unseen photos among the unseen classes. U, S: unseen and seen photos among all classes; "
        "H: their harmonic mean. Each is the mean over classes.[/]",
        soft_wrap=True,
    )


def wait_for_interrupt() -> None:
    """Returns after Ctrl-C."""
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        console.print("\nStopping.")
