#!/usr/bin/env bash
# What wants a GPU, in twenty minutes at most: tests, speed, memory, and what the fast path costs in accuracy.
# Each part has a time limit, and the next one starts whatever has become of it; the first are the most wanted, the last
# are left out where time is over. Results go to benchmarks/results/<the GPU's name>/: summary.txt, and each part's output.
#
#   pip install -r requirements-dev.txt -r benchmarks/requirements.txt
#   benchmarks/gpu.sh                       # PYTHON=... chooses the Python
#   benchmarks/gpu.sh --train               # then also two runs of ViT-B_16 at 224: 20,000 steps of 128 from scratch, and
#                                           # 10,000 of 512 as in fine-tuning, from PRETRAINED=PATH.npz if that is given
#   DATA_DIR=path benchmarks/gpu.sh         # CIFAR-10 there: folders train/ and test/, or where torchvision puts it
#   benchmarks/gpu.sh --dry                 # the same parts on a CPU and as small as they go, to try this script out

set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

train=false
dry=false
for flag in "$@"; do
    case $flag in
        --train) train=true ;;
        --dry) dry=true ;;
        *) echo "gpu.sh: unknown flag $flag; it knows --train and --dry" >&2; exit 2 ;;
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
    echo "gpu.sh: no GPU that PyTorch can use; --dry tries the script out on a CPU" >&2
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

# part NAME SECONDS COMMAND...: its output in NAME.txt, its end as a line of the summary
part() {
    local name=$1 limit=$2 start=$SECONDS end
    shift 2
    [ "$limit" -gt $((deadline - SECONDS)) ] && limit=$((deadline - SECONDS))
    if [ "$limit" -lt 15 ]; then
        printf '%-28s          left out: the time is over\n' "$name" | tee -a "$out/summary.txt"
        return
    fi
    timeout --kill-after=10 "$limit" "$@" >"$out/$name.txt" 2>"$out/$name.log"
    case $? in
        0) end=done; [ -s "$out/$name.log" ] || rm "$out/$name.log" ;;
        124 | 137) end="stopped at its limit of ${limit} s, or for want of memory, see $out/$name.log" ;;
        *) end="failed: $(tail -n 1 "$out/$name.log")" ;;
    esac
    printf '%-28s %5d s  %s\n' "$name" $((SECONDS - start)) "$end" | tee -a "$out/summary.txt"
}

throughput() { # NAME SECONDS FLAGS...
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$python" benchmarks/throughput.py --json "$out/$name.json" "$@"
}

if $dry; then
    small=(--img_size 32 --batch_size 2 --rounds 1)
    part tests 120 "$python" -m pytest -q tests/test_cuda.py
    throughput throughput-bf16 120 --model_type ViT-Ti_16 ResNet-Mini_Flops "${small[@]}"
    part kernels 120 "$python" benchmarks/kernels.py --model_type ViT-Mini_4 "${small[@]}"
    part norms 120 "$python" benchmarks/norms.py --model_type ViT-Mini_4 "${small[@]}"
    part token_reduction 120 "$python" benchmarks/token_reduction.py --model_type ViT-Mini_4 "${small[@]}"
    part compare_models 120 "$python" benchmarks/compare_models.py ViT-Mini_4 ResNet-Mini_Flops "${small[@]}"
    part growth 120 "$python" benchmarks/growth.py --model_type ViT-Mini_4 --model_types ViT-Nano_4 ViT-Mini_4 \
        --batch_sizes 1 2 --img_sizes 16 32 "${small[@]}" --picture "$out/growth.png"
    part end_to_end 120 "$python" benchmarks/end_to_end.py "${small[@]}" --num_steps 2 --first_steps 2 --pictures 20
    part fast_path 120 "$python" scripts/fast_path.py --dataset digits --num_steps 2 --seeds 0 \
        --output_dir "$runs/fast_path" --figure "$out/fast_path.png" --model_type ViT-Mini_4 --img_size 8 \
        --train_batch_size 4
    part startup 300 "$python" benchmarks/startup.py --model_type ViT-Ti_16 --img_size 32 --batch_size 2 --rounds 1 \
        --dataset digits
else
    part tests 120 "$python" -m pytest -q tests/test_cuda.py
    # what the targets are about first
    part end_to_end 170 "$python" benchmarks/end_to_end.py --model_type ViT-B_16 --img_size 224 --batch_size 512 \
        --compile --num_steps 60 --first_steps 20 --rounds 2
    throughput vit-compiled 150 --model_type ViT-B_16 --batch_size 128 512 --rounds 3 --compile
    part kernels-vit 60 "$python" benchmarks/kernels.py --model_type ViT-B_16 --batch_size 512 --compile
    part kernels-hybrid 120 "$python" benchmarks/kernels.py --model_type R50-ViT-B_16 --batch_size 128 --compile
    throughput vit-eager 150 --model_type ViT-B_16 --batch_size 1 16 64 256 max --rounds 3
    throughput hybrid-and-cnns-compiled 180 --model_type R50-ViT-B_16 ResNet50x3_Params ResNet50x3_Flops \
        --batch_size 128 --rounds 3 --compile
    throughput hybrid-and-cnns-eager 120 --model_type R50-ViT-B_16 ResNet50x3_Params ResNet50x3_Flops BiT-M-R50x3 \
        --batch_size 64 --rounds 3
    throughput vit-fp16 90 --model_type ViT-B_16 --precision fp16 --fp16_opt_level O1 O2 --batch_size 128 --rounds 3
    throughput vit-fp32 90 --model_type ViT-B_16 --precision fp32 --batch_size 64 --rounds 3
    part fast_path 150 "$python" scripts/fast_path.py "${data[@]}" --output_dir "$runs/fast_path" \
        --figure "$out/fast_path.png"
    part growth 150 "$python" benchmarks/growth.py --model_type ViT-B_16 --batch_size 64 --rounds 3 \
        --batch_sizes 1 16 64 256 512 1024 --picture "$out/growth.png"
    part norms-compiled 60 "$python" benchmarks/norms.py --batch_size 128 --rounds 3 --compile
    part norms-eager 45 "$python" benchmarks/norms.py --batch_size 128 --rounds 3
    part token_reduction 75 "$python" benchmarks/token_reduction.py --batch_size 128 --rounds 3
    part compare_models 75 "$python" benchmarks/compare_models.py --batch_size 64 --rounds 3 --picture "$out/costs.png"
    part startup 90 "$python" benchmarks/startup.py --rounds 2
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
echo "$SECONDS s in all" | tee -a "$out/summary.txt"
