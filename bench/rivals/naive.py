"""What one writes first: FastAPI, one image a request through the network in the framework's thread pool.

THREADS=2 WEIGHTS=FILE PORT=9001 python bench/rivals/naive.py
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import uvicorn
from fastapi import Depends, FastAPI, Request

sys.path.insert(0, str(Path(__file__).parent))
from common import decode, features, load_network

app = FastAPI()
network = load_network()


async def body(request: Request) -> bytes:
    """The image file."""
    return await request.body()


@app.get("/health")
def health() -> str:
    """It answers."""
    return "ok"


@app.post("/predict")
def predict(data: bytes = Depends(body)) -> list[float]:
    """The first features of an image."""
    return features(network, decode(data)[None])[0]


if __name__ == "__main__":
    uvicorn.run(app, port=int(os.environ["PORT"]), log_level="error")
