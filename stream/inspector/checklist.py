"""Before a version is activated: what speaks for it and what against, each in words; no I/O."""

from typing import Any, Final, Literal, NamedTuple

from stream.core.formulas import UNIT_TOLERANCE
from stream.inspector.versions import PairView, VersionsView
from stream.rollout.comparison import VersionReport

#: So many more fallbacks, or unknown items, than in the served version are worth a look.
_MORE_SHARE: Final = 0.01
#: With fewer of their ten nearest items in common, users will notice: it may be what is wanted.
_FEW_IN_COMMON: Final = 0.2
#: Half of the users this close to the centroid find the same items.
_COLLAPSED: Final = 0.9

Verdict = Literal["ok", "look", "no"]


class Check(NamedTuple):
    """One line of a checklist: ``ok``, ``look`` (at it, before), or ``no`` (it would be refused, or harm)."""

    verdict: Verdict
    text: str


def checks_of(
    pair: PairView, view: VersionsView, report: VersionReport | None, problem: str | None = None
) -> dict[str, Any]:
    """The checklist of a pair, on how many users it rests, and the commands that activate it, as plain values.

    Args:
        pair: what may be activated.
        view: what is published.
        report: the comparison with the served pair.
        problem: why there is none.
    """
    checks = [_refusal(pair), _coverage(pair), *_companions(pair, view)]
    if problem is not None:
        checks.append(Check("look", f"it can't be compared here: {problem}"))
    if report is not None:
        checks += _compared(report)
    return {
        "checks": [check._asdict() for check in checks],
        "compared": None if report is None else report.compared,
        "activate": _commands(pair, view),
    }


def _refusal(pair: PairView) -> Check:
    if pair.refused:
        return Check("no", f"a worker refuses it: {pair.refused}")
    return Check("ok", "no worker refuses it")


def _coverage(pair: PairView) -> Check:
    row = pair.progress
    if row["covered"] == row["partitions"]:
        return Check("ok", f"every user has a vector in it ({row['partitions']} of {row['partitions']} partitions)")
    left = "" if row["seconds_left"] is None else f", about {row['seconds_left']:.0f} s left"
    return Check(
        "no",
        f"{row['covered']} of {row['partitions']} partitions are covered, {row['done']:,} of about {row['users']:,} "
        f"users{left}",
    )


def _companions(pair: PairView, view: VersionsView) -> list[Check]:
    """An encoder that was made for one item version can't be served with another."""
    if view.served is None or pair.user_version == view.served[0]:
        return []
    if _is_bound(pair, view):
        return [Check("look", f"its encoder {pair.user_version} was made for it; to activate that serves both")]
    return [Check("look", f"its encoder {pair.user_version} is not served yet, and has to be activated, too")]


def _compared(report: VersionReport) -> list[Check]:
    before, after = report.served, report.other
    checks = [
        _shares("fallback vectors", before.fallback_share, after.fallback_share),
        _shares("items of histories that are unknown", before.unknown_item_share, after.unknown_item_share),
    ]
    if after.found and not (after.least_norm >= 1 - UNIT_TOLERANCE and after.greatest_norm <= 1 + UNIT_TOLERANCE):
        checks.append(Check("no", f"norms lie between {after.least_norm:.6f} and {after.greatest_norm:.6f}, not at 1"))
    else:
        checks.append(Check("ok", "all vectors have length 1"))
    if after.centroid_cosine:
        median, was = after.centroid_cosine[1], before.centroid_cosine[1] if before.centroid_cosine else 0.0
        text = f"median cosine to the items' centroid {median:.2f}, in the served version {was:.2f}"
        near = median > _COLLAPSED
        checks.append(Check("look" if near else "ok", text + (": nearly the same for everybody" if near else "")))
    if report.overlap is not None:
        text = f"{report.overlap:.0%} of the ten nearest items stay the same, of {report.compared:,} users"
        checks.append(Check("look" if report.overlap < _FEW_IN_COMMON else "ok", text))
    else:
        checks.append(Check("look", "no user of the sample has a vector of their own in both"))
    return checks


def _shares(what: str, before: float, after: float) -> Check:
    text = f"{after:.1%} {what}, in the served version {before:.1%}"
    return Check("look" if after > before + _MORE_SHARE else "ok", text)


def _commands(pair: PairView, view: VersionsView) -> list[str]:
    """What activates the pair; an encoder that is bound to an item version brings it along."""
    commands = []
    served = view.served or ("", "")
    if pair.user_version != served[0]:
        commands.append(f"uemb encoder activate {pair.user_version}")
    if pair.item_version != served[1] and not (commands and _is_bound(pair, view)):
        commands.append(f"uemb items activate {pair.item_version}")
    return commands


def _is_bound(pair: PairView, view: VersionsView) -> bool:
    """Whether the encoder is of use in this item version alone."""
    return bool(view.encoders[pair.user_version].item_version)
