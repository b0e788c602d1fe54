#!/bin/sh
# A node that trains. Further arguments go to 'ray start'.
#
# RAY_HEAD                               HOST:PORT of the head
# RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH  the head's token
# MOEIFY_HOME                            the folder of runs, the same on every node, or s3://BUCKET/PREFIX
# S3_ACCESS_KEY_FILE, S3_SECRET_KEY_FILE hold what opens that bucket
# RAY_WORKER_CPUS                        cores that it lends to training (unset: all that it may use, by Ray's count)
set -eu
: "${RAY_HEAD:?HOST:PORT of the head}"
: "${MOEIFY_HOME:?the folder of runs, which every node sees}"
if [ -z "${RAY_AUTH_TOKEN:-}" ] && [ ! -s "${RAY_AUTH_TOKEN_PATH:-}" ]; then
  echo "ray_worker: set RAY_AUTH_TOKEN_PATH to a file with the head's token" >&2
  exit 2
fi
if [ -n "${S3_ACCESS_KEY_FILE:-}" ]; then
  AWS_ACCESS_KEY_ID=$(cat "$S3_ACCESS_KEY_FILE")
  AWS_SECRET_ACCESS_KEY=$(cat "${S3_SECRET_KEY_FILE:?the file with the secret key}")
  export AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY
fi
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
exec ray start --block --disable-usage-stats --address="$RAY_HEAD" \
  ${RAY_WORKER_CPUS:+"--num-cpus=$RAY_WORKER_CPUS"} \
  "$@"
