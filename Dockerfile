# One NVIDIA GPU. Not built by the tests, which have neither Docker nor a GPU.
#     docker build -t decm .
#     docker run --rm -it --gpus all --shm-size 8g -v "$PWD/runs:/work/runs" decm fit --config digits/decm.yaml
# `compile: true` needs torch 2.13: pass --build-arg IMAGE with a newer image.
ARG IMAGE=pytorch/pytorch:2.9.1-cuda12.8-cudnn9-runtime
FROM ${IMAGE}

# Triton compiles a launcher for each kernel.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

ENV PIP_NO_CACHE_DIR=1 PIP_BREAK_SYSTEM_PACKAGES=1
WORKDIR /work
COPY . /decm-lightning
# The image's torch stays.
RUN python -c 'import torch; print("torch==" + torch.__version__.partition("+")[0])' > /torch.txt \
    && python -m pip install --constraint /torch.txt '/decm-lightning[demo,dinov2,lora]' \
    && cp -r /decm-lightning/weights /work/weights

ENTRYPOINT ["decm"]
CMD ["--help"]
