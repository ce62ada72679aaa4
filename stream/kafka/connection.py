"""How clients reach the brokers: one set of settings, in the words of both client libraries."""

from typing import Any

from stream.config import Settings


def aiokafka_config(settings: Settings) -> dict[str, Any]:
    """Connection arguments of an aiokafka client.

    Raises:
        ConfigError: a certificate or key can't be used.
    """
    client: dict[str, Any] = {
        "bootstrap_servers": settings.bootstrap_servers,
        "security_protocol": settings.security_protocol,
    }
    if (context := settings.tls_context()) is not None:
        client["ssl_context"] = context
    if settings.security_protocol.startswith("SASL"):
        client["sasl_mechanism"] = settings.sasl_mechanism
        client["sasl_plain_username"] = settings.sasl_username
        client["sasl_plain_password"] = settings.sasl_password.get_secret_value() if settings.sasl_password else None
    return client


def librdkafka_config(settings: Settings) -> dict[str, Any]:
    """The same for a librdkafka client."""
    client: dict[str, Any] = {
        "bootstrap.servers": settings.bootstrap_servers,
        "security.protocol": settings.security_protocol,
    }
    if settings.security_protocol.endswith("SSL"):
        password = settings.ssl_key_password.get_secret_value() if settings.ssl_key_password else None
        files = {
            "ssl.ca": settings.ssl_cafile,
            "ssl.certificate": settings.ssl_certfile,
            "ssl.key": settings.ssl_keyfile or settings.ssl_certfile,
        }
        client |= {f"{name}.location": str(path) for name, path in files.items() if path is not None}
        client |= {"ssl.key.password": password} if password is not None else {}
    if settings.security_protocol.startswith("SASL"):
        client["sasl.mechanism"] = settings.sasl_mechanism
        client["sasl.username"] = settings.sasl_username
        client["sasl.password"] = settings.sasl_password.get_secret_value() if settings.sasl_password else None
    return client
