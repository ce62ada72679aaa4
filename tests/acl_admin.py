"""Access lists of a real broker: grants given to and taken from the user `app`, in force when a call returns."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)

from stream.kafka.grants import Grant, single

_PATIENCE_S = 120
_WORDS = {"DescribeConfigs": AclOperation.DESCRIBE_CONFIGS}


class Acls:
    """What the user `app` may do; `bootstrap` is of a listener whose clients may do all."""

    def __init__(self, bootstrap: str) -> None:
        self._admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 2})

    def give(self, grants: Iterable[Grant]) -> None:
        """Allow more."""
        wanted = set(_bindings(grants))
        if wanted:
            for future in self._admin.create_acls(list(wanted)).values():
                future.result()
        self._until(lambda held: wanted <= held)

    def take(self, grants: Iterable[Grant] | None = None) -> None:
        """Allow less; by default nothing any more."""
        unwanted = set(self._held() if grants is None else _bindings(grants))
        filters = [
            AclBindingFilter(
                b.restype, b.name, b.resource_pattern_type, b.principal, b.host, b.operation, b.permission_type
            )
            for b in unwanted
        ]
        if filters:
            for future in self._admin.delete_acls(filters).values():
                future.result()
        self._until(lambda held: not unwanted & held)

    @contextmanager
    def without(self, grants: Iterable[Grant]) -> Iterator[None]:
        """Less is allowed while the block runs."""
        grants = list(grants)
        self.take(grants)
        try:
            yield
        finally:
            self.give(grants)

    def _held(self) -> set[AclBinding]:
        anything = AclBindingFilter(
            ResourceType.ANY,
            None,
            ResourcePatternType.ANY,
            "User:app",
            None,
            AclOperation.ANY,
            AclPermissionType.ANY,
        )
        return set(self._admin.describe_acls(anything).result())

    def _until(self, condition: object) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while not condition(self._held()):  # type: ignore[operator]
            assert time.monotonic() < deadline, "the broker does not apply its access list"
            time.sleep(0.02)


def _bindings(grants: Iterable[Grant]) -> Iterator[AclBinding]:
    for grant in single(grants):
        (operation,) = grant.operations
        yield AclBinding(
            ResourceType[grant.kind.upper().replace(" ", "_")],
            grant.name,
            ResourcePatternType.PREFIXED if grant.prefixed else ResourcePatternType.LITERAL,
            "User:app",
            "*",
            _WORDS.get(operation) or AclOperation[operation.upper()],
            AclPermissionType.ALLOW,
        )
