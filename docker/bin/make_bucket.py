#!/usr/bin/env python
"""``make_bucket.py s3://BUCKET``: make it where it is not there.

Address and keys come from the environment, as for every client of S3: MLFLOW_S3_ENDPOINT_URL or AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY.
"""

import os
import sys
import time

import boto3
from botocore.exceptions import BotoCoreError, ClientError

_SECONDS = 60.0
"""How long a store that starts at the same time is waited for."""


def make(url: str) -> None:
    """Make the bucket of ``s3://BUCKET/...``."""
    name = url.removeprefix("s3://").partition("/")[0]
    client = boto3.client(
        "s3",
        endpoint_url=os.environ.get("MLFLOW_S3_ENDPOINT_URL") or None,
        region_name=os.environ.get("AWS_DEFAULT_REGION", "us-east-1"),
    )
    deadline = time.monotonic() + _SECONDS
    while True:
        try:
            if name not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
                client.create_bucket(Bucket=name)
            return
        except ClientError as error:
            if error.response["Error"]["Code"] in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                return
            if error.response["ResponseMetadata"]["HTTPStatusCode"] < 500 or time.monotonic() > deadline:
                raise SystemExit(f"make_bucket: {error}") from None
        except BotoCoreError as error:
            if time.monotonic() > deadline:
                raise SystemExit(f"make_bucket: {error}") from None
        time.sleep(1.0)


if __name__ == "__main__":
    make(sys.argv[1])
