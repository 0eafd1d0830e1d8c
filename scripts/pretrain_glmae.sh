#!/usr/bin/env bash
# GL-MAE on the CT volumes of BTCV and TCIA-Covid19: ViT-B, global views of 160^3, local views of 96^3, 1600 epochs.
#
#   NPROC=8 bash scripts/pretrain_glmae.sh --out_dir runs/glmae_1k
#   NPROC=8 bash scripts/pretrain_glmae.sh --datasets 1k LUNA16         other sets of Pretrain/datasets/; or --datalist /data/my_ct
#   bash scripts/pretrain_glmae.sh --decoder cross --decode_fraction 0.25                    cheaper: a quarter of the removed patches is decoded
#   bash scripts/pretrain_glmae.sh --local_views 4                                           cheaper: half the local views
#   bash scripts/pretrain_glmae.sh --help                               every setting, with the values of this recipe
#
# Arguments are passed on to the program and override the values below. NPROC: number of processes, one per GPU.
# Data: BTCV's 24 training volumes and all of TCIA-Covid19 that is found (771 are published; the papers use 722, and which ones is not in what we
# could read). 5 % of the volumes are held out for the measures of health, unless --holdout 0 is given.
# Hardware: GPUs of 24 GB or more. Expected, not measured here.
# Time: 2.6 EFLOP for 746 volumes, about 36 h on one GPU at 20 TFLOP/s. Computed from 2.2 TFLOP per volume and epoch; the full run was not made
# here.
# Result: checkpoint-1599.pth, for scripts/BTCV/run.sh.
#
# From the paper (arXiv 2306.08913, figure and Table I) or its released files: view sizes, ViT-B/16, HU -1000..1000, foreground crop,
# 1600 epochs, a teacher that sees unmasked global views, four loss terms.
# Our choice, because no source we could read states it: 2 global and 8 local views, resized crops and their scales, flips, mask ratio
# 0.6, decoder 576/8/16, normalised targets, the projection head and its 4096 prototypes, temperatures, centre, momentum, loss weights
# 1/1/1/1, the patch embedding initialised for the mean and spread of the data, AdamW with lr 1.5e-4 per 256 views, 40 epochs of warm-up,
# 32 volumes per update, gradient norm clipped at 3, bf16.

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

read -ra data <<<"$(pretraining_data "$@")"

launch Pretrain.main_pretrain \
  --method glmae \
  --model base --patch_size 16 --decoder_embed_dim 576 --decoder_depth 8 --decoder_num_heads 16 --standardize \
  ${data[@]+"${data[@]}"} --cache_dir cache \
  --intensity window --low -1000 --high 1000 --spacing none \
  --global_views 2 --global_size 160 --global_scale 0.5 1.0 \
  --local_views 8 --local_size 96 --local_scale 0.2 0.5 \
  --crop_mode resize --flip_prob 0.2 \
  --mask_ratio_global 0.6 --mask_ratio_local 0.6 --norm_pix_loss \
  --weight_rec_global 1 --weight_rec_local 1 --weight_global_global 1 --weight_global_local 1 \
  --consistency ce --gg_pairs all --out_dim 4096 --hidden_dim 2048 --bottleneck_dim 256 \
  --student_temp 0.1 --teacher_temp 0.04 0.07 --teacher_temp_epochs 30 \
  --momentum 0.996 1.0 --center_momentum 0.9 --freeze_last_layer 1 \
  --epochs 1600 --warmup_epochs 40 --batch_size 32 --micro_batch_size 1 --blr 1.5e-4 --weight_decay 0.05 --clip_grad 3 \
  --save_every 100 --seed 0 \
  --out_dir runs/glmae \
  --recipe scripts/pretrain_glmae.sh "$@"
