# An image that runs every job, as head, as worker or alone, without root:
#   docker build -t lpclip .                         for GPU nodes (driver for CUDA 13 or newer)
#   docker build -t lpclip --build-arg DEVICE=cpu .  for CPU nodes
#   docker run --rm --shm-size=4g lpclip lpclip selftrain --help
# docs/deployment.md says how it is built without a registry and without a daemon. All nodes need the same Ray, which
# requirements.lock pins, and the same Python: Debian 12 has 3.11.
ARG BASE=debian:12-slim
# hadolint ignore=DL3006
FROM ${BASE}

# OpenCV, which draws the corruptions, is linked to libgl1 and libglib2.0-0; KubeRay's probes call wget. A login shell, in which
# some versions of KubeRay start Ray, sets its own PATH. User, group and home are those of Ray's own images; without setuid
# files, such as su, the user stays what it is.
# hadolint ignore=DL3008,SC2016
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        ca-certificates libgl1 libglib2.0-0 python3 python3-venv wget \
    && rm -rf /var/lib/apt/lists/* /var/log/apt \
    && echo 'PATH=/opt/lpclip/bin:$PATH' > /etc/profile.d/lpclip.sh \
    && useradd --create-home --uid 1000 --gid 100 --shell /bin/bash ray \
    && find / -xdev -type f -perm /6000 -exec chmod a-s {} + \
    && python3 -m venv /opt/lpclip
ENV PATH=/opt/lpclip/bin:$PATH \
    MLFLOW_DISABLE_TELEMETRY=true \
    RAY_USAGE_STATS_ENABLED=0

WORKDIR /home/ray/lpclip
# The lock first: a change of the code keeps the layer with the libraries. Each file that is installed has a hash in the lock
# and is a wheel, so nothing is compiled. PyTorch's CPU build alone has none: it comes from an index of its own. The ordinary
# build takes 4.5 GB more, for CUDA.
COPY requirements.lock ./
ARG DEVICE=gpu
ARG CPU_INDEX=https://download.pytorch.org/whl/cpu
# hadolint ignore=SC2046
RUN install="pip install --no-cache-dir --no-deps --only-binary :all:" \
    && if [ "$DEVICE" = cpu ]; then \
        sed -E '/^(cuda-|nvidia-|torch(vision)?==|triton==)/,/[^\\]$/d' requirements.lock > /tmp/without-torch.lock \
        && $install --require-hashes --requirement /tmp/without-torch.lock \
        && $install --index-url "$CPU_INDEX" \
            $(sed -nE 's/^(torch|torchvision)==([^ ;]+).*/\1==\2+cpu/p' requirements.lock) \
        && rm /tmp/without-torch.lock; \
    else $install --require-hashes --requirement requirements.lock; fi
COPY . .
# The user's own are the home and the working directory, for runs/ and mlflow.db: code and libraries stay root's.
RUN pip install --no-cache-dir --no-deps --no-build-isolation . \
    && rm -rf build lpclip.egg-info \
    && chown ray:users .

LABEL org.opencontainers.image.title=lpclip \
    org.opencontainers.image.version=0.1.0 \
    org.opencontainers.image.licenses=Apache-2.0
USER 1000:100
CMD ["lpclip", "--help"]
