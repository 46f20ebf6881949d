#!/bin/bash
# Slurm: one replica on each GPU. Each writes its address into the folder rewards-JOB once it can score.
#   sbatch --ntasks=8 examples/slurm.sh DIR/sft DIR/reference keys.json
# A job on the same cluster takes one of them, or `Client.score_many` all (urls=...):
#   dense-reward-train dpr RECIPE service_url="$(cat rewards-*/0)"
# keys.json is the list of docs/operations.md#access; every user of the cluster reaches the nodes' ports.
#SBATCH --job-name=rewards
#SBATCH --ntasks=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --mem-per-gpu=64G
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@330
# The last line is SIGTERM before the end of the time: each replica then answers what it has admitted, for up to 300 s.
set -euo pipefail
export SFT=$1 REFERENCE=$2 KEYS=$3 FOUND=$PWD/rewards-$SLURM_JOB_ID
mkdir -p "$FOUND"
# shellcheck disable=SC2016
exec srun bash -euc '
    port=$((20000 + SLURM_JOB_ID % 300 * 40 + SLURM_LOCALID))
    url=http://$(hostname -f):$port
    (until curl --fail --silent --output /dev/null "$url/ready"; do sleep 2; done; echo "$url" > "$FOUND/$SLURM_PROCID") &
    exec dense-reward serve --sft "$SFT" --reference "$REFERENCE" --host 0.0.0.0 --port $port --api-keys-file "$KEYS"
'
