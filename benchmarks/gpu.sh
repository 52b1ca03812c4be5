#!/usr/bin/env bash
# The benchmarks of a GPU, the most valuable ones first, in pieces: the same command continues with what is not done.
# Each part has a time limit, and the next one starts however the part ended. Results are written to
# benchmarks/results/<name of the GPU>/: summary.txt, and the output of each part. Delete a part's line in summary.txt
# to measure it again.
#
#   pip install -r requirements-dev.txt -r benchmarks/requirements.txt
#   benchmarks/gpu.sh                       # at most twenty minutes; PYTHON=... chooses the Python
#   benchmarks/gpu.sh --minutes 9           # at most nine
#   benchmarks/gpu.sh --train               # also the long runs, at most an hour: CIFAR-10 from scratch with small
#                                           # models, the norms of ViT-B_16 and B_32, fine-tuning ViT-B_16 (from
#                                           # PRETRAINED=PATH.npz if it is given), the studies. They resume.
#   DATA_DIR=path benchmarks/gpu.sh --train # CIFAR-10 there: folders train/ and test/, or torchvision's files
#   OUT=path benchmarks/gpu.sh              # write the results there
#   benchmarks/gpu.sh --dry [--train]       # the same parts on a CPU with the smallest models, to test this script

set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

train=false
dry=false
minutes=
while [ $# -gt 0 ]; do
    case $1 in
        --train) train=true ;;
        --dry) dry=true ;;
        --minutes)
            minutes=${2:-}
            [[ $minutes =~ ^[1-9][0-9]*$ ]] || { echo "gpu.sh: --minutes needs a whole number above 0" >&2; exit 2; }
            shift
            ;;
        *) echo "gpu.sh: unknown flag $1; the flags are --minutes N, --train and --dry" >&2; exit 2 ;;
    esac
    shift
done
$train && minutes=${minutes:-60}

python=${PYTHON:-python}
[ -x .venv/bin/python ] && python=${PYTHON:-.venv/bin/python}
data_dir=${DATA_DIR:-data}
if [ -d "$data_dir/train" ]; then
    data=(--dataset imagefolder --data_dir "$data_dir")
else
    data=(--dataset cifar10 --data_dir "$data_dir")
fi

if ! $dry && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: no GPU that PyTorch can use; --dry tests the script on a CPU" >&2
    exit 2
fi
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
runs=output/gpu
if $dry; then
    runs=$temporary/runs
    out=${OUT:-$temporary/results}
else
    name=$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-").replace("/", "-"))')
    out=${OUT:-benchmarks/results/$name}
fi
mkdir -p "$out"
touch "$out/summary.txt"
deadline=$((SECONDS + 60 * ${minutes:-20}))

# part NAME SECONDS COMMAND...: writes its output to NAME.txt, and one line to the summary
part() {
    local name=$1 limit=$2 start=$SECONDS end
    shift 2
    if grep -q "^$name .* done$" "$out/summary.txt"; then
        return
    fi
    [ "$limit" -gt $((deadline - SECONDS)) ] && limit=$((deadline - SECONDS))
    if [ "$limit" -lt 15 ]; then
        printf '%-28s          skipped: no time is left\n' "$name"
        return
    fi
    timeout --kill-after=10 "$limit" "$@" >"$out/$name.txt" 2>"$out/$name.log"
    case $? in
        0) end=done; [ -s "$out/$name.log" ] || rm "$out/$name.log" ;;
        124 | 137) end="stopped at its limit of ${limit} s, or for lack of memory; see $out/$name.log" ;;
        *) end="failed: $(tail -n 1 "$out/$name.log")" ;;
    esac
    sed -i "/^$name /d" "$out/summary.txt"
    printf '%-28s %5d s  %s\n' "$name" $((SECONDS - start)) "$end" | tee -a "$out/summary.txt"
}

# benchmark NAME SECONDS SCRIPT FLAGS...
benchmark() {
    local name=$1 limit=$2 script=$3
    shift 3
    part "$name" "$limit" "$python" "benchmarks/$script.py" "$@"
}

throughput() { # NAME SECONDS FLAGS...
    local name=$1 limit=$2
    shift 2
    benchmark "$name" "$limit" throughput --json "$out/$name.json" "$@"
}

train() { # NAME SECONDS FLAGS...
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$python" train.py --name "$name" --output_dir "$runs" --resume "$@"
}

study() { # NAME SECONDS FLAGS...
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$python" "scripts/$name.py" --output_dir "$runs/$name" --results "$out/$name" "$@"
}

if $dry; then  # with long limits, because other work may slow a CPU down
    small=(--img_size 32 --batch_size 2 --rounds 1)
    part tests 900 "$python" -m pytest -q tests/test_cuda.py
    benchmark end_to_end 900 end_to_end "${small[@]}" --num_steps 2 --first_steps 2 --images 20
    throughput throughput-bf16 900 --model_type ViT-Ti_16 ResNet-Mini_Flops "${small[@]}"
    benchmark kernels 900 kernels --model_type ViT-Mini_4 "${small[@]}"
    benchmark growth 900 growth --model_type ViT-Mini_4 --model_types ViT-Nano_4 ViT-Mini_4 --batch_sizes 1 2 \
        --img_sizes 16 32 "${small[@]}" --figure "$out/growth.png"
    throughput norms 900 --compare norms --model_type ViT-Mini_4 "${small[@]}"
    benchmark token_reduction 900 token_reduction_speed --model_type ViT-Mini_4 "${small[@]}"
    benchmark models 900 throughput --compare models --model_type ViT-Mini_4 ResNet-Mini_Flops "${small[@]}"
    benchmark data_loading 900 data_loading --images 8 --batch_size 4 --img_size 32 --rounds 1 --num_workers 1
else
    cnns=(ResNet50x3_Params ResNet50x3_Flops)
    part tests 180 "$python" -m pytest -q tests/test_cuda.py
    throughput cnns-compiled 180 --model_type R50-ViT-B_16 "${cnns[@]}" --batch_size 128 --rounds 3 --compile
    throughput cnns-eager 120 --model_type R50-ViT-B_16 "${cnns[@]}" BiT-M-R50x3 --batch_size 64 --rounds 3
    benchmark kernels-hybrid 120 kernels --model_type R50-ViT-B_16 --batch_size 128 --compile
    throughput norms-eager 45 --compare norms --batch_size 128 --rounds 3
    throughput norms-compiled 60 --compare norms --batch_size 128 --rounds 3 --compile
    benchmark token_reduction 75 token_reduction_speed --batch_size 128 --rounds 3
    benchmark end_to_end 170 end_to_end --model_type ViT-B_16 --img_size 224 --batch_size 512 --compile \
        --num_steps 60 --first_steps 20 --rounds 2
    throughput vit-compiled 150 --model_type ViT-B_16 --batch_size 128 512 --rounds 3 --compile
    benchmark kernels-vit 60 kernels --model_type ViT-B_16 --batch_size 512 --compile
    benchmark end_to_end-small 120 end_to_end --model_type ViT-Mini_4 --img_size 32 --batch_size 1024 --compile \
        --images 50000 --num_steps 400 --first_steps 100 --rounds 2
    throughput small-compiled 120 --model_type ViT-Nano_4 ViT-Mini_4 R26-ViT-Mini_4 ResNet-Mini_Params --img_size 32 \
        --batch_size 1024 --rounds 3 --compile
    benchmark growth 150 growth --model_type ViT-B_16 --batch_size 64 --rounds 3 \
        --model_types ViT-Ti_16 ViT-S_16 ViT-B_16 ViT-L_16 ViT-H_14 \
        --batch_sizes 1 16 64 256 512 1024 --figure "$out/growth.png"
    throughput vit-eager 150 --model_type ViT-B_16 --batch_size 1 16 64 256 max --rounds 3
    throughput vit-fp16 90 --precision fp16 --fp16_opt_level O1 O2 --batch_size 128 --rounds 3
    throughput vit-fp32 90 --precision fp32 --batch_size 64 --rounds 3
    benchmark models 75 throughput --compare models --model_type R50-ViT-B_16 "${cnns[@]}" ViT-B_16 \
        --batch_size 64 --rounds 3 --figure "$out/costs.png"
    benchmark data_loading 60 data_loading --rounds 2
fi

if $train && $dry; then
    tiny=(--dataset digits --img_size 8 --train_batch_size 8)
    train scratch-ViT-Mini_4 900 "${tiny[@]}" --model_type ViT-Mini_4 --recipe scratch --num_steps 2 --test_at_end
    part norms-ViT-B_32 900 "$python" scripts/norm_study.py --dry_run --output_dir "$runs/norms" --model_types ViT-Mini_4 \
        --starts scratch "${tiny[@]}"
    train fine_tune 900 "${tiny[@]}" --model_type ViT-Mini_4 --num_steps 2 --eval_every 2
    for name in hybrid_vs_cnn norm_findings token_study; do
        study "$name" 900 --dataset digits --img_size 8 --epochs 0.1 --grid_epochs 0.1 --jobs 4 --dry_run
    done
    study pretraining_study 900 --dataset digits --img_size 8 --source 0 1 2 3 4 --target 5 6 7 8 9 --sizes 10 --dry_run
elif $train; then
    for model in ViT-Mini_4 R26-ViT-Mini_4 ResNet-Mini_Params; do
        train "scratch-$model" 900 "${data[@]}" --model_type "$model" --recipe scratch --epochs 100 --test_at_end --bf16 \
            --compile
    done
    large=("${data[@]}" --eval_batch_size 250 --bf16 --compile)
    norms=("$python" scripts/norm_study.py --output_dir "$runs/norms" --starts scratch)
    part norms-ViT-B_16 1500 "${norms[@]}" --model_types ViT-B_16 --norm_types LN "${large[@]}"
    part norms-ViT-B_32 1500 "${norms[@]}" --model_types ViT-B_32 "${large[@]}"
    train fine_tune 2000 "${large[@]}" --model_type ViT-B_16 --train_batch_size 512 --num_steps 10000 --eval_every 1000 \
        ${PRETRAINED:+--pretrained_dir "$PRETRAINED"}
    for name in hybrid_vs_cnn norm_findings token_study; do  # with ten times the epochs of these studies on a CPU
        study "$name" 3000 "${data[@]}" --epochs 100 --grid_epochs 10 --jobs 4
    done
    study pretraining_study 3000 "${data[@]}" --jobs 4
fi

$dry || echo "results in $out"
echo "$SECONDS s in total"
