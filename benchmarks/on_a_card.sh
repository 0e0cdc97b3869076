#!/usr/bin/env bash
# Everything in the project that waits for a graphics card, in parts of under ten minutes each:
#
#     benchmarks/on_a_card.sh tests     every GPU test, the kernels' self-check
#     benchmarks/on_a_card.sh small     training speed, embedded base: ours beside transformers and PEFT
#     benchmarks/on_a_card.sh 7b        Qwen-7B and Qwen3-8B shapes, random weights, length 512
#     benchmarks/on_a_card.sh long      the same at length 2,048
#     benchmarks/on_a_card.sh serve     tokens a second with eight adapters
#     benchmarks/on_a_card.sh memory    presets under a cap of 24 and 8 GiB: the plan's peak beside the measured one
#
# Lines go to benchmarks/results/*.jsonl with the card's name and the versions. Nothing is installed or fetched: run it
# where `pip install -e ".[dev]"` was done beside a CUDA build of torch. RESULTS=FOLDER copies the lines there, too.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
export PYTHONPATH=src PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
trap 'if [ -n "${RESULTS:-}" ]; then cp benchmarks/results/*.jsonl "$RESULTS"/; fi' EXIT

train() { "$PYTHON" benchmarks/train.py --device cuda --no-several-answers "$@"; }
card() {
  "$PYTHON" -c "import torch; assert torch.cuda.is_available(), 'torch sees no CUDA device here'; print(torch.cuda.get_device_name(0), torch.__version__)"
}
case "${1:-}" in
tests) card; "$PYTHON" -m pytest -m gpu tests/gpu -q ;;
small) card; train --rounds 3 ;;
7b)
  card
  train --model random:Qwen-7B --r 64 --rounds 2 --rows 64 --peer-rows 32 --seed-rows 16
  train --model random:Qwen3-8B --r 16 --rounds 2 --rows 64 --ours-only
  ;;
long)
  card
  train --model random:Qwen-7B --r 64 --max-length 2048 --stretch 2048 --rounds 2 --rows 32 --ours-only --checkpointing
  train --model random:Qwen3-8B --r 16 --max-length 2048 --stretch 2048 --rounds 2 --rows 32 --ours-only --checkpointing
  ;;
memory) card; "$PYTHON" benchmarks/memory.py --device cuda ;;
serve) card; "$PYTHON" benchmarks/serve.py --device cuda --rounds 15 ;;
*)
  sed -n '2,11s/^# \{0,1\}//p' "$0"
  exit 2
  ;;
esac
