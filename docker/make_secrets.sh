#!/bin/sh
# Write fresh secrets to the folder that is given ('secrets' beside this file); what is there already stays.
#
# The folder is for its owner alone. The files are readable, since containers read them under another user id.
set -eu
folder=${1:-"$(dirname "$0")/secrets"}
mkdir -p "$folder"
chmod 700 "$folder"
fresh() {
  if [ ! -s "$folder/$1" ]; then
    od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$folder/$1.draft"
    chmod 444 "$folder/$1.draft"
    mv "$folder/$1.draft" "$folder/$1"
  fi
}
for name in ray_token mlflow_admin_password mlflow_flask_secret database_password s3_access_key s3_secret_key; do
  fresh "$name"
done
if [ ! -s "$folder/s3.json" ]; then
  printf '{"identities": [{"name": "mlflow", "credentials": [{"accessKey": "%s", "secretKey": "%s"}], "actions": ["Admin"]}]}\n' \
    "$(cat "$folder/s3_access_key")" "$(cat "$folder/s3_secret_key")" >"$folder/s3.json.draft"
  chmod 444 "$folder/s3.json.draft"
  mv "$folder/s3.json.draft" "$folder/s3.json"
fi
echo "secrets are in $folder"
