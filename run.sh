#!/usr/bin/env bash
# Grad-CAM of a dense network and of low-rank ones over tolerances, and their comparison, into figures/gradcam/.
#
#   ./run.sh              on test_images/, with the ResNet20 checkpoints in cifar10/results/resnet20/
#   ./run.sh --quick      trains small networks on bundled digits first: no download, 4 minutes on two cores
#
# PYTHON, CHECKPOINTS and OUT are variables of the environment; the last lines printed name the figures. It ends
# with 1 where a picture could not be read, and all others are drawn; any other failure ends it.
set -eu
cd "$(dirname "$0")"
taus=(0.04 0.08 0.12 0.16 0.2)
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi

case "${1:-}" in
"")
    out=${OUT:-figures/gradcam}
    checkpoints=${CHECKPOINTS:-cifar10/results/resnet20}
    images=test_images
    compared=(--images "$images")
    reference=""
    for prefix in "$checkpoints"/adapted_ "$checkpoints"/scratch_ "$checkpoints"/; do
        [ -f "${prefix}dense_seed0/checkpoint.pt" ] && reference=${prefix}dense_seed0 && break
    done
    if [ -z "$reference" ]; then
        quoted=$(printf %q "$checkpoints")
        there=${CHECKPOINTS:+ --output-dir $quoted}
        {
            echo "run.sh: no trained ResNet20 in $checkpoints (checkpoints are not committed). Train one with"
            echo "    python cifar10/resnet20_cifar10_baseline.py --name dense_seed0$there"
            echo "    for tau in ${taus[*]}; do python cifar10/resnet20_cifar10.py --tau \$tau \\"
            echo "        --from-checkpoint $quoted/dense_seed0 --rank 1.0 --name tau\${tau}_seed0$there; done"
            echo "or try ./run.sh --quick, which needs no download and no data"
        } >&2
        exit 1
    fi
    ;;
--quick)
    out=${OUT:-figures/gradcam/quick}
    runs=$out/runs
    images=$out/pictures
    compared=(--images clutter-test --count 50)
    reference=$runs/dense_seed0
    prefix=$runs/
    training=()
    trap '[ ${#training[@]} -eq 0 ] || kill "${training[@]}" 2>/dev/null || true' EXIT
    train() { # SCRIPT, NAME and flags of a run, which is begun beside others, or goes on where it broke off
        OMP_NUM_THREADS=1 "$PYTHON" "pytorch-grad-cam/$1.py" --quiet --resume --output-dir "$runs" --name "$2" "${@:3}" &
        training+=($!)
    }
    wait_for_training() {
        for job in "${training[@]}"; do wait "$job"; done
        training=()
    }
    train convnet_clutter_baseline dense_seed0
    train convnet_clutter_baseline dense_seed1 --seed 1
    wait_for_training
    for tau in "${taus[@]}"; do
        train convnet_clutter "tau${tau}_seed0" --tau "$tau" --from-checkpoint "$reference" --rank 1.0 \
            --cut-by weights --lr 0.02 --epochs 3 --tau-warmup 2.5
    done
    wait_for_training
    "$PYTHON" pytorch-grad-cam/clutter_pictures.py "$images" --count 8
    ;;
*)
    echo "run.sh: takes --quick or nothing, got $1" >&2
    exit 2
    ;;
esac

failed=0
note() { # a script's exit code: with 1 it has told which picture cannot be read, and done the others
    [ "$1" -eq 1 ] || exit "$1"
    failed=1
}
draw() { # NAME and flags of a network
    echo "--- $1"
    "$PYTHON" pytorch-grad-cam/cam.py --image-path "$images" --output-dir "$out/$1" "${@:2}" || note $?
}
draw dense --checkpoint "$reference"
trained=(--low-rank)
cut=(--taus)
seeds=(--seeds)
for tau in "${taus[@]}"; do
    run=${prefix}tau${tau}_seed0
    if [ -f "$run/checkpoint.pt" ]; then
        draw "tau$tau" --checkpoint "$run"
        trained+=("$run")
    else
        echo "no $run: the dense network is cut by its SVD (cifar10/resnet20_cifar10.py trains one)"
        draw "tau$tau" --checkpoint "$reference" --low-rank "$tau"
        cut+=("$tau")
    fi
done

for run in "$prefix"tau*_seed0 "$prefix"*compression*_seed0; do # trained at others
    name=${run#"$prefix"}
    name=${name%_seed0}
    case " ${taus[*]} " in *" ${name#tau} "*) continue ;; esac
    if [ -f "$run/checkpoint.pt" ]; then
        draw "$name" --checkpoint "$run"
        trained+=("$run")
    fi
done
from="" # the seeds of a reference that began with others' weights are those that did not
[ "${prefix%adapted_}" = "$prefix" ] || from="scratch*_"
for run in "${prefix%adapted_}"${from}dense_seed[1-9]*; do
    if [ -f "$run/checkpoint.pt" ]; then
        seeds+=("$run")
    fi
done

echo "--- comparison"
rm -rf "$out/comparison"
"$PYTHON" pytorch-grad-cam/compare_cams.py --reference "$reference" "${trained[@]}" "${cut[@]}" "${seeds[@]}" \
    "${compared[@]}" --output-dir "$out/comparison" --name maps || note $?
"$PYTHON" pytorch-grad-cam/produce_results.py --results "$out/comparison" --output-dir "$out"
exit "$failed"
