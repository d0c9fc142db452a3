# The whole service in one image: gateway, TorchServe and packaged models. See docs/deploy.md.
#   docker build -t classifier .
#   docker build -t classifier --build-arg MODELS=resnet50 --build-arg TORCH=cuda .

# Debian 12 with Python 3.10 or newer as python3.
ARG BASE=docker.io/library/python:3.11.13-slim-bookworm

# --- libraries and code
FROM ${BASE} AS build
WORKDIR /app
# cpu: from PyTorch's own index, without 4 GB of CUDA; cuda: PyPI's build
ARG TORCH=cpu
ENV PYTHONDONTWRITEBYTECODE=1
# Debian's own python3 has venv in a package of its own.
RUN python3 -c 'import ensurepip' \
    || { apt-get update && apt-get install --yes --no-install-recommends python3-venv; }
COPY requirements.txt ./
RUN python3 -m venv .venv \
    && if [ "$TORCH" = cpu ]; then set -- --index-url https://download.pytorch.org/whl/cpu; fi \
    && .venv/bin/pip install --no-cache-dir --no-compile "$@" \
        $(grep -oE '^torch(vision)?==[^ ]+' requirements.txt) \
    && .venv/bin/pip install --no-cache-dir --no-compile -r requirements.txt \
    && echo /app > "$(echo .venv/lib/python3*/site-packages)/repository.pth"
COPY config.properties ./
COPY handler handler
COPY scripts scripts
RUN .venv/bin/python scripts/class_archive.py

# --- archives
FROM build AS models
ARG MODELS=mobilenet_v2
# pretrained, untrained, or a file beside this Dockerfile: weights/flowers.pth
ARG WEIGHTS=pretrained
ARG RECIPE
ARG LABELS
RUN --mount=type=bind,source=.,target=/context \
    cd /context && for model in $MODELS; do \
        /app/.venv/bin/python /app/scripts/package.py --model "$model" --weights "$WEIGHTS" \
            ${RECIPE:+--recipe "$RECIPE"} ${LABELS:+--labels "$LABELS"} || exit; \
    done

# --- what serving opens, readable and compiled
FROM build AS serving
COPY deploy/gateway deploy/gateway
RUN cd .venv/lib/python3*/site-packages && rm -r \
        # OpenVINO's devices but the CPU, and model formats but its own
        openvino/libs/libopenvino_intel_[gn]pu_plugin.so openvino/libs/cache.json \
        openvino/libs/libopenvino_[!i]*_frontend.so.* \
        # what extensions are compiled with
        torch/include torch/bin/protoc* openvino/include openvino/cmake \
        # installers
        pip pip-* setuptools setuptools-* wheel wheel-* ../../../bin/pip* ../../../bin/wheel \
    # the libraries' own tests
    && find numpy sympy networkx mpmath -type d -name tests -prune -exec rm -r {} + \
    # -x: syntax of a newer Python
    && cd /app && .venv/bin/python -m compileall -q --invalidation-mode unchecked-hash \
        -x /py312 .venv/lib handler scripts

FROM ${BASE}
LABEL org.opencontainers.image.title="classifier" \
    org.opencontainers.image.description="Image classification on TorchServe behind nginx" \
    org.opencontainers.image.documentation="docs/deploy.md"
# /tmp, a tmpfs where the root is read-only, is all that is written; it is the user's home as well.
# The installers are those of python:slim.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends nginx libnginx-mod-http-js \
    && rm -rf /var/lib/apt/lists/* /var/log/* \
        /usr/local/lib/python3*/site-packages/* /usr/local/lib/python3*/ensurepip \
        /usr/local/bin/pip* /usr/local/bin/wheel \
    && useradd --uid 1000 --home-dir /tmp --shell /usr/sbin/nologin classifier
WORKDIR /app
COPY --from=serving /app/.venv .venv
COPY --from=serving /app/config.properties ./
COPY --from=serving /app/deploy deploy
COPY --from=serving /app/handler handler
COPY --from=serving /app/scripts scripts
COPY --from=models /app/model_store model_store
ENV PATH=/app/.venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 GATEWAY_HOST=0.0.0.0
USER 1000:1000
EXPOSE 8000
# Ready means that every worker of every model is.
HEALTHCHECK --interval=10s --timeout=10s --start-period=120s \
    CMD ["python", "scripts/healthcheck.py"]
# The launcher is PID 1 and stops gateway and TorchServe in order on SIGTERM. Other commands:
# scripts/gateway.py --new-key NAME, or CMD with more options.
ENTRYPOINT ["python"]
CMD ["scripts/serve.py", "--archive", "model_store", "--gateway"]
