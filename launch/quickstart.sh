#!/usr/bin/env bash
# From a fresh clone to a tuned adapter: environment, backbone and data, training under ZeRO-2, summary.
#   bash launch/quickstart.sh [--section.key value ...]     (the arguments go to dora_dist.train)
# Two CPU processes where there is no GPU, one process per GPU where there are some.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh
ensure_environment ""

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -gt 0 ]; then
  launch=(--config_file launch/zero2_gpu.yaml --num_processes "$gpus")
  set -- --training.per_device_train_batch_size $((gpus < 16 ? 16 / gpus : 1)) "$@"
else
  launch=(--config_file launch/zero2_cpu.yaml)
  export DS_ACCELERATOR=cpu
fi
python -m dora_dist.quickstart --output .cache/quickstart
[ "$gpus" -gt 0 ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(threads_per_process 2)}"
accelerate launch "${launch[@]}" --main_process_port 0 -m dora_dist.train --config configs/quickstart.yaml \
  --output_dir "runs/quickstart-$(date +%Y%m%d-%H%M%S)" "$@"
