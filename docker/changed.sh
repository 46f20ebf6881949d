#!/usr/bin/env bash
# Prints the images to build for the changes since a commit, as a JSON list: changed.sh COMMIT. All images if the commit is
# not known, as for a tag. A change of the code alone builds only the CPU images: all images get it by the same small layer.
set -euo pipefail
cd "$(dirname "$0")/.."

all=(service-cpu service-cuda service-cuda12 service-vllm trainer-cpu trainer-cuda trainer-cuda12)
images=()
if git cat-file -e "${1:-none}^{commit}" 2>/dev/null; then
    while read -r file; do
        case $file in
            docker/Dockerfile | docker/build.sh | .dockerignore | pyproject.toml) images+=("${all[@]}") ;;
            constraints/default.txt) images+=(service-c{pu,uda,uda12} trainer-c{pu,uda,uda12}) ;;
            constraints/vllm.txt) images+=(service-vllm) ;;
            docker/healthcheck.py) images+=(service-cpu) ;;
            service/* | trainer/*) images+=(service-cpu trainer-cpu) ;;
        esac
    done < <(git diff --name-only "$1" HEAD)
else
    images=("${all[@]}")
fi
printf '%s\n' "${images[@]}" | sort -u | awk 'NF { list = list (list ? "," : "") "\"" $0 "\"" } END { print "[" list "]" }'
