#!/usr/bin/env bash
# sample_abdomen: BTCV's organs on two real CT scans. One is used for training, the other (a DICOM series) for prediction and scoring.
#
#   bash scripts/sample_abdomen/run.sh --init scratch
#   bash scripts/sample_abdomen/run.sh --help    all settings, with the values of this recipe
#
# Arguments are passed on to Finetune.main_finetune and override the values below. OUT: folder of the run.
#
# Hardware: two CPU cores. Time: minutes. Two scans are no benchmark: the run shows that the programs work together, not how well a
# method does. The labels come from a model.

source "$(dirname "${BASH_SOURCE[0]}")/../finetune.sh"

data="${DATA:-data/sample_abdomen}"
out="${OUT:-runs/sample_abdomen}"
volumes="$data/imagesTs" labels="$data/labelsTs" images="$data/imagesTs"

case " $* " in *" --help "* | *" -h "*) ;; *) "$PYTHON" -m scripts.make_sample_data --out "$data" ;; esac
finetune sample_abdomen \
  --model unetr --size tiny --depth 6 --patch_size 8 --feature_size 8 --roi 64 \
  --epochs 60 --warmup_epochs 2 --lr 1e-3 --weight_decay 1e-5 --clip_grad 1 \
  --batch_size 1 --micro_batch_size 1 --crops 2 --validate_every 0 --overlap 0.5 --blending gaussian --seed 0 --workers 0 \
  --recipe scripts/sample_abdomen/run.sh "$@"
