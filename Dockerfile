# syntax=docker/dockerfile:1
# Two images from one base: `api` (no torch, about 500 MB) and `worker` (torch; also runs the inference process).
#   docker build --target api -t unseen-api .
#   docker build --target worker -t unseen-worker .

FROM python:3.11-slim-bookworm AS base
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    VIRTUAL_ENV=/opt/unseen \
    PATH=/opt/unseen/bin:$PATH

# ---- dependencies are installed apart from the code, so that a change of code reuses them ----------
FROM base AS api-dependencies
WORKDIR /src
RUN python -m venv /opt/unseen
COPY pyproject.toml constraints.txt scripts/requirements.py ./
RUN python requirements.py postgres s3 parquet > requirements.txt \
    && pip install -c constraints.txt -r requirements.txt

FROM api-dependencies AS worker-dependencies
RUN python requirements.py torch openvino onnx text hdf5 postgres s3 parquet > requirements.txt \
    && pip install -c constraints.txt -r requirements.txt

FROM api-dependencies AS api-code
COPY . .
RUN pip install --no-deps .

FROM worker-dependencies AS worker-code
COPY . .
RUN pip install --no-deps .

# ---- what runs: no sources beside the installed package, not root ----------------------------------
FROM base AS runtime
RUN groupadd --gid 10001 unseen \
    && useradd --uid 10001 --gid unseen --no-create-home --home-dir /data unseen \
    && mkdir -p /data && chown unseen:unseen /data
ENV UNSEEN_DATA_DIR=/data
VOLUME /data
WORKDIR /data

FROM runtime AS api
COPY --from=api-code /opt/unseen /opt/unseen
USER 10001
ENV UNSEEN_HOST=0.0.0.0 UNSEEN_PORT=8000
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ[\"UNSEEN_PORT\"]}/healthz', timeout=4)"]
CMD ["unseen", "api"]

FROM runtime AS worker
# torch.compile builds what it generates when it runs: gcc for a GPU's kernels, g++ for a CPU's. Neither changes what a
# network computes, and a pinned version leaves Debian's mirrors with its next update.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY --from=worker-code /opt/unseen /opt/unseen
USER 10001
# A worker has no port; it is healthy while its row in the database shows a recent sign of life.
HEALTHCHECK --interval=20s --timeout=10s --start-period=60s --retries=3 \
    CMD ["python", "-m", "workers.health"]
CMD ["unseen", "worker"]
