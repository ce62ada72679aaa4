"""Tokens for Amazon MSK by AWS's own signer: `UEMB_SASL_TOKEN_PROVIDER=stream.kafka.msk:token`, extra `msk`.

Credentials are found where all of AWS's libraries find them: environment, profile, role of the host or the pod.
"""

import os

from aws_msk_iam_sasl_signer import MSKAuthTokenProvider

from stream.errors import ConfigError


def token() -> tuple[str, float]:
    """A token for the cluster's region, and the Unix time in seconds when it ends.

    Raises:
        ConfigError: no region is named.
    """
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if not region:
        msg = "stream.kafka.msk:token needs the region of the cluster; set AWS_REGION"
        raise ConfigError(msg)
    value, ends_at_ms = MSKAuthTokenProvider.generate_auth_token(region)
    return value, ends_at_ms / 1000
