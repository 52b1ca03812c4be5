#!/usr/bin/env bash
# The benchmarks of a GPU, in at most twenty minutes. Each part has a time limit, and the next one starts however the
# part ended. The most valuable parts are first; the last ones are skipped when no time is left. Results are written to
# benchmarks/results/<name of the GPU>/: summary.txt, and the output of each part.
#
#   pip install -r requirements-dev.txt -r benchmarks/requirements.txt
#   benchmarks/gpu.sh                       # PYTHON=... chooses the Python
#   benchmarks/gpu.sh --train               # also two runs of ViT-B_16 at 224: 20,000 steps of 128 from scratch, and
#                                           # 10,000 of 512 as in fine-tuning, from PRETRAINED=PATH.npz if it is given
#   DATA_DIR=path benchmarks/gpu.sh --train # CIFAR-10 there: folders train/ and test/, or torchvision's files
#   benchmarks/gpu.sh --dry                 # the same parts on a CPU with the smallest models, to test this script

set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

train=false
dry=false
for flag in "$@"; do
    case $flag in
        --train) train=true ;;
        --dry) dry=true ;;
        *) echo "gpu.sh: unknown flag $flag; the flags are --train and --dry" >&2; exit 2 ;;
    esac
done

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
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT
if $dry; then
    out=$runs/results
else
    name=$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-").replace("/", "-"))')
    out=benchmarks/results/$name
fi
mkdir -p "$out"
: >"$out/summary.txt"
deadline=$((SECONDS + 1200))

# part NAME SECONDS COMMAND...: writes its output to NAME.txt, and one line to the summary
part() {
    local name=$1 limit=$2 start=$SECONDS end
    shift 2
    [ "$limit" -gt $((deadline - SECONDS)) ] && limit=$((deadline - SECONDS))
    if [ "$limit" -lt 15 ]; then
        printf '%-28s          skipped: no time is left\n' "$name" | tee -a "$out/summary.txt"
        return
    fi
    timeout --kill-after=10 "$limit" "$@" >"$out/$name.txt" 2>"$out/$name.log"
    case $? in
        0) end=done; [ -s "$out/$name.log" ] || rm "$out/$name.log" ;;
        124 | 137) end="stopped at its limit of ${limit} s, or for lack of memory; see $out/$name.log" ;;
        *) end="failed: $(tail -n 1 "$out/$name.log")" ;;
    esac
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

if $dry; then
    small=(--img_size 32 --batch_size 2 --rounds 1)
    part tests 120 "$python" -m pytest -q tests/test_cuda.py
    benchmark end_to_end 120 end_to_end "${small[@]}" --num_steps 2 --first_steps 2 --images 20
    throughput throughput-bf16 120 --model_type ViT-Ti_16 ResNet-Mini_Flops "${small[@]}"
    benchmark kernels 120 kernels --model_type ViT-Mini_4 "${small[@]}"
    benchmark growth 120 growth --model_type ViT-Mini_4 --model_types ViT-Nano_4 ViT-Mini_4 --batch_sizes 1 2 \
        --img_sizes 16 32 "${small[@]}" --figure "$out/growth.png"
    throughput norms 120 --compare norms --model_type ViT-Mini_4 "${small[@]}"
    benchmark token_reduction 120 token_reduction_speed --model_type ViT-Mini_4 "${small[@]}"
    benchmark models 120 throughput --compare models --model_type ViT-Mini_4 ResNet-Mini_Flops "${small[@]}"
    benchmark data_loading 120 data_loading --images 8 --batch_size 4 --img_size 32 --rounds 1 --num_workers 1
else
    cnns=(ResNet50x3_Params ResNet50x3_Flops)
    part tests 120 "$python" -m pytest -q tests/test_cuda.py
    benchmark end_to_end 170 end_to_end --model_type ViT-B_16 --img_size 224 --batch_size 512 --compile \
        --num_steps 60 --first_steps 20 --rounds 2
    throughput vit-compiled 150 --model_type ViT-B_16 --batch_size 128 512 --rounds 3 --compile
    benchmark kernels-vit 60 kernels --model_type ViT-B_16 --batch_size 512 --compile
    benchmark kernels-hybrid 120 kernels --model_type R50-ViT-B_16 --batch_size 128 --compile
    throughput vit-eager 150 --model_type ViT-B_16 --batch_size 1 16 64 256 max --rounds 3
    throughput cnns-compiled 180 --model_type R50-ViT-B_16 "${cnns[@]}" --batch_size 128 --rounds 3 --compile
    throughput cnns-eager 120 --model_type R50-ViT-B_16 "${cnns[@]}" BiT-M-R50x3 --batch_size 64 --rounds 3
    throughput vit-fp16 90 --precision fp16 --fp16_opt_level O1 O2 --batch_size 128 --rounds 3
    throughput vit-fp32 90 --precision fp32 --batch_size 64 --rounds 3
    benchmark growth 150 growth --model_type ViT-B_16 --batch_size 64 --rounds 3 \
        --batch_sizes 1 16 64 256 512 1024 --figure "$out/growth.png"
    throughput norms-compiled 60 --compare norms --batch_size 128 --rounds 3 --compile
    throughput norms-eager 45 --compare norms --batch_size 128 --rounds 3
    benchmark token_reduction 75 token_reduction_speed --batch_size 128 --rounds 3
    benchmark models 75 throughput --compare models --model_type R50-ViT-B_16 "${cnns[@]}" ViT-B_16 \
        --batch_size 64 --rounds 3 --figure "$out/costs.png"
    benchmark data_loading 60 data_loading --rounds 2
    if $train; then
        deadline=$((SECONDS + 3600))
        shared=(--output_dir "$runs" "${data[@]}" --model_type ViT-B_16 --eval_batch_size 250 --bf16 --compile)
        part from_scratch 1500 "$python" train.py --name from_scratch "${shared[@]}" --train_batch_size 128 \
            --num_steps 20000 --learning_rate 0.05 --eval_every 2000
        part fine_tune 2000 "$python" train.py --name fine_tune "${shared[@]}" --train_batch_size 512 \
            --num_steps 10000 --eval_every 1000 ${PRETRAINED:+--pretrained_dir "$PRETRAINED"}
        for run in from_scratch fine_tune; do
            cp "$runs/$run/metrics.csv" "$out/$run.csv" 2>/dev/null
        done
    fi
fi

$dry || echo "results in $out"
echo "$SECONDS s in total" | tee -a "$out/summary.txt"
