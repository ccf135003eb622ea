"""Which layers are pruned, and how much of each: rules by block and by name, the first that fits deciding."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from sparselab.solvers import Pattern, parse_sparsity

DENSE = "dense"
Sparsity = float | str | Pattern | Mapping[str, float | str | Pattern]


@dataclass(frozen=True)
class Rule:
    """What is done to the layers of some blocks whose names fit.

    Args:
        where: "0-2" or "5" (blocks), "mlp.*" or "up_proj" (a layer's name in its block, or the last part of it; * and ?
            as in file names), or both: "3-5:mlp.*".
        pattern: what goes; None leaves these layers as they are.
    """

    where: str
    pattern: Pattern | None

    def __str__(self) -> str:
        return f"{self.where}={self.pattern or DENSE}"

    def fits(self, index: int, name: str) -> bool:
        """Whether this rule is about a layer.

        Args:
            index: of the block, from 0.
            name: of the layer in it, such as "mlp.up_proj".
        """
        blocks, glob = _parsed(self.where)
        inside = index in blocks if blocks else True
        return inside and any(fnmatchcase(each, glob) for each in (name, name.rpartition(".")[2]))


@dataclass(frozen=True)
class Allocation:
    """A sparsity for each layer, by rules; what no rule fits is left as it is.

    Args:
        rules: the first that fits a layer decides.
    """

    rules: tuple[Rule, ...]

    def __str__(self) -> str:
        return ",".join(map(str, self.rules))

    def at(self, index: int, name: str) -> Pattern | None:
        """What is pruned of a layer; None leaves it as it is. See `Rule.fits`."""
        return next((rule.pattern for rule in self.rules if rule.fits(index, name)), None)

    def check(self, layers: Iterable[tuple[int, str]]) -> None:
        """Raise ValueError unless every rule is about some layer of a model, and some layer is pruned.

        Args:
            layers: index of the block, and name in it, of each layer.
        """
        layers = list(layers)
        first, last = layers[0], layers[-1]
        for rule in self.rules:
            if not any(rule.fits(*layer) for layer in layers):
                raise ValueError(
                    f"sparsity: expected rules for layers such as {first[0]}:{first[1]} or {last[0]}:{last[1]}, "
                    f"received '{rule}', which fits none"
                )
        if not any(self.at(*layer) for layer in layers):
            raise ValueError(f"sparsity: expected a rule that prunes a layer, received '{self}'")


def parse_allocation(sparsity: "Sparsity | Allocation") -> Pattern | Allocation:
    """What `parse_sparsity` reads, for all layers alike; or rules: "0=dense,1-5:mlp.*=70%,*=50%", or a mapping of such.

    Args:
        sparsity: a mapping's keys are the rules' left sides (see `Rule`), its values what `parse_sparsity` reads, or
            "dense".

    Raises:
        ValueError, TypeError: it cannot be read; see also `parse_sparsity`.
    """
    if isinstance(sparsity, Allocation):
        return sparsity
    if isinstance(sparsity, str) and "=" in sparsity:
        parts = [part.rpartition("=") for part in sparsity.split(",") if part.strip()]
        return _allocation((where.strip(), value.strip()) for where, _, value in parts)
    if isinstance(sparsity, Mapping):
        return _allocation(sparsity.items())
    return parse_sparsity(sparsity)


def _allocation(pairs: Iterable[tuple[str, float | str | Pattern]]) -> Allocation:
    rules = []
    for where, value in pairs:
        _parsed(where)
        rules.append(Rule(where, None if value == DENSE else parse_sparsity(value)))
    if not rules:
        raise ValueError("sparsity: expected a rule or more, received none")
    return Allocation(tuple(rules))


def _parsed(where: str) -> tuple[range | None, str]:
    """Blocks, None being all, and what names have to look like."""
    before, colon, after = where.partition(":")
    blocks, glob = (before, after) if colon or re.fullmatch(r"\d+(-\d+)?", where) else ("", where)
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", blocks)
    if (blocks and not found) or not (found or glob) or (colon and not (found and glob)):
        raise ValueError(
            f"sparsity: expected rules for blocks ('0-2'), names ('mlp.*') or both ('0-2:mlp.*'), received {where!r}"
        )
    if not found:
        return None, glob
    inside = range(int(found[1]), int(found[2] or found[1]) + 1)
    if not inside:
        raise ValueError(f"sparsity: expected blocks from a lower to a higher number, received {where!r}")
    return inside, glob or "*"
