# The server in an image: a pool at /pool, models that it downloads at /cache, port 8000.
# Other machines can reach a container, so it needs API keys: see docs/server.md.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
# The extras to install. For the demo's pool and its models: serve,otel,demo
ARG EXTRAS=serve,otel
# Where pip also looks for torch: the address of PyTorch's wheels for CPUs makes the image gigabytes smaller. Empty: the
# default build, for NVIDIA's GPUs.
ARG TORCH_INDEX=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PATH=/opt/venv/bin:$PATH
RUN python -m venv /opt/venv
WORKDIR /build
# A layer of its own: torch is large, and changes seldom. Of equal versions pip takes the one with a local part (+cpu).
COPY constraints.txt ./
RUN pip install -c constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch
COPY pyproject.toml README.md LICENSE ./
COPY src src
COPY demo demo
RUN pip install -c constraints.txt ".[$EXTRAS]"

FROM python:${PYTHON}-slim
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin server \
    && install --directory --owner server /pool /cache
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/huggingface \
    LORARETRIEVER_CACHE=/cache/loraretriever \
    LORARETRIEVER_POOL=/pool \
    LORARETRIEVER_HOST=0.0.0.0 \
    LORARETRIEVER_PORT=8000
USER 10001
VOLUME ["/pool", "/cache"]
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["loraretriever"]
CMD ["serve"]
