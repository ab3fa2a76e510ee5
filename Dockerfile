# anomri as a BIDS App, on a processor:
#   docker build -t anomri .
#   docker run --rm -v BIDS:/bids:ro -v OUT:/out anomri /bids /out participant
# docs/container.md has more, also for Apptainer and GPUs.
FROM debian:bookworm-slim

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

# torch comes first, so that a change of the source leaves its layer as it is.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python3 -m venv /opt/anomri \
    && /opt/anomri/bin/pip install --no-cache-dir --index-url "$TORCH_INDEX" "torch>=2.6,<2.14"

COPY pyproject.toml README.md LICENSE /src/
COPY src /src/src
RUN /opt/anomri/bin/pip install --no-cache-dir "/src[bids,bet,register]" \
    && rm -r /src \
    && useradd --create-home anomri

# The container may run as any user, without a home, on a file system that is read-only but for /tmp.
ENV PATH=/opt/anomri/bin:$PATH \
    LANG=C.UTF-8 \
    HOME=/tmp \
    XDG_CACHE_HOME=/tmp/cache \
    MPLCONFIGDIR=/tmp/matplotlib
USER anomri
WORKDIR /tmp
ENTRYPOINT ["anomri", "bids"]
