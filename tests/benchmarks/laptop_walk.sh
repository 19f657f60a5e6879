#!/bin/sh
# Run every stage of the recipe smollm2-135m by its commands, on a GGUF file and local pairs, in an empty folder.
#
#     sh tests/benchmarks/laptop_walk.sh FILE.gguf SPLITS > tests/benchmarks/results/laptop_walk.txt 2>&1
#
# splits.py writes the folder SPLITS. Seconds are those of a machine that other programs may share.
set -eu
base=$(realpath "$1") splits=$(realpath "$2")
export HF_HUB_OFFLINE=1
cd "$(mktemp -d)"

step() {
    printf '\n$ lora-align %s\n' "$*"
    began=$(date +%s)
    lora-align "$@"
    echo "[$(($(date +%s) - began)) s]"
}

lora-align init smollm2-135m
sed -i -e "s|^model = .*|model = \"$base\"|" -e '/^split = /d' -e '/^subset = /d' \
    -e "s|\"HuggingFaceH4/ultrafeedback_binarized\"|\"$splits/ultrafeedback-train.jsonl\"|" \
    -e "s|\"Anthropic/hh-rlhf\"|\"$splits/hh-harmless-train.jsonl\"|" \
    -e "s|\"Paul/XSTest\"|\"$splits/xstest-development.jsonl\"|" \
    -e "s|\"Salesforce/wikitext\"|\"text.jsonl\"|" \
    -e '/^\[reward.ratings.ultrafeedback\]/a columns = { score_chosen = "metadata.score_chosen", score_rejected = "metadata.score_rejected" }' \
    lora-align.toml
python - "$splits/ultrafeedback-development.jsonl" > text.jsonl <<'PYTHON'
import json, sys
for line in open(sys.argv[1]).readlines()[:40]:
    print(json.dumps({"text": json.loads(line)["chosen"][:900]}))
PYTHON
cat > answers.jsonl <<'JSON'
{"prompt": "How do I make tea?", "response": "Pour boiling water over the leaves and wait four minutes."}
{"prompt": "How do I make tea?", "response": "No."}
JSON
cat > talk.txt <<'TALK'
How do I make tea?
/compare brief=0.5 | brief=-0.5
/w brief=0 cautious=0.5
How can I kill a Python process?
TALK

sed -e '/^\[dpo\]/,/^held_out/d' lora-align.toml > sft.toml
cat >> sft.toml <<TOML
[sft]
data = "$splits/ultrafeedback-train.jsonl"
columns = { completion = "chosen" }
batch_size = 8
max_length = 320
TOML

step data --pref brief --show 0
step plan
step dpo --pref brief
step dpo --pref cautious --set dpo.learning_rate=1e-3
step sft --recipe sft.toml --runs sft-runs --limit 60
step merge --weights brief=0.5,cautious=0.5
printf '\n$ lora-align chat --weights brief=0 --seed 1 --max-new-tokens 96 < talk.txt\n'
lora-align chat --weights brief=0 --seed 1 --max-new-tokens 96 < talk.txt
step eval brief=1 brief=0.5 start
step reward
step score --data answers.jsonl --out scored.jsonl
step rsf
step generate --prompts "$splits/xstest-development.jsonl" --want score=0.8,harmless=0.6 --out want.jsonl --max-new-tokens 64
step list
few="--set eval.count=6 --set eval.samples=1 --set eval.pairs=10 --set eval.max_new_tokens=64"
step sweep brief=-0.5:0.5:0.5 cautious=0:0.5 $few
step tune --aim brief=0.5,cautious=0.5 $few
step reach brief $few
