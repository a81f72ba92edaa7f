# The ranker on an NVIDIA GPU: as service.Dockerfile, with ONNX Runtime 1.31 for CUDA.
#   docker build --file docker/service-gpu.Dockerfile --tag adrank/service-gpu .   and   docker run --gpus 1 …
# CUDA 13 and cuDNN 9 come from PyPI with the other packages, so the base is the same; the host gives the driver (580 or newer, which is
# CUDA 13's) through the NVIDIA Container Toolkit.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
WORKDIR /src
RUN python3 -m venv /opt/build && python3 -m venv --without-pip /opt/adrank
COPY docker/pip.sh docker/build.txt docker/service-gpu.txt docker/
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca \
    docker/pip.sh install --require-hashes --only-binary :all: --requirement docker/build.txt \
    && docker/pip.sh --python /opt/adrank/bin/python install --no-deps --require-hashes --only-binary :all: --requirement docker/service-gpu.txt
COPY *.py pyproject.toml README.md LICENSE ./
COPY adrank_bench adrank_bench
COPY adrank_cli adrank_cli
COPY adrank_client adrank_client
COPY adrank_demo adrank_demo
COPY features features
COPY service service
COPY training training
COPY docker/healthy.py docker/
RUN docker/pip.sh wheel --no-deps --no-index --no-build-isolation --wheel-dir /dist . \
    && docker/pip.sh --python /opt/adrank/bin/python install --no-deps --no-index /dist/*.whl \
    && /opt/adrank/bin/python -c 'import onnxruntime as ort; assert "CUDAExecutionProvider" in ort.get_available_providers()' \
    && cp docker/healthy.py /opt/adrank/healthy.py

FROM ${BASE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="adrank service, GPU" \
      org.opencontainers.image.description="Ranks ads by p(click): POST /rank, on CUDA 13 and cuDNN 9" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
RUN groupadd --gid 10001 adrank && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin adrank \
    && install -d -o 10001 -g 10001 /models
COPY --from=build /opt/adrank /opt/adrank
ENV PATH=/opt/adrank/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    ADRANK_HOST=0.0.0.0 ADRANK_MODELS=/models ADRANK_DEVICE=cuda \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000
STOPSIGNAL SIGTERM
# Degraded is healthy, as it is ready: without Redis the service still ranks.
HEALTHCHECK --interval=10s --timeout=4s --start-period=120s --retries=3 CMD ["python", "-I", "/opt/adrank/healthy.py"]
ENTRYPOINT ["adrank"]
CMD ["serve"]
