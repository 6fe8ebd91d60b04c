"""Exports read back by what their users read them with."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import scipy.io
from safetensors.numpy import load as load_safetensors

from service.core.tables import EmbeddingSet
from service.export import EXPORTERS
from tests.service.harness import LiveApi, problem

NAMES = ["cat", "北极熊", 'comma, "quote"', "zebra"]
SEEN = [True, True, True, False]
VECTORS = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)


@pytest.fixture(scope="module")
def set_id(live_api: LiveApi) -> str:
    """A set with odd names, one unseen class, and the splits that its job would write."""
    set_id = live_api.embedding_set(dict(zip(NAMES, VECTORS, strict=True)), unseen=("zebra",), name="odd names")
    out = io.BytesIO()
    np.savez(
        out,
        image_files=np.array(["cat/a.jpg", "zebra/b.jpg"]),
        labels=np.array([1, 4]),
        trainval_loc=np.array([1]),
        test_unseen_loc=np.array([2]),
    )
    with live_api.parts.database.write() as session:
        row = session.get_one(EmbeddingSet, set_id)
        row.artifacts = {"splits.npz": live_api.parts.store.put_bytes(out.getvalue())}
    return set_id


def export(api: LiveApi, set_id: str, name: str) -> io.BytesIO:
    response = api.client.get(f"/v1/embedding-sets/{set_id}/export?format={name}")
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith(EXPORTERS[name].media_type)
    assert response.headers["content-disposition"] == f'attachment; filename="{set_id}.{name}"'
    return io.BytesIO(response.content)


def test_npz(live_api: LiveApi, set_id: str) -> None:
    with np.load(export(live_api, set_id, "npz"), allow_pickle=False) as arrays:
        assert arrays["class_names"].tolist() == NAMES
        assert arrays["seen"].tolist() == SEEN
        assert np.array_equal(arrays["vectors"], VECTORS)
        assert json.loads(str(arrays["about"]))["id"] == set_id


def test_mat_as_xlsa17_code_reads_it(live_api: LiveApi, set_id: str) -> None:
    content = scipy.io.loadmat(export(live_api, set_id, "mat"))
    assert content["att"].shape == (5, 4)
    assert np.allclose(np.linalg.norm(content["att"], axis=0), 1)
    assert np.array_equal(content["original_att"].T.astype(np.float32), VECTORS)
    assert [str(cell[0][0]) for cell in content["allclasses_names"]] == NAMES
    assert content["seen_classes"].ravel().tolist() == [1, 2, 3]
    assert content["unseen_classes"].ravel().tolist() == [4]
    assert content["trainval_loc"].squeeze(1).tolist() == [1]
    assert content["labels"].squeeze(1).tolist() == [1, 4]
    assert [str(cell[0][0]) for cell in content["image_files"]] == ["cat/a.jpg", "zebra/b.jpg"]


def test_csv(live_api: LiveApi, set_id: str) -> None:
    rows = list(csv.reader(io.StringIO(export(live_api, set_id, "csv").read().decode())))
    assert rows[0] == ["class_name", "seen", "v0", "v1", "v2", "v3", "v4"]
    assert [row[0] for row in rows[1:]] == NAMES
    assert [row[1] == "true" for row in rows[1:]] == SEEN
    assert np.array_equal(np.array([row[2:] for row in rows[1:]], np.float32), VECTORS)


def test_parquet(live_api: LiveApi, set_id: str) -> None:
    table = pyarrow.parquet.read_table(export(live_api, set_id, "parquet"))
    assert table["class_name"].to_pylist() == NAMES
    assert table["seen"].to_pylist() == SEEN
    assert np.array_equal(np.array(table["embedding"].to_pylist(), np.float32), VECTORS)
    assert json.loads(table.schema.metadata[b"unseen"])["name"] == "odd names"


def test_safetensors(live_api: LiveApi, set_id: str) -> None:
    raw = export(live_api, set_id, "safetensors").read()
    tensors: dict[str, Any] = load_safetensors(raw)
    assert np.array_equal(tensors["vectors"], VECTORS)
    assert tensors["seen"].tolist() == SEEN
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert json.loads(header["__metadata__"]["class_names"]) == NAMES


def test_a_set_without_splits_and_an_unknown_format(live_api: LiveApi, set_id: str) -> None:
    plain = live_api.embedding_set({"cat": VECTORS[0], "dog": np.zeros(5)})
    content = scipy.io.loadmat(export(live_api, plain, "mat"))
    assert "trainval_loc" not in content
    assert np.array_equal(content["att"][:, 1], np.zeros(5))
    problem(live_api.client.get(f"/v1/embedding-sets/{set_id}/export?format=xls"), 422, "'safetensors'")
    problem(live_api.client.get("/v1/embedding-sets/es_x/export"), 404, "es_x")
