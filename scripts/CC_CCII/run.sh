#!/usr/bin/env bash
# CC_CCII: normal, COVID-19 or common pneumonia, CT. Fine-tunes a ViT-B/16 classifier; accuracy and AUC of the validation cases.
#
#   python -m scripts.convert_cc_ccii --data CC-CCII --out data/CC_CCII       once: the published pictures to volumes
#   bash scripts/CC_CCII/run.sh --init runs/glmae/checkpoint-1599.pth
#   bash scripts/CC_CCII/run.sh --init runs/glmae/checkpoint-1599.pth --freeze          linear: the last layer alone
#   bash scripts/CC_CCII/run.sh --help                 every setting, with the values of this recipe
#
# Arguments go to Finetune.main_finetune and win over the ones below. OUT: folder of the run; classification.csv and .json are there.
# Hardware: one GPU of 24 GB (expected). Time and result: not measured by us.
# From the papers: 384 x 384 x 32 voxels, min-max intensities. Ours: everything else, and folds by patient.

source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"

data="${DATA:-data/CC_CCII}"
out="${OUT:-runs/CC_CCII}"

launch Finetune.main_finetune --preset CC_CCII --data "$data" --out_dir "$out" --fold 0 \
  --model classifier --size base --patch_size 16 \
  --epochs 50 --warmup_epochs 5 --lr 1e-4 --weight_decay 0.05 --clip_grad 1 \
  --batch_size 16 --micro_batch_size 2 --validate_every 5 --seed 0 \
  "$@"
