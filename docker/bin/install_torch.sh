#!/bin/sh
# Install torch with the pip that is given: for DEVICE cpu from TORCH_INDEX, which has what torch needs too; for cuda
# from where pip gets every package.
set -eu
pip=$1
case "${DEVICE:-cpu}" in
  cpu)
    : "${TORCH_INDEX:?give --build-arg TORCH_INDEX=..., the address of the index of CPU wheels}"
    exec "$pip" install --index-url "$TORCH_INDEX" "torch==${TORCH}+cpu"
    ;;
  cuda)
    exec "$pip" install --constraint constraints.txt "torch==${TORCH}"
    ;;
  *)
    echo "DEVICE is '${DEVICE}', wanted cpu or cuda" >&2
    exit 2
    ;;
esac
