#!/usr/bin/env bash
# One process for each GPU of this node (DDP: each holds the whole model):
#   examples/launch/node.sh dpo --config examples/dpo.yaml
# PROCESSES: how many, if not one for each GPU.
set -euo pipefail
exec torchrun --standalone --nproc_per_node="${PROCESSES:-gpu}" -m preftree "$@"
