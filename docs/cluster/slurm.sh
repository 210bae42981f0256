#!/bin/bash
# A search on nodes of Slurm: `sbatch docs/cluster/slurm.sh`. All nodes share the home directory, where the environment
# and the token lie; the head's share of the job, its GPUs too, takes trials as the others do. Never tried on a Slurm
# cluster. Change what follows, and the search at the end.
#SBATCH --job-name=segdec-tuner
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
# --exclusive: at its end `ray symmetric-run` stops every Ray of yours on its nodes.
set -euo pipefail

source "$HOME/segdec-tuner/venv/bin/activate"   # pip install --constraint constraints.txt 'dist/….whl[cluster]'
export RAY_AUTH_MODE=token                      # with ~/.ray/auth_token, once: ray get-auth-token --generate
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | cut -d ' ' -f 1):6379

# --runs lies in the home directory, which all nodes share, so that any of them goes on from a checkpoint; where they share
# none, add --storage s3://BUCKET/runs. A job that runs out of time is killed, and what its trials did after their last
# checkpoint is done again: submit it with `tuner resume "$HOME/runs/crack_segmentation"` in the place of `tuner search …`.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
  ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" --num-cpus="$SLURM_CPUS_PER_TASK" --disable-usage-stats -- \
  tuner search crack_segmentation --data "$HOME/data/cracks" --runs "$HOME/runs" --address auto
