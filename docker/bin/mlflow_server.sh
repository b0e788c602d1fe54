#!/bin/sh
# The MLflow server with accounts. Secrets come from files and stay out of argument lists, where 'ps' would show them.
#
# MLFLOW_BACKEND_STORE_URI        the database, without a password: postgresql+psycopg2://mlflow@db:5432/mlflow
# MLFLOW_ARTIFACTS_DESTINATION    where files go: s3://bucket or a folder; a missing bucket is made
# MLFLOW_ADMIN_PASSWORD_FILE      of the account 'admin', which the first start makes
# MLFLOW_FLASK_SECRET_FILE        signs forms
# DATABASE_PASSWORD_FILE, S3_ACCESS_KEY_FILE, S3_SECRET_KEY_FILE   where they are needed
set -eu
: "${MLFLOW_BACKEND_STORE_URI:?the database, without a password}"
: "${MLFLOW_ARTIFACTS_DESTINATION:?where files go}"
: "${MLFLOW_ADMIN_PASSWORD_FILE:?the file with the password of the account admin}"
: "${MLFLOW_FLASK_SECRET_FILE:?a file with a secret that signs forms}"
export MLFLOW_BACKEND_STORE_URI MLFLOW_ARTIFACTS_DESTINATION

MLFLOW_AUTH_ADMIN_USERNAME="admin"
MLFLOW_AUTH_ADMIN_PASSWORD=$(cat "$MLFLOW_ADMIN_PASSWORD_FILE")
MLFLOW_FLASK_SERVER_SECRET_KEY=$(cat "$MLFLOW_FLASK_SECRET_FILE")
export MLFLOW_AUTH_ADMIN_USERNAME MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY
if [ -n "${DATABASE_PASSWORD_FILE:-}" ]; then
  PGPASSWORD=$(cat "$DATABASE_PASSWORD_FILE")
  export PGPASSWORD
fi
if [ -n "${S3_ACCESS_KEY_FILE:-}" ]; then
  AWS_ACCESS_KEY_ID=$(cat "$S3_ACCESS_KEY_FILE")
  AWS_SECRET_ACCESS_KEY=$(cat "${S3_SECRET_KEY_FILE:?the file with the secret key}")
  export AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY
fi

umask 077
MLFLOW_AUTH_CONFIG_PATH=$(mktemp "${TMPDIR:-/tmp}/mlflow-auth.XXXXXX")
export MLFLOW_AUTH_CONFIG_PATH
cat >"$MLFLOW_AUTH_CONFIG_PATH" <<CONFIG
[mlflow]
default_permission = READ
database_uri = ${MLFLOW_AUTH_DATABASE_URI:-$MLFLOW_BACKEND_STORE_URI}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
CONFIG

case "$MLFLOW_ARTIFACTS_DESTINATION" in
  s3://*) python "$(dirname "$0")/make_bucket.py" "$MLFLOW_ARTIFACTS_DESTINATION" ;;
esac
export MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
exec mlflow server --app-name basic-auth \
  --host "${MLFLOW_HOST:-127.0.0.1}" \
  --port "${MLFLOW_PORT:-5000}" \
  --workers "${MLFLOW_WORKERS:-2}" \
  --allowed-hosts "${MLFLOW_ALLOWED_HOSTS:-localhost:*,127.0.0.1:*}"
