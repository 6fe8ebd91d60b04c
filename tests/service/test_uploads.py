"""Images over HTTP: what is accepted, what is refused, and that nothing is left half-written."""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
import time
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image as Picture

from service.core.artifacts import image_key
from service.schemas import UploadOut
from tests.service.harness import LiveApi, checked, encoded, png, problem


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that claims to have so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 500)) + chunk(b"IEND", b"")
    )


def corrupt(data: bytes) -> bytes:
    """The file with its middle overwritten."""
    middle = len(data) // 2
    return data[: middle - 40] + b"\xff" * 80 + data[middle + 40 :]


def upload(api: LiveApi, dataset_id: str, files: list[tuple[str, bytes]], **fields: Any) -> Any:
    form = [("files", file) for file in files]
    return api.client.post(f"/v1/datasets/{dataset_id}/images", files=form, data=fields)


def test_one_bad_file_of_each_kind_among_good_ones(live_api: LiveApi) -> None:
    photo = encoded(Picture.effect_noise((64, 64), 60).convert("RGB"), "JPEG")
    bad = {
        "corrupt.png": (corrupt(png(3, 64)), "corrupt"),
        "truncated.jpg": (photo[: len(photo) // 2], "truncated"),
        "empty.jpg": (b"", "empty (0 bytes)"),
        "page.jpg": (b"<html></html>", "text document"),
        "noise.png": (b"\x01\x02\x03" * 50, "not an image"),
        "archive.jpg": (b"PK\x03\x04" + b"\0" * 40, "ZIP archive"),
        "bomb.png": (bomb(60_000, 60_000), "at most 64 million"),
        "large.png": (bomb(10_000, 10_000), "100.0 million"),
    }
    good = {"right.png": png(1), "wrong-extension.txt": encoded(Picture.new("RGB", (5, 7), "red"), "JPEG")}
    dataset_id = live_api.dataset()
    before = live_api.snapshot()
    files = [(name, data) for name, (data, _) in bad.items()] + list(good.items())
    out = checked(upload(live_api, dataset_id, files, class_name="cat"), UploadOut)
    assert [entry["filename"] for entry in out["accepted"]] == list(good)
    assert (out["accepted"][1]["width"], out["accepted"][1]["height"]) == (5, 7)
    reasons = {entry["filename"]: entry["reason"] for entry in out["rejected"]}
    assert set(reasons) == set(bad)
    for name, (_, words) in bad.items():
        assert words in reasons[name], reasons[name]
    after = live_api.snapshot()
    assert after["rows"]["images"] == before["rows"]["images"] + 2
    assert set(after["artifacts"]) - set(before["artifacts"]) == {image_key(a["sha256"]) for a in out["accepted"]}
    assert after["scratch"] == []


def test_the_same_content_is_accepted_once(live_api: LiveApi) -> None:
    dataset_id = live_api.dataset()
    twice = upload(live_api, dataset_id, [("a.png", png(5)), ("b.png", png(5))], class_name="cat").json()["accepted"]
    assert [entry["duplicate"] for entry in twice] == [False, True]
    assert twice[0]["image_id"] == twice[1]["image_id"]
    again = upload(live_api, dataset_id, [("a.png", png(5))], class_name="cat").json()["accepted"]
    assert again[0]["image_id"] == twice[0]["image_id"]
    other = upload(live_api, dataset_id, [("a.png", png(5))], class_name="dog").json()
    assert other["accepted"] == []
    assert "as 'cat'" in other["rejected"][0]["reason"]
    assert live_api.client.get(f"/v1/datasets/{dataset_id}").json()["n_images"] == 1


def test_labels_by_name_and_in_order(live_api: LiveApi) -> None:
    dataset_id = live_api.dataset()
    files = [("a.png", png(1)), ("b.png", png(2)), ("c.png", png(3))]
    by_name = upload(live_api, dataset_id, files, class_name=" dog ", labels='{"b.png": "cat"}', split="test").json()
    assert [entry["class_name"] for entry in by_name["accepted"]] == ["dog", "cat", "dog"]
    same_names = [("x.png", png(4)), ("x.png", png(5))]
    in_order = upload(live_api, dataset_id, same_names, labels='["cat", "zebra"]').json()
    assert [entry["class_name"] for entry in in_order["accepted"]] == ["cat", "zebra"]
    images = live_api.client.get(f"/v1/datasets/{dataset_id}/images").json()["data"]
    assert [image["split"] for image in images] == [None, None, "test", "test", "test"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "which class"),
        ({"class_name": ""}, "is empty"),
        ({"class_name": "x" * 300}, "at most 256"),
        ({"class_name": "a\x1bb"}, "control character U+001B"),
        ({"class_name": "---"}, "separators only"),
        ({"labels": "{"}, "no valid JSON"),
        ({"labels": "3"}, "JSON object"),
        ({"labels": '["cat"]'}, "1 classes for 2 files"),
        ({"labels": '["cat", 5]'}, "list of class names"),
        ({"labels": '["polar bear", "Polar_Bear"]'}, "same name"),
        ({"labels": '{"nope.png": "cat"}'}, "'nope.png', which is not among"),
        ({"labels": '{"1.png": "cat"}'}, "No class is given for '2.png'"),
        ({"class_name": "cat", "split": "dev"}, "'train' or 'test', not 'dev'"),
        ({"class_name": "CAT"}, "spelled 'cat'"),
    ],
)
def test_bad_labels_store_nothing(live_api: LiveApi, fields: dict[str, str], words: str) -> None:
    dataset_id = live_api.filled_dataset({"cat": 1})
    before = live_api.snapshot()
    problem(upload(live_api, dataset_id, [("1.png", png(901)), ("2.png", png(902))], **fields), 422, words)
    assert live_api.snapshot() == before


def test_names_in_any_script(live_api: LiveApi) -> None:
    dataset_id = live_api.dataset()
    names = ["北极熊", "ours polaire", "👩‍🚀", "Ælurus/fulgens"]
    files = [(f"{i}.png", png(i + 50)) for i in range(len(names))]
    assert len(upload(live_api, dataset_id, files, labels=json.dumps(names)).json()["accepted"]) == len(names)
    pages, cursor = [], None
    while True:
        query = {"limit": 1} | ({"cursor": cursor} if cursor else {})
        page = live_api.client.get(f"/v1/datasets/{dataset_id}/classes", params=query).json()
        pages += [entry["class_name"] for entry in page["data"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert pages == sorted(names)


@pytest.mark.parametrize("path", ["images", "archive", "features"])
def test_unknown_datasets_and_kinds_of_ids(live_api: LiveApi, path: str) -> None:
    for bad_id in ("ds_nope", live_api.knowledge()):
        response = live_api.client.post(f"/v1/datasets/{bad_id}/{path}", files={"files": ("a.png", png(1))})
        problem(response, 404, bad_id)


@pytest.mark.parametrize("path", ["images", "features", "archive"])
def test_wrong_content_types(live_api: LiveApi, path: str) -> None:
    url = f"/v1/datasets/{live_api.dataset()}/{path}"
    before = live_api.snapshot()
    for headers in ({"content-type": "text/plain"}, {}):
        problem(
            live_api.client.post(url, content=b"abc", headers=headers),
            415,
            "multipart" if path != "archive" else "application/zip",
        )
    assert live_api.snapshot() == before


@pytest.mark.parametrize(
    ("headers", "body", "words"),
    [
        ({"content-type": "multipart/form-data"}, b"abc", "boundary"),
        ({"content-type": "multipart/form-data; boundary=B"}, b"no boundary here", "malformed"),
        (
            {"content-type": "multipart/form-data; boundary=B"},
            b"--B\r\nContent-Disposition: form-data\r\n\r\nx\r\n--B--",
            "name",
        ),
        ({"content-type": "multipart/form-data; boundary=B"}, b"--B--\r\n", "holds no files"),
        ({"content-type": "multipart/form-data; boundary=B"}, b"", "closing boundary"),
    ],
)
def test_malformed_multipart(live_api: LiveApi, headers: dict[str, str], body: bytes, words: str) -> None:
    url = f"/v1/datasets/{live_api.dataset()}/images"
    before = live_api.snapshot()
    problem(live_api.client.post(url, content=body, headers=headers), 422, words)
    assert live_api.snapshot() == before


def test_a_form_that_ends_early_stores_nothing(live_api: LiveApi) -> None:
    request = live_api.client.build_request(
        "POST", "/", files=[("files", (f"{i}.png", png(i + 800))) for i in range(3)], data={"class_name": "cat"}
    )
    whole = request.read()
    dataset_id = live_api.dataset()
    before = live_api.snapshot()
    for cut in (len(whole) // 3, len(whole) - 10):
        response = live_api.client.post(
            f"/v1/datasets/{dataset_id}/images",
            content=whole[:cut],
            headers={"content-type": request.headers["content-type"]},
        )
        problem(response, 422, "closing boundary")
    assert live_api.snapshot() == before


def test_forms_in_other_encodings_are_refused(live_api: LiveApi) -> None:
    url = f"/v1/datasets/{live_api.dataset()}/images"
    body = b'--B\r\nContent-Disposition: form-data; name="class_name"\r\n\r\nn\xe9\r\n--B--'
    for charset in ("punycode", "undefined", "unicode_escape", "nonsense"):
        headers = {"content-type": f"multipart/form-data; boundary=B; charset={charset}"}
        problem(live_api.client.post(url, content=body, headers=headers), 415, "UTF-8", charset)
    for charset in ("UTF-8", "utf8", "us-ascii", "iso-8859-1"):
        headers = {"content-type": f"multipart/form-data; boundary=B; charset={charset}"}
        problem(live_api.client.post(url, content=body, headers=headers), 422, "no files")


def gone_mid_upload(api: LiveApi, path: str, content_type: str, sent: bytes, extra: str = "") -> None:
    """Announces a long body, sends a part and hangs up."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {content_type}\r\nContent-Length: 9000000\r\n{extra}\r\n"
    with socket.create_connection(("127.0.0.1", api.port)) as connection:
        connection.sendall(head.encode() + sent)
        time.sleep(0.1)


@pytest.mark.parametrize("kind", ["images", "archive", "raw archive", "knowledge"])
def test_a_client_that_is_gone_mid_upload_leaves_nothing(live_api: LiveApi, kind: str) -> None:
    dataset_id = live_api.dataset()
    paths = {"images": f"/v1/datasets/{dataset_id}/images", "knowledge": "/v1/knowledge"}
    path = paths.get(kind, f"/v1/datasets/{dataset_id}/archive")
    part = (
        b'--B\r\nContent-Disposition: form-data; name="class_name"\r\n\r\ncat\r\n--B\r\n'
        b'Content-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + png(1) + b"\r\n--B\r\n"
    ) + b"x" * 2_000_000
    content_type = "application/zip" if kind == "raw archive" else "multipart/form-data; boundary=B"
    before = live_api.snapshot()
    gone_mid_upload(live_api, path, content_type, part)
    deadline = time.monotonic() + 10
    while live_api.snapshot() != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert live_api.snapshot() == before
    assert live_api.client.get("/healthz").status_code == 200


def test_a_full_store_answers_503_and_records_nothing(live_api: LiveApi, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset_id = live_api.dataset()
    before = live_api.snapshot()
    backend = live_api.parts.store._backend

    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(backend, "write_many", full)
    monkeypatch.setattr(backend, "take", full)
    uploads: tuple[Callable[[], Any], ...] = (
        lambda: upload(live_api, dataset_id, [("a.png", png(77))], class_name="cat"),
        lambda: live_api.client.post(
            f"/v1/datasets/{dataset_id}/archive", content=b"PK..", headers={"content-type": "application/zip"}
        ),
        lambda: live_api.client.post("/v1/knowledge", json={"name": "k", "vectors": {"cat": [1.0, 2.0]}}),
    )
    for attempt in uploads:
        response = attempt()
        problem(response, 503, "full", "free some space")
        assert int(response.headers["retry-after"]) > 0
    assert live_api.snapshot() == before


def test_a_scratch_folder_that_cannot_be_written_answers_503(start_api: Callable[..., LiveApi]) -> None:
    api = start_api(reconcile_s=1000)
    dataset_id = api.dataset()
    scratch = api.settings.scratch_dir
    scratch.rmdir()
    scratch.write_text("no folder")
    response = api.client.post(
        f"/v1/datasets/{dataset_id}/archive", content=b"PK", headers={"content-type": "application/zip"}
    )
    problem(response, 503, "disk full")
    scratch.unlink()
    scratch.mkdir()
    snapshot = api.snapshot()
    assert (snapshot["rows"]["jobs"], snapshot["artifacts"]) == (0, [])


@pytest.mark.parametrize("nth", [2, 5])
def test_a_disk_that_fails_at_any_flush_records_no_image(
    live_api: LiveApi, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    """Three images are at least five flushes: three files, then their folders."""
    dataset_id = live_api.dataset()
    flushes = iter(range(1, 100))

    def failing(descriptor: int) -> None:
        if next(flushes) == nth:
            raise OSError(errno.ENOSPC, "No space left on device")

    files = [(f"{i}.png", png(10 * i + nth)) for i in range(60, 63)]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        problem(upload(live_api, dataset_id, files, class_name="cat"), 503, "full")
    assert live_api.client.get(f"/v1/datasets/{dataset_id}").json()["n_images"] == 0
    assert len(upload(live_api, dataset_id, files, class_name="cat").json()["accepted"]) == 3


def test_feature_files_must_fit_together(live_api: LiveApi) -> None:
    dataset_id = live_api.dataset()
    url = f"/v1/datasets/{dataset_id}/features"
    problem(live_api.client.post(url, files={"res101": ("r.mat", b"x")}), 422, "'res101' and 'att_splits'")
    problem(live_api.client.post(url, files={"file": ("r.mat", b"x")}), 422, "no file")
    problem(live_api.client.post(url, files={"features": ("f.npz", b"")}), 422, "empty")
    twice = [("features", ("f.npz", b"x")), ("features", ("g.npz", b"y"))]
    problem(live_api.client.post(url, files=twice), 422, "one file")
    full = live_api.filled_dataset({"cat": 1})
    response = live_api.client.post(f"/v1/datasets/{full}/features", files={"features": ("f.npz", b"x")})
    problem(response, 409, "not empty")
