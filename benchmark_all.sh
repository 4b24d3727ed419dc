#!/usr/bin/env bash
# The sweep: benchmark.py for every precision, model and batch size, then the table and the pictures.
#
#   bash benchmark_all.sh                                     the founding sweep
#   MODELS="google/vit-base-patch16-224" BATCH_SIZES="1 8" PRECISIONS="fp32 fp16" bash benchmark_all.sh -- --iterations 100
#
# MODELS, BATCH_SIZES   what to run, separated by spaces
# PRECISIONS            likewise (default: fp32)
# RESULTS               the CSV that rows are appended to (default: results/benchmark.csv beside this script)
# PYTHON                the interpreter (default: python)
# Options after -- go to benchmark.py unchanged. A case that fails does not stop the sweep. Exit code:
# 0 all rows ok, 1 not all, 2 bad arguments of this script, 130 interrupted.
set -u

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
read -ra models <<<"${MODELS:-facebook/convnext-tiny-224 microsoft/resnet-50}"
read -ra batch_sizes <<<"${BATCH_SIZES:-1 4 16}"
read -ra precisions <<<"${PRECISIONS:-fp32}"
results=${RESULTS:-$here/results/benchmark.csv}
python=${PYTHON:-python}

if [ "${1---}" != -- ]; then
    echo "benchmark_all.sh: error: unknown argument $1; options for benchmark.py stand after --" >&2
    exit 2
fi
shift $(($# > 0))

total=$((${#precisions[@]} * ${#models[@]} * ${#batch_sizes[@]}))
number=0
problems=()
for precision in "${precisions[@]}"; do
    for model in "${models[@]}"; do
        for batch_size in "${batch_sizes[@]}"; do
            number=$((number + 1))
            echo "[$number/$total]"
            "$python" "$here/benchmark.py" --model "$model" --batch-size "$batch_size" --precision "$precision" \
                --results "$results" "$@"
            code=$?
            [ $code -eq 130 ] && exit 130
            [ $code -eq 0 ] || problems+=("$model, batch size $batch_size, $precision: exit code $code")
        done
    done
done

echo
echo "$total cases in $SECONDS s, ${#problems[@]} with rows that are not ok"
[ ${#problems[@]} -eq 0 ] || printf '  %s\n' "${problems[@]}"

if [ -s "$results" ]; then # without a row there is nothing to draw
    if [ -n "${RESULTS:-}" ]; then "$python" "$here/plot.py" "$results"; else "$python" "$here/plot.py"; fi || exit 1
fi
[ ${#problems[@]} -eq 0 ]
