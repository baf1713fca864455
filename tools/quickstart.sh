#!/usr/bin/env bash
# From a fresh machine to a trained translator: environment, corpus, training on two processes, translations, score, curves.
# Needs no download besides Python packages: the corpus comes from dstrain's own English-German grammar.
#   bash tools/quickstart.sh [DIRECTORY]     default: quickstart/ in the checkout; run again to continue or to look again
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment "[plots]"
WORK=$(mkdir -p "${1:-$ROOT/quickstart}" && cd "${1:-$ROOT/quickstart}" && pwd)
RECIPE=translation/quickstart
cd "$WORK"

show() { printf '\n$ %s\n' "$*" >&2; "$@"; }

say "1. prepare: 20,000 generated sentence pairs -> SentencePiece model and Arrow shards"
show dstrain prepare $RECIPE --output data

processes=$(python -c 'import torch; print(min(2, torch.cuda.device_count()) or 2)')
say "2. train: $processes processes, ZeRO-1"
show deepspeed --num_gpus "$processes" --master_port "$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')" \
  --module dstrain train $RECIPE --data data --output run

say "3. translate the held-out test sentences and score them"
show dstrain text data --split test --output test --overwrite
show dstrain generate run/bundles/best --input test/source.txt --output test/hypothesis.txt --overwrite
show dstrain evaluate --hypothesis test/hypothesis.txt --reference test/target.txt | tee test/scores.txt

say "4. draw the curves"
show dstrain report run

say "ten translations of unseen sentences"
paste -d '\n' <(sed 's/^/  source      /' test/source.txt) <(sed 's/^/  translation /' test/hypothesis.txt) \
  <(sed 's/^/  reference   /' test/target.txt) | awk 'NR % 3 == 1 && NR > 1 && NR <= 30 {print ""} NR <= 30'

say "scores on $(wc -l <test/source.txt) sentences of unseen combinations"
cat test/scores.txt

say "where everything lies"
cat <<TEXT
  $WORK/data                 tokenizer and shards
  $WORK/run/bundles/best     the trained model: source $VENV/bin/activate; dstrain interactive $WORK/run/bundles/best
  $WORK/run/events.jsonl     every number of the run
  $WORK/run/report.png       the loss curve (run/report.html: all curves on one page)
  $WORK/test/hypothesis.txt  translations
TEXT
