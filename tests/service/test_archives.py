"""Archives and feature files from POST to the job's report."""

from __future__ import annotations

import io
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from service.schemas import JobOut
from tests.service.harness import LiveApi, checked, png, problem
from tests.service.tasks import finish


def zipped(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def tarred(files: dict[str, bytes], *links: tuple[str, str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, target, kind in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
    return out.getvalue()


def post(api: LiveApi, dataset_id: str, data: bytes, content_type: str = "application/zip") -> httpx.Response:
    return api.client.post(f"/v1/datasets/{dataset_id}/archive", content=data, headers={"content-type": content_type})


def imported(api: LiveApi, dataset_id: str, data: bytes, content_type: str = "application/zip") -> dict[str, Any]:
    response = post(api, dataset_id, data, content_type)
    job = checked(response, JobOut, 202)
    assert response.headers["location"] == f"/v1/jobs/{job['id']}"
    assert job["resource"] == {"kind": "dataset", "id": dataset_id, "href": f"/v1/datasets/{dataset_id}"}
    return finish(api, job["id"])


def test_an_archive_becomes_images_and_a_report(live_api: LiveApi) -> None:
    dataset_id = live_api.dataset()
    files = {f"{name}/{i}.png": png(i + 10 * k) for k, name in enumerate(("cat", "dog")) for i in range(3)}
    files |= {"cat/again.png": png(0), "dog/broken.png": png(99)[:60], "dog/notes.txt": b"hello"}
    job = imported(live_api, dataset_id, zipped(files))
    assert job["status"] == "succeeded", job["error"]
    result, progress = job["result"], job["progress"]
    assert progress["completed"] == progress["total"]
    assert progress["metrics"]["accepted"] == 6
    assert (result["n_accepted"], result["n_duplicates"], result["n_rejected"]) == (6, 1, len(result["rejected"]))
    reasons = {entry["filename"]: entry["reason"] for entry in result["rejected"]}
    assert "dog/broken.png" in reasons
    assert live_api.client.get(f"/v1/datasets/{dataset_id}").json()["n_images"] == 6
    assert live_api.snapshot()["scratch"] == []


def test_the_images_of_an_archive_are_written_together_before_any_is_recorded(
    live_api: LiveApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset_id, backend = live_api.dataset(), live_api.parts.store._backend
    job_id = post(live_api, dataset_id, zipped({f"cat/{i}.png": png(i + 800) for i in range(9)})).json()["id"]
    write_many, written = backend.write_many, []

    def watched(contents: dict[str, bytes]) -> None:
        write_many(contents)
        written.append((len(contents), live_api.client.get(f"/v1/datasets/{dataset_id}").json()["n_images"]))

    monkeypatch.setattr(backend, "write_many", watched)
    assert finish(live_api, job_id)["result"]["n_accepted"] == 9
    assert written == [(9, 0)]


def test_the_same_archive_as_a_form_and_again_changes_nothing(live_api: LiveApi) -> None:
    dataset_id = live_api.dataset()
    data = zipped({"cat/1.png": png(1), "dog/2.png": png(2)})
    assert imported(live_api, dataset_id, data)["result"]["n_accepted"] == 2
    response = live_api.client.post(f"/v1/datasets/{dataset_id}/archive", files={"file": ("a.zip", data)})
    again = finish(live_api, response.json()["id"])["result"]
    assert (again["n_accepted"], again["n_duplicates"]) == (0, 2)


def test_classes_lose_spaces_around_their_names(live_api: LiveApi) -> None:
    dataset_id = live_api.dataset()
    data = zipped({"zebra /1.png": png(1), "zebra /2.png": png(2), "zebra/3.png": png(1)})
    result = imported(live_api, dataset_id, data)["result"]
    assert (result["n_accepted"], result["n_duplicates"], result["n_rejected"]) == (2, 1, 0)
    (row,) = live_api.client.get(f"/v1/datasets/{dataset_id}/classes").json()["data"]
    assert (row["class_name"], row["n_images"]) == ("zebra", 2)


def test_an_image_that_is_there_in_another_class_is_rejected_and_no_duplicate(live_api: LiveApi) -> None:
    dataset_id = live_api.dataset()
    imported(live_api, dataset_id, zipped({"cat/1.png": png(1), "dog/2.png": png(2)}))
    result = imported(live_api, dataset_id, zipped({"cat/1.png": png(1), "cow/2.png": png(2)}))["result"]
    assert (result["n_accepted"], result["n_duplicates"], result["n_rejected"]) == (0, 1, 1)


def test_a_large_form_needs_no_other_disk_than_the_data_directory(
    live_api: LiveApi, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    dataset_id = live_api.dataset()
    data = zipped({"cat/1.png": png(91, 1000)})
    assert len(data) > 2 * 2**20
    response = live_api.client.post(f"/v1/datasets/{dataset_id}/archive", files={"file": ("a.zip", data)})
    assert finish(live_api, checked(response, JobOut, 202)["id"])["result"]["n_accepted"] == 1
    assert live_api.snapshot()["scratch"] == []


def test_hostile_entries_are_reported_and_the_rest_comes_in(live_api: LiveApi) -> None:
    dataset_id = live_api.dataset()
    good = {"cat/1.png": png(31), "dog/2.png": png(32)}
    hostile = {
        "../../evil.png": png(33),
        "cat/../../evil.png": png(34),
        "/etc/evil.png": png(35),
        "cat/inner.zip": zipped({"x.png": png(36)}),
    }
    links = (("cat/link.png", "/etc/passwd", tarfile.SYMTYPE), ("cat/hard.png", "cat/1.png", tarfile.LNKTYPE))
    job = imported(live_api, dataset_id, tarred(good | hostile, *links), "application/gzip")
    assert job["status"] == "succeeded", job["error"]
    assert job["result"]["n_accepted"] == 2
    reasons = " | ".join(f"{entry['filename']}: {entry['reason']}" for entry in job["result"]["rejected"])
    assert job["result"]["n_rejected"] == 6, reasons
    for words in ("archive in the archive", "link"):
        assert words in reasons
    assert not list(live_api.settings.data_dir.rglob("evil.png"))
    assert live_api.client.get(f"/v1/datasets/{dataset_id}").json()["n_classes"] == 2


BOMB = zipped({"cat/1.png": b"\0" * 100_000_000})


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lambda: b"neither zip nor tar" * 9, "zip or tar"),
        (lambda: zipped({"cat/1.png": png(1)})[:-30], "damaged"),
        (lambda: zipped({}), "no files"),
        (lambda: BOMB, "unpack"),
        (lambda: zipped({f"c/{i}": b"" for i in range(60)}), "more than 50 entries"),
        (lambda: zipped({"cat/1.txt": b"text"}), "1.txt"),
    ],
    ids=["no archive", "cut off", "empty", "ratio", "entries", "no image"],
)
def test_hopeless_archives_fail_the_job_with_a_reason(
    start_api: Callable[..., LiveApi], data: Callable[[], bytes], words: str
) -> None:
    api = start_api(max_archive_entries=50)
    dataset_id = api.dataset()
    job = imported(api, dataset_id, data())
    assert job["status"] == "failed"
    assert words.lower() in job["error"]["detail"].lower(), job["error"]
    assert job["error"]["status"] == 422
    snapshot = api.snapshot()
    assert (snapshot["rows"]["images"], snapshot["scratch"]) == (0, [])


def test_a_million_entries_are_refused_in_little_time(live_api: LiveApi) -> None:
    entry = b"PK\x01\x02" + b"\0" * 42
    n = 1_000_001
    directory = (entry[:28] + (1).to_bytes(2, "little") + entry[30:] + b"a") * n
    end64 = (
        b"PK\x06\x06" + (44).to_bytes(8, "little") + b"\x2d\0\x2d\0" + b"\0" * 8 + n.to_bytes(8, "little") * 2
        + len(directory).to_bytes(8, "little") + (0).to_bytes(8, "little")
    )  # fmt: skip
    locator = b"PK\x06\x07" + b"\0" * 4 + len(directory).to_bytes(8, "little") + (1).to_bytes(4, "little")
    end = b"PK\x05\x06" + b"\0" * 4 + b"\xff" * 12 + b"\0\0"
    job = imported(live_api, live_api.dataset(), b"PK\x03\x04" + b"\0" * 26 + directory + end64 + locator + end)
    assert job["status"] == "failed"
    assert "1,000,000 entries" in job["error"]["detail"] or "damaged" in job["error"]["detail"]


def test_an_empty_archive_is_refused_at_once(live_api: LiveApi) -> None:
    before = live_api.snapshot()
    problem(post(live_api, live_api.dataset(), b""), 422, "empty (0 bytes)")
    after = live_api.snapshot()
    assert (after["rows"]["jobs"], after["artifacts"]) == (before["rows"]["jobs"], before["artifacts"])


def test_a_form_with_two_archives(live_api: LiveApi) -> None:
    files = [("file", ("a.zip", b"x")), ("file", ("b.zip", b"y"))]
    response = live_api.client.post(f"/v1/datasets/{live_api.dataset()}/archive", files=files)
    problem(response, 422, "exactly one archive", "2 found")


def test_features_fill_an_empty_dataset(live_api: LiveApi) -> None:
    out = io.BytesIO()
    features = np.arange(24, dtype=np.float32).reshape(6, 4)
    names = np.array(["cat", "cat", "dog", "dog", "zebra", "zebra"])
    train, test_seen, test_unseen = np.array([0, 2]), np.array([1, 3]), np.array([4, 5])
    np.savez(
        out,
        features=features,
        labels=names,
        train_rows=train,
        test_seen_rows=test_seen,
        test_unseen_rows=test_unseen,
    )
    dataset_id = live_api.dataset()
    url = f"/v1/datasets/{dataset_id}/features"
    job = finish(live_api, live_api.client.post(url, files={"features": ("f.npz", out.getvalue())}).json()["id"])
    assert job["status"] == "succeeded", job["error"]
    dataset = live_api.client.get(f"/v1/datasets/{dataset_id}").json()
    assert (dataset["kind"], dataset["n_images"], dataset["n_classes"]) == ("features", 6, 3)
    problem(post(live_api, dataset_id, zipped({})), 409, "holds features")
    problem(live_api.client.post(url, files={"features": ("f.npz", out.getvalue())}), 409, "not empty")


def test_a_feature_file_that_is_none_fails_the_job(live_api: LiveApi) -> None:
    dataset_id = live_api.dataset()
    response = live_api.client.post(f"/v1/datasets/{dataset_id}/features", files={"features": ("f.npz", b"junk")})
    job = finish(live_api, response.json()["id"])
    assert (job["status"], job["error"]["status"]) == ("failed", 422)
    assert live_api.client.get(f"/v1/datasets/{dataset_id}").json()["kind"] == "images"
