#!/usr/bin/env bash
# Builds images with docker, podman or buildah (the first that is installed): build.sh [NAME ...]. Without a name it
# builds service-cpu, service-cuda, trainer-cpu and trainer-cuda. The others are service-vllm, and service-cuda12 and
# trainer-cuda12 for older drivers.
#   REGISTRY       prefix of the image names, for example ghcr.io/OWNER/
#   BUILDER        the program to use if several are installed
#   BUILD_OPTIONS  more options for it, for example --build-arg PIP_INDEX_URL=...
# PUSH=1 pushes images that were built before, and builds nothing. The CUDA images get the bare version as a second tag.
set -euo pipefail
cd "$(dirname "$0")/.."

version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
revision=$(git describe --always --abbrev=40 --dirty --exclude='*' 2>/dev/null || echo unknown)
builder=${BUILDER:-$(command -v docker || command -v podman || command -v buildah || true)}
if [[ -z $builder ]]; then
    echo "docker, podman or buildah is needed to build images, but none is installed: install one, or set BUILDER" >&2
    exit 1
fi
read -r -a options <<<"${BUILD_OPTIONS:-}"
# podman and buildah write the OCI image format by default, which has no health check. They also reuse a cached step
# although an argument in it has changed, so labels from the Dockerfile would be stale: pass the labels as options.
[[ $(basename "$builder") == docker ]] || options+=(--format docker
    --label "org.opencontainers.image.version=$version" --label "org.opencontainers.image.revision=$revision")

references() { # NAME -> the image's names and tags. service-cuda -> dense-reward:0.1.0-cuda dense-reward:0.1.0
    local image=dense-reward
    [[ $1 == service-* ]] || image=dense-reward-trainer
    echo "${REGISTRY:-}$image:$version-${1#*-}"
    [[ $1 != *-cuda ]] || echo "${REGISTRY:-}$image:$version"
}

build() { # NAME ARGUMENT ...
    local name=$1 target=${1%%-*} arguments=()
    [[ $name != service-vllm ]] || target=service-vllm
    for argument in "${@:2}" "VERSION=$version" "REVISION=$revision"; do arguments+=(--build-arg "$argument"); done
    for tag in $(references "$name"); do arguments+=(--tag "$tag"); done
    "$builder" build --file docker/Dockerfile --target "$target" "${arguments[@]}" "${options[@]}" .
}

(($#)) || set -- service-cpu service-cuda trainer-cpu trainer-cuda
for name; do
    case $name in
        service-cpu | trainer-cpu) arguments=(DEVICE=cpu) ;;
        service-cuda) arguments=(DEVICE=cuda "SYSTEM_PACKAGES=gcc libc6-dev") ;;
        trainer-cuda) arguments=(DEVICE=cuda) ;;
        service-cuda12) arguments=(DEVICE=cuda CUDA=12 "SYSTEM_PACKAGES=gcc libc6-dev") ;;
        trainer-cuda12) arguments=(DEVICE=cuda CUDA=12) ;;
        service-vllm) arguments=() ;;
        *)
            echo "unknown image $name: choose service-cpu, service-cuda, service-cuda12, service-vllm, trainer-cpu," \
                "trainer-cuda or trainer-cuda12" >&2
            exit 2
            ;;
    esac
    if [[ -n ${PUSH:-} ]]; then
        for tag in $(references "$name"); do "$builder" push "$tag"; done
    else
        build "$name" "${arguments[@]}"
        echo "built $(references "$name" | paste -sd ' ')"
    fi
done
