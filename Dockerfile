# FLUX Redux Server: API and GPU workers in one container.
#
#   docker build -t flux-redux-server .
#
# The server listens on all interfaces here, and refuses to do so while no API key exists. So make
# one first; it is printed once and kept (hashed) in the data volume:
#
#   docker run --rm -v flux-redux-data:/data flux-redux-server keys create --name me
#   docker run -d --gpus all --init -p 8000:8000 -v flux-redux-data:/data flux-redux-server
#
# That serves the small embedded model. For FLUX.1 [dev] (non-commercial licence) mount a Hugging
# Face cache that holds it, read-only, and name the model:
#
#   docker run -d --gpus all --init -p 8000:8000 -v flux-redux-data:/data \
#     -v "$HOME/.cache/huggingface:/weights/hf:ro" -e HF_HUB_OFFLINE=1 \
#     flux-redux-server serve --host 0.0.0.0 --model flux-dev
#
# GPU: torch's wheels carry CUDA 13; the host gives the driver (580 or newer) through NVIDIA's
# container toolkit. Without --gpus the server runs on the CPU.
#
# Signals: `docker stop` sends SIGTERM to PID 1, which is the server itself: it stops accepting,
# lets its workers finish (FLUX_REDUX_DRAIN_TIMEOUT_S, 60 s) and waits for them, so give it time:
# `docker stop --time 90`. It starts and reaps its workers and needs no init for them; --init is
# for *their* children (torch.compile's helper processes), which a crashed worker leaves to PID 1.
#
# Rights: uid and gid 10001, no capabilities. It also runs with `--read-only
# --cap-drop ALL --security-opt no-new-privileges`; all it writes is under /data.

# --- what to install: changes only when the list of dependencies does, whatever else pyproject says
FROM python:3.12-slim-bookworm AS requirements
WORKDIR /src
COPY pyproject.toml ./
RUN ["python", "-c", "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; wanted = project['dependencies'] + project['optional-dependencies']['cluster']; open('requirements.txt', 'w').write('\\n'.join(wanted) + '\\n')"]

# --- our own package
FROM python:3.12-slim-bookworm AS package
ENV PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt hatchling
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY server/redux_server server/redux_server
COPY pipelines/redux_pipelines pipelines/redux_pipelines
COPY kernels/redux_kernels kernels/redux_kernels
COPY weights/redux_weights weights/redux_weights
COPY weights/mini/base weights/mini/base
COPY weights/mini/redux weights/mini/redux
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /dist .

# --- the image
FROM python:3.12-slim-bookworm
LABEL org.opencontainers.image.title="FLUX Redux Server" \
      org.opencontainers.image.description="Self-hosted FLUX.1 Redux: image in, variations out" \
      org.opencontainers.image.documentation="file:///usr/share/doc/flux-redux-server/README.md" \
      org.opencontainers.image.licenses="Apache-2.0"

# Not build tools: at run time triton compiles a launcher for each kernel with gcc (Python's headers
# are in the base image), and torch.compile its host code with g++.
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc g++ libc6-dev \
 && rm -rf /var/lib/apt/lists/*

RUN groupadd --gid 10001 redux \
 && useradd --uid 10001 --gid redux --home-dir /data --no-create-home --shell /usr/sbin/nologin redux \
 && install -d -o redux -g redux -m 0750 /data \
 && install -d -m 0755 /weights /weights/hf

# Gigabytes, and the same until constraints.txt or the dependencies change.
ENV PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1
COPY constraints.txt /tmp/build/
COPY --from=requirements /src/requirements.txt /tmp/build/
RUN pip install --no-cache-dir -r /tmp/build/requirements.txt -c /tmp/build/constraints.txt

# Kilobytes to megabytes: our code.
COPY README.md LICENSE /usr/share/doc/flux-redux-server/
RUN --mount=type=bind,from=package,source=/dist,target=/dist \
    pip install --no-cache-dir --no-deps /dist/*.whl && pip check

# Compiled kernels are kept beside the tasks, so that a restart does not compile them again.
ENV FLUX_REDUX_DATA_DIR=/data \
    FLUX_REDUX_METRICS_PORT=8001 \
    HF_HOME=/weights/hf \
    HF_HUB_DISABLE_TELEMETRY=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    TRITON_CACHE_DIR=/data/cache/triton \
    XDG_CACHE_HOME=/data/cache
VOLUME /data
WORKDIR /data
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM

# Alive, not ready: /readyz turns 200 only after a first image and belongs to the load balancer.
# `serve` answers on FLUX_REDUX_PORT, `worker` on FLUX_REDUX_METRICS_PORT: one of them has to.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
  CMD ["python", "-c", "import os, sys, urllib.request as r\ndef ok(name, port):\n try: return r.urlopen('http://127.0.0.1:' + os.environ.get(name, port) + '/livez', timeout=2).status == 200\n except OSError: return False\nsys.exit(not (ok('FLUX_REDUX_PORT', '8000') or ok('FLUX_REDUX_METRICS_PORT', '8001')))"]

ENTRYPOINT ["flux-redux"]
CMD ["serve", "--host", "0.0.0.0"]
