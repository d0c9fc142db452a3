# The whole service in one image: gateway, TorchServe and packaged models. See docs/deploy.md.
#   docker build -t classifier .
#   docker build -t classifier --build-arg MODELS=resnet50 --build-arg TORCH=cuda .

# Debian 12 with Python 3.10 or newer as python3.
ARG BASE=docker.io/library/python:3.11.13-slim-bookworm

FROM ${BASE} AS libraries
WORKDIR /app
# cpu: from PyTorch's own index, without 4 GB of CUDA; cuda: PyPI's build
ARG TORCH=cpu
# Debian's own python3 has venv in a package of its own. No versions of Debian packages, here and
# below (DL3008): a stable release changes them for security alone, and forgets the old ones.
# hadolint ignore=DL3008
RUN python3 -c 'import ensurepip' \
    || { apt-get update && apt-get install --yes --no-install-recommends python3-venv \
        && rm -rf /var/lib/apt/lists/*; }
COPY requirements.txt requirements-gpu.txt requirements-signing.txt requirements-grpc.txt \
    requirements-cache.txt requirements-jobs.txt ./
RUN python3 -m venv .venv \
    && gpu=-gpu \
    && if [ "$TORCH" = cpu ]; then set -- --index-url https://download.pytorch.org/whl/cpu; gpu=; fi \
    && grep -E '^torch(vision)?==' requirements.txt > torch.txt \
    && .venv/bin/pip install --no-cache-dir --no-compile "$@" -r torch.txt \
    && .venv/bin/pip install --no-cache-dir --no-compile -r "requirements$gpu.txt" \
        -r requirements-signing.txt -r requirements-grpc.txt -r requirements-cache.txt \
        -r requirements-jobs.txt \
    && echo /app > "$(echo .venv/lib/python3*/site-packages)/repository.pth"

FROM libraries AS models
COPY config.properties ./
COPY deploy/gateway deploy/gateway
COPY handler handler
COPY service service
COPY scripts scripts
RUN .venv/bin/python scripts/java_cds.py \
    && .venv/bin/python -m compileall -q --invalidation-mode unchecked-hash handler service scripts
ARG MODELS=mobilenet_v2
# pretrained, untrained, or a file beside this Dockerfile: weights/flowers.pth
ARG WEIGHTS=pretrained
ARG RECIPE
ARG LABELS
ARG WEIGHTS_PREFIX
ARG TRANSFORM_INPUT
WORKDIR /context
RUN --mount=type=bind,source=.,target=/context \
    for model in $MODELS; do \
        /app/.venv/bin/python /app/scripts/package.py --model "$model" --weights "$WEIGHTS" \
            ${RECIPE:+--recipe "$RECIPE"} ${LABELS:+--labels "$LABELS"} \
            ${WEIGHTS_PREFIX:+--weights-prefix "$WEIGHTS_PREFIX"} \
            ${TRANSFORM_INPUT:+--transform-input "$TRANSFORM_INPUT"} || exit; \
    done

# What serving never opens is left out, and the rest is compiled. -f: OpenVINO for arm64 comes
# without some of it.
FROM libraries AS serving
# cd, because Python's version in the path is the base's.
# hadolint ignore=DL3003
RUN cd .venv/lib/python3*/site-packages && rm -rf \
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
    && ../../../bin/python -m compileall -q --invalidation-mode unchecked-hash -x /py312 .

FROM ${BASE}
LABEL org.opencontainers.image.title="classifier" \
    org.opencontainers.image.description="Image classification on TorchServe behind nginx"
# /tmp, a tmpfs if the root is read-only, is all that is written; it is the user's home as well.
# What is deleted under /usr/local are the installers of python:slim.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends nginx libnginx-mod-http-lua lua-cjson \
    && rm -rf /var/lib/apt/lists/* /var/log/* \
        /usr/local/lib/python3*/site-packages/* /usr/local/lib/python3*/ensurepip \
        /usr/local/bin/pip* /usr/local/bin/wheel \
    && useradd --uid 1000 --home-dir /tmp --shell /usr/sbin/nologin classifier
WORKDIR /app
COPY --from=serving /app/.venv .venv
COPY --from=models /app/.venv/java-classes.jsa .venv/
COPY --from=models /app/config.properties ./
COPY --from=models /app/deploy deploy
COPY --from=models /app/handler handler
COPY --from=models /app/service service
COPY --from=models /app/scripts scripts
COPY --from=models /app/model_store model_store
# What scanners of an image read: docs/security.md.
RUN .venv/bin/python -B scripts/sbom.py > sbom.json
ENV PATH=/app/.venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 GATEWAY_HOST=0.0.0.0
USER 1000:1000
EXPOSE 8000
# Ready means that every worker of every model is.
HEALTHCHECK --interval=10s --timeout=10s --start-period=120s \
    CMD ["python", "scripts/healthcheck.py"]
# The launcher is PID 1; on SIGTERM it stops gateway and TorchServe in order. Other commands are
# scripts/gateway.py --new-key NAME, or this one with more options. The image's own archives are as
# safe as its code; those of a volume need --require-signed (docs/security.md).
ENTRYPOINT ["python"]
CMD ["scripts/serve.py", "--archive", "model_store", "--require-signed", "off", "--gateway"]
