# A Ray image that runs every job, as head, as worker or alone:
#   docker build -t lpclip .                         for GPU nodes (driver for CUDA 13 or newer)
#   docker build -t lpclip --build-arg DEVICE=cpu .  for CPU nodes
#   docker run --rm --shm-size=4g lpclip python jobs/selftrain.py --help
# The base's Ray and Python must be those of requirements.lock and of every other node.
ARG RAY=2.60.0
ARG DEVICE=gpu
FROM rayproject/ray:${RAY}-py311-${DEVICE}

# OpenCV, which draws the corruptions, is linked to these two; the base has neither. The base's user may become
# root without a password, which no job needs.
USER 0
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/* \
    && gpasswd --delete ray sudo \
    && sed -i '/^ray /d' /etc/sudoers
USER 1000

WORKDIR /home/ray/lpclip
# The lock first: a change of the code keeps the layer with the libraries.
COPY --chown=1000:100 requirements.lock ./
# For CPUs PyTorch's CPU build, from its own index: the ordinary one takes 4.5 GB more, for CUDA.
ARG DEVICE
# hadolint ignore=SC2086
RUN if [ "$DEVICE" = cpu ]; then \
        cpu="--extra-index-url https://download.pytorch.org/whl/cpu \
            $(sed -nE 's/^(torch|torchvision)==([^ ;]+).*/\1==\2+cpu/p' requirements.lock)"; \
    fi \
    && python -m pip install --no-cache-dir --requirement requirements.lock $cpu
COPY --chown=1000:100 . .
RUN python -m pip install --no-cache-dir --no-deps .

ENV MLFLOW_DISABLE_TELEMETRY=true \
    RAY_USAGE_STATS_ENABLED=0
