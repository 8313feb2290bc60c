"""Makes a bucket where it is missing: `python -m cluster.bucket rl-ckpt`, with AWS's environment variables set.

Run once at the start of a topology, when its S3 server answers; a bucket that is there is left as it is.
"""

from __future__ import annotations

import sys

import botocore.exceptions
import botocore.session


def make_bucket(name: str) -> bool:
    """Create a bucket; where and with which keys, the environment says (`AWS_ENDPOINT_URL`, …).

    Returns:
        Whether it was missing.

    Raises:
        botocore.exceptions.ClientError: The server refuses, or the name is somebody else's.
    """
    client = botocore.session.get_session().create_client("s3")
    try:
        client.head_bucket(Bucket=name)
    except botocore.exceptions.ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
            raise
    else:
        return False
    finally:
        client.close()
    client = botocore.session.get_session().create_client("s3")
    try:
        client.create_bucket(Bucket=name)
    finally:
        client.close()
    return True


if __name__ == "__main__":
    print(f"bucket {sys.argv[1]}: {'made' if make_bucket(sys.argv[1]) else 'is there'}")
