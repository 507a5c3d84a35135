# syntax=docker/dockerfile:1
#
#   docker build --target gateway     -t evenhand-gateway .      the gateway; neither torch nor vLLM
#   docker build --target worker-cpu  -t evenhand-worker-cpu .   an engine for CPUs, with the bundled model
#   docker build --target worker-cuda -t evenhand-worker-cuda .  an engine for NVIDIA GPUs, on vLLM's own image
#
# All run as user 10001. Which build steps were run, and where: docs/containers.md.

ARG PYTHON=3.11-slim-bookworm
ARG VLLM=v0.32.0

FROM python:${PYTHON} AS build-gateway
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY deploy/requirements deploy/requirements
RUN python -m venv /opt/evenhand \
 && /opt/evenhand/bin/pip install --no-deps --require-hashes -r deploy/requirements/bootstrap.txt \
 && /opt/evenhand/bin/pip install --no-deps --require-hashes -r deploy/requirements/gateway.txt
COPY pyproject.toml README.md LICENSE ./
COPY scheduler scheduler
COPY server server
COPY loadtest loadtest
COPY deploy deploy
RUN /opt/evenhand/bin/pip install --no-deps --no-build-isolation .


FROM build-gateway AS build-worker-cpu
RUN /opt/evenhand/bin/pip install --no-deps --require-hashes -r deploy/requirements/engine-cpu.txt \
 && /opt/evenhand/bin/pip install --no-deps --index-url https://download.pytorch.org/whl/cpu -r deploy/requirements/torch-cpu.txt
RUN EVENHAND_CACHE=/opt/evenhand/models /opt/evenhand/bin/evenhand model prepare


FROM python:${PYTHON} AS gateway
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin evenhand
COPY --from=build-gateway /opt/evenhand /opt/evenhand
ENV PATH=/opt/evenhand/bin:$PATH PYTHONUNBUFFERED=1 EVENHAND_HOST=0.0.0.0 EVENHAND_PORT=8000
USER 10001
WORKDIR /home/evenhand
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s \
  CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=2)"]
ENTRYPOINT ["evenhand"]
CMD ["gateway"]


# g++ for torch.compile, numactl's library for vLLM's placement of threads.
FROM python:${PYTHON} AS worker-cpu
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ libnuma1 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --create-home --shell /usr/sbin/nologin evenhand
COPY --from=build-worker-cpu /opt/evenhand /opt/evenhand
ENV PATH=/opt/evenhand/bin:$PATH PYTHONUNBUFFERED=1 EVENHAND_CACHE=/opt/evenhand/models EVENHAND_ENGINE_PORT=8100
USER 10001
WORKDIR /home/evenhand
EXPOSE 8100
# The engine listens on the one address that it tells the gateways.
HEALTHCHECK --interval=10s --timeout=3s --start-period=300s \
  CMD ["sh", "-c", "python -c \"from urllib.request import urlopen; urlopen('http://$(hostname -i):8100/health', timeout=2)\""]
ENTRYPOINT ["sh", "-c", "exec evenhand worker --address \"${EVENHAND_ADDRESS:-$(hostname -i)}\" \"$@\"", "evenhand-worker"]


FROM vllm/vllm-openai:${VLLM} AS worker-cuda
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY scheduler scheduler
COPY server server
COPY loadtest loadtest
COPY deploy deploy
# What the image has stays as it is (the overrides); only what it lacks is added.
RUN uv pip freeze --system --exclude-editable > /tmp/image.txt \
 && uv pip install --system --no-cache --overrides /tmp/image.txt . \
 && rm /tmp/image.txt \
 && useradd --uid 10001 --create-home --shell /usr/sbin/nologin evenhand \
 && mkdir -p /models && chown 10001 /models
ENV PYTHONUNBUFFERED=1 HF_HOME=/models EVENHAND_ENGINE_PORT=8100
USER 10001
WORKDIR /home/evenhand
VOLUME /models
EXPOSE 8100
HEALTHCHECK --interval=10s --timeout=3s --start-period=900s \
  CMD ["sh", "-c", "python3 -c \"from urllib.request import urlopen; urlopen('http://$(hostname -i):8100/health', timeout=2)\""]
ENTRYPOINT ["sh", "-c", "exec evenhand worker --address \"${EVENHAND_ADDRESS:-$(hostname -i)}\" \"$@\"", "evenhand-worker"]
