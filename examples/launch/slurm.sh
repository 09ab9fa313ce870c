#!/usr/bin/env bash
# Several nodes under Slurm, one process for each of their GPUs; the files that are read lie where all nodes see them:
#   sbatch --nodes=4 examples/launch/slurm.sh dpo --config examples/dpo.yaml
# For FSDP2 export what `accelerate launch` would set: ACCELERATE_USE_FSDP=true FSDP_VERSION=2
# FSDP_AUTO_WRAP_POLICY=TRANSFORMER_BASED_WRAP FSDP_STATE_DICT_TYPE=SHARDED_STATE_DICT
# PROCESSES: how many a node, if not one for each GPU; PORT: by which the nodes meet (29500).
#SBATCH --job-name=preftree
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --exclusive
# With --enable_jit_checkpoint true the signal comes in time for a checkpoint; --resume_from_checkpoint true goes on from it.
#SBATCH --signal=TERM@300
set -euo pipefail
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${hosts%%$'\n'*}
exec srun torchrun \
  --nnodes="$SLURM_NNODES" --nproc_per_node="${PROCESSES:-gpu}" \
  --rdzv_backend=c10d --rdzv_endpoint="$first:${PORT:-29500}" --rdzv_id="$SLURM_JOB_ID" \
  -m preftree "$@"
