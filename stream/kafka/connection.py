"""How clients reach the brokers: one set of settings, in the words of both client libraries."""

from typing import Any

from stream.config import Settings
from stream.kafka.tokens import tokens_of, uses_tokens


def aiokafka_config(settings: Settings) -> dict[str, Any]:
    """Connection arguments of an aiokafka client.

    Raises:
        ConfigError: a certificate, key or secret can't be used.
    """
    client: dict[str, Any] = {
        "bootstrap_servers": settings.bootstrap_servers,
        "security_protocol": settings.security_protocol,
    }
    if (context := settings.tls_context()) is not None:
        client["ssl_context"] = context
    if settings.uses_sasl:
        client["sasl_mechanism"] = settings.sasl_mechanism
        if uses_tokens(settings):
            client["sasl_oauth_token_provider"] = tokens_of(settings).for_aiokafka
        else:
            client["sasl_plain_username"] = settings.sasl_username
            client["sasl_plain_password"] = settings.secret("sasl_password")
    return client


def librdkafka_config(settings: Settings) -> dict[str, Any]:
    """The same for a librdkafka client; blocking, where brokers are shown a token and none is at hand.

    A client that is made without a token waits 10 s for one and then doesn't say what was wrong.

    Raises:
        ConfigError: a certificate, key or secret can't be used, or no token be had.
        DeliveryError: who gives tokens can't be reached.
    """
    client: dict[str, Any] = {
        "bootstrap.servers": settings.bootstrap_servers,
        "security.protocol": settings.security_protocol,
    }
    if settings.tls_context() is not None:  # which names the file that can't be used, as the client does not
        password = settings.secret("ssl_key_password")
        files = {
            "ssl.ca": settings.ssl_cafile,
            "ssl.certificate": settings.ssl_certfile,
            "ssl.key": settings.ssl_keyfile or settings.ssl_certfile,
        }
        client |= {f"{name}.location": str(path) for name, path in files.items() if path is not None}
        client |= {"ssl.key.password": password} if password is not None else {}
    if settings.uses_sasl:
        client["sasl.mechanism"] = settings.sasl_mechanism
        if uses_tokens(settings):
            tokens = tokens_of(settings)
            tokens.get()
            client["oauth_cb"] = tokens.for_librdkafka
        else:
            client["sasl.username"] = settings.sasl_username
            client["sasl.password"] = settings.secret("sasl_password")
    return client
