#!/bin/sh
# Ray's head: job API, dashboard, and the drivers of runs. Further arguments go to 'ray start'.
#
# RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH  lets clients and workers in; without it nothing starts
# MOEIFY_HOME                            the folder of runs, the same on every node, or s3://BUCKET/PREFIX
# S3_ACCESS_KEY_FILE, S3_SECRET_KEY_FILE hold what opens that bucket, which is made where it is not there
# RAY_HEAD_CPUS                          cores that it lends to training (0: drivers only)
# MLFLOW_TRACKING_PASSWORD_FILE          holds the password for MLflow, where that asks for one
set -eu
if [ -z "${RAY_AUTH_TOKEN:-}" ] && [ ! -s "${RAY_AUTH_TOKEN_PATH:-}" ]; then
  echo "ray_head: set RAY_AUTH_TOKEN_PATH to a file with a token; without one, whoever reaches the port runs code" >&2
  exit 2
fi
: "${MOEIFY_HOME:?the folder of runs, which every node sees}"
if [ -n "${MLFLOW_TRACKING_PASSWORD_FILE:-}" ]; then
  MLFLOW_TRACKING_PASSWORD=$(cat "$MLFLOW_TRACKING_PASSWORD_FILE")
  export MLFLOW_TRACKING_PASSWORD
fi
if [ -n "${S3_ACCESS_KEY_FILE:-}" ]; then
  AWS_ACCESS_KEY_ID=$(cat "$S3_ACCESS_KEY_FILE")
  AWS_SECRET_ACCESS_KEY=$(cat "${S3_SECRET_KEY_FILE:?the file with the secret key}")
  export AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY
fi
case "$MOEIFY_HOME" in
  s3://*) python "$(dirname "$0")/make_bucket.py" "$MOEIFY_HOME" ;;
esac
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
exec ray start --head --block --disable-usage-stats \
  --port="${RAY_PORT:-6379}" \
  --dashboard-host="${RAY_DASHBOARD_HOST:-127.0.0.1}" \
  --dashboard-port="${RAY_DASHBOARD_PORT:-8265}" \
  --num-cpus="${RAY_HEAD_CPUS:-0}" \
  "$@"
