#!/usr/bin/env bash
# Builds images with docker, podman or buildah, whichever is there: build.sh [NAME ...], all of the usual ones by default.
#   REGISTRY       put before their names, such as ghcr.io/OWNER/
#   BUILDER        the program, where there are several
#   BUILD_OPTIONS  further options for it, such as --build-arg PIP_INDEX_URL=...
# PUSH=1 pushes what was built before, and builds nothing. The images with CUDA have the bare version as a second tag.
set -euo pipefail
cd "$(dirname "$0")/.."

version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
revision=$(git describe --always --abbrev=40 --dirty --exclude='*' 2>/dev/null || echo unknown)
builder=${BUILDER:-$(command -v docker || command -v podman || command -v buildah || true)}
if [[ -z $builder ]]; then
    echo "images are built with docker, podman or buildah: none of them is here" >&2
    exit 1
fi
read -r -a options <<<"${BUILD_OPTIONS:-}"
# podman and buildah write OCI's own image format by default, in which there is no health check; and they take a step
# from their cache though the argument in it has another value, which would leave old labels.
[[ $(basename "$builder") == docker ]] || options+=(--format docker
    --label "org.opencontainers.image.version=$version" --label "org.opencontainers.image.revision=$revision")

references() { # NAME: the image's tags. service-cuda -> dense-reward:0.1.0-cuda dense-reward:0.1.0
    local image=dense-reward
    [[ $1 == service-* ]] || image=dense-reward-trainer
    echo "${REGISTRY:-}$image:$version-${1#*-}"
    [[ $1 != *-cuda ]] || echo "${REGISTRY:-}$image:$version"
}

build() { # NAME ARGUMENT ...
    local name=$1 arguments=()
    for argument in "${@:2}" "VERSION=$version" "REVISION=$revision"; do arguments+=(--build-arg "$argument"); done
    for tag in $(references "$name"); do arguments+=(--tag "$tag"); done
    "$builder" build --file docker/Dockerfile --target "${name%%-*}" "${arguments[@]}" "${options[@]}" .
}

(($#)) || set -- service-cpu service-cuda trainer-cpu trainer-cuda
for name; do
    case $name in
        service-cpu | trainer-cpu) arguments=(DEVICE=cpu) ;;
        service-cuda | trainer-cuda) arguments=(DEVICE=cuda) ;;
        service-vllm) arguments=("EXTRAS=serve,otel,vllm" CONSTRAINTS=vllm.txt "SYSTEM_PACKAGES=gcc libc6-dev") ;;
        *)
            echo "no image $name: service-cpu, service-cuda, service-vllm, trainer-cpu, trainer-cuda" >&2
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
