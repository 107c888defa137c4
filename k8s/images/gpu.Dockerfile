# Engines on NVIDIA GPUs; the driver comes from the node, CUDA from the wheels. From the project's root:
#
#     docker build -f k8s/images/gpu.Dockerfile -t registry.example.com/serving-gpu:0.1.0 .
#
# No model is in it: weights come from a volume. (The nano checkpoint is package data.)
ARG BASE=docker.io/library/python:3.11.13-slim-bookworm

FROM ${BASE} AS build
# Debian's mirrors keep no old versions, so the release is what is pinned. libnuma is for the set-up's last step, which
# imports vLLM.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev libgomp1 libnuma1 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
# What changes seldom first: a change of the code installs no package again.
COPY pyproject.toml README.md LICENSE ./
COPY requirements requirements
COPY serving/__init__.py serving/__init__.py
RUN python3.11 requirements/install.py --accelerator gpu --venv /opt/serving --production
COPY serving serving
RUN /opt/serving/bin/python -m uv pip install --python /opt/serving/bin/python --no-cache --no-deps --no-build-isolation \
        --reinstall --compile-bytecode . \
    && /opt/serving/bin/python -m uv pip uninstall --python /opt/serving/bin/python uv

FROM ${BASE}
# wget is what probes ask with; Triton compiles its launchers with gcc when an engine starts; fonts are for PDFs that do
# not bring their own, which are blank pages without (an OCR service may run in this image as well).
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends fonts-dejavu-core fonts-liberation fonts-noto-cjk \
        gcc libc6-dev libgomp1 libnuma1 wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 serving \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp/home --shell /bin/bash serving \
    # KubeRay starts Ray in a login shell, which sets its own PATH.
    && echo "export PATH=/opt/serving/bin:\$PATH" > /etc/profile.d/serving.sh
COPY --from=build /opt/serving /opt/serving
ENV PATH=/opt/serving/bin:$PATH PYTHONUNBUFFERED=1 VLLM_NO_USAGE_STATS=1 RAY_USAGE_STATS_ENABLED=0 NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000
# For engines like docker; Kubernetes has its own probes. `serving up` answers here, and so does a node of Ray's.
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["wget", "-q", "-T", "4", "-O", "/dev/null", "http://127.0.0.1:8000/health"]
CMD ["serving", "--help"]
