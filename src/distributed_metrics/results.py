"""Merged tables -> the numbers of a group of metrics: float64 NumPy on the host, float32 ``jax.numpy`` in a trace."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from distributed_metrics.accumulators import Accumulator
from distributed_metrics.merging import Numbers
from distributed_metrics.plan import NONFINITE, Group


def shows(result: Any, weight: Any) -> bool:
    """Whether something was seen, as far as it can be told: a sum may be of weights that cancel, as 1 and -1 do."""
    return weight != 0 or not (result == 0 or np.isnan(result))


def field_of(group: Group, name: str, tables: Mapping[str, Numbers]) -> Any:
    """One field of all members of a group: ``(..., members, *shape)``; a tuple where its merge has several numbers."""
    place = group.fields[name]
    of_members = []
    for number in tables[place.merge.name]:
        block = number[..., place.slots_of(len(group.members))]
        of_members.append(block.reshape(*number.shape[:-1], len(group.members), *place.shape))
    return of_members[0] if len(of_members) == 1 else tuple(of_members)


def own_fields(group: Group, tables: Mapping[str, Numbers]) -> dict[str, Any]:
    """``weight`` and the accumulator's own fields."""
    return {name: field_of(group, name, tables) for name in group.fields if name != NONFINITE}


def results_of(group: Group, tables: Mapping[str, Numbers], xp: Any) -> Any:
    """The results of all members of a group: ``(..., members, *result_shape)``."""
    fields = own_fields(group, tables)
    with np.errstate(all="ignore"):  # what is empty divides by 0
        results = group.accumulator.result(xp, **fields)
    if group.accumulator.empty is None:
        return results
    weight = fields["weight"].reshape(fields["weight"].shape + (1,) * (results.ndim - fields["weight"].ndim))
    return xp.where(weight == 0, group.accumulator.empty, results)


def outside_of(group: Group, tables: Mapping[str, Numbers], xp: Any) -> dict[str, Any]:
    """What is beside the results of all members of a group, by name: ``(..., members, *S)``."""
    if type(group.accumulator).outside is Accumulator.outside:  # nothing, as a rule
        return {}
    return group.accumulator.outside(xp, **own_fields(group, tables))
