#!/usr/bin/env bash
# Grad-CAM of a dense network and of low-rank ones over tolerances, and their comparison, into figures/gradcam/.
#
#   ./run.sh              on test_images/, with the ResNet20 checkpoints in cifar10/results/resnet20/
#   ./run.sh --quick      trains small networks on bundled digits first: no download, about 3 minutes on two cores
#
# PYTHON, CHECKPOINTS and OUT are variables of the environment; the last lines printed name the figures.
set -eu
cd "$(dirname "$0")"
TAUS="0.04 0.08 0.12 0.16 0.2"
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi

case "${1:-}" in
"") ;;
--quick) ;;
*)
    echo "run.sh: takes --quick or nothing, got $1" >&2
    exit 2
    ;;
esac

if [ "${1:-}" = --quick ]; then
    out=${OUT:-figures/gradcam/quick}
    runs=$out/runs
    images=$out/pictures
    train() { # NAME and flags of a run; what is finished is not trained again
        [ -f "$runs/$1/finished" ] || {
            rm -rf "${runs:?}/$1"
            "$PYTHON" "pytorch-grad-cam/convnet_clutter$2.py" --quiet --output-dir "$runs" --name "$1" "${@:3}"
            touch "$runs/$1/finished"
        }
    }
    train dense_seed0 _baseline
    train dense_seed1 _baseline --seed 1
    for tau in $TAUS; do
        train "tau${tau}_seed0" "" --tau "$tau" --from-checkpoint "$runs/dense_seed0" --rank 1.0 --lr 0.02 \
            --epochs 3 --tau-warmup 2.5
    done
    "$PYTHON" pytorch-grad-cam/clutter_pictures.py "$images" --count 8
    reference=$runs/dense_seed0
    prefix=$runs/
    seeds=$runs/dense_seed1
    compared="--images clutter-test --count 50"
else
    out=${OUT:-figures/gradcam}
    checkpoints=${CHECKPOINTS:-cifar10/results/resnet20}
    images=test_images
    reference=""
    for prefix in "$checkpoints"/adapted_ "$checkpoints"/scratch_ "$checkpoints"/; do
        [ -f "${prefix}dense_seed0/checkpoint.pt" ] && reference=${prefix}dense_seed0 && break
    done
    if [ -z "$reference" ]; then
        {
            echo "run.sh: no trained ResNet20 in $checkpoints (checkpoints are not committed). Train one with"
            echo "    python cifar10/resnet20_cifar10_baseline.py --name dense_seed0"
            echo "    for tau in $TAUS; do python cifar10/resnet20_cifar10.py --tau \$tau \\"
            echo "        --from-checkpoint cifar10/results/resnet20/dense_seed0 --rank 1.0 --name tau\${tau}_seed0; done"
            echo "or try ./run.sh --quick, which needs no download and no data"
        } >&2
        exit 1
    fi
    seeds=$(ls -d "${prefix}"dense_seed[1-9]*/ 2>/dev/null || true)
    compared="--images $images"
fi

draw() { # NAME and flags of a network
    echo "--- $1"
    "$PYTHON" pytorch-grad-cam/cam.py --image-path "$images" --output-dir "$out/$1" "${@:2}"
}
draw dense --checkpoint "$reference"
trained=""
cut=""
for tau in $TAUS; do
    if [ -f "${prefix}tau${tau}_seed0/checkpoint.pt" ]; then
        draw "tau$tau" --checkpoint "${prefix}tau${tau}_seed0"
        trained="$trained ${prefix}tau${tau}_seed0"
    else
        echo "no ${prefix}tau${tau}_seed0: the dense network is cut by its SVD (cifar10/resnet20_cifar10.py trains one)"
        draw "tau$tau" --checkpoint "$reference" --low-rank "$tau"
        cut="$cut $tau"
    fi
done

for run in "$prefix"tau*_seed0; do # trained at other tolerances
    tau=$(basename "$run" | sed 's/.*tau\(.*\)_seed0/\1/')
    case " $TAUS " in *" $tau "*) continue ;; esac
    if [ -f "$run/checkpoint.pt" ]; then
        draw "tau$tau" --checkpoint "$run"
        trained="$trained $run"
    fi
done

echo "--- comparison"
rm -rf "$out/comparison"
# the lists are split into words on purpose
# shellcheck disable=SC2086
"$PYTHON" pytorch-grad-cam/compare_cams.py --reference "$reference" --low-rank $trained --taus $cut --seeds $seeds \
    $compared --output-dir "$out/comparison" --name maps
"$PYTHON" pytorch-grad-cam/produce_results.py --results "$out/comparison" --output-dir "$out"
