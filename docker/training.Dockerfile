# What is done offline, and the joiner: adrank train, retrain, join, load, skew, replay. PyTorch on the CPU, Polars.
#   docker build --file docker/training.Dockerfile --tag adrank/training .
# PyTorch's CPU build is taken where it lies in docker/wheels/ or on an index in the pip.conf that the build is given. Else the usual build
# is, with the CUDA packages that it needs: 4 GB more, and it trains on the CPU all the same.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
WORKDIR /src
RUN python3 -m venv /opt/build && python3 -m venv --without-pip /opt/adrank
COPY docker/wheels docker/wheels
COPY docker/pip.sh docker/build.txt docker/training.txt docker/torch.txt docker/cuda.txt docker/
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca \
    docker/pip.sh install --require-hashes --only-binary :all: --requirement docker/build.txt \
    && install() { docker/pip.sh --python /opt/adrank/bin/python install --no-deps --require-hashes --only-binary :all: --requirement "$@"; } \
    && install docker/training.txt \
    && { install docker/torch.txt --no-index --find-links docker/wheels || install docker/torch.txt; } \
    && if grep -q '^Requires-Dist: nvidia' /opt/adrank/lib/python3*/site-packages/torch-*.dist-info/METADATA; then install docker/cuda.txt; fi
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
    && docker/pip.sh --python /opt/adrank/bin/python check \
    && cp docker/healthy.py /opt/adrank/healthy.py

FROM ${BASE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="adrank training" \
      org.opencontainers.image.description="Trains CTR models for adrank, and joins its log" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
RUN groupadd --gid 10001 adrank && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin adrank \
    && install -d -o 10001 -g 10001 /data /log /models
COPY --from=build /opt/adrank /opt/adrank
ENV PATH=/opt/adrank/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    ADRANK_MODELS=/models OMP_WAIT_POLICY=PASSIVE
USER 10001:10001
WORKDIR /
STOPSIGNAL SIGTERM
ENTRYPOINT ["adrank"]
CMD ["--help"]
