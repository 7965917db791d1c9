"""A value that is a dict of keywords, as the metrics of clu and metrax take it -> arrays, settings, and a feed."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from distributed_metrics.accumulators import CluMetric
from distributed_metrics.accumulators.clu_metric import batch_size, in_order
from distributed_metrics.accumulators.clu_weight import EXAMPLES, WEIGHT, weighted
from distributed_metrics.contributions import Feed, Source
from distributed_metrics.placement import Situation, Value, placed
from distributed_metrics.view import spec_axes


def keywords_of(name: str, accumulator: CluMetric, value: Any, weight: Any) -> dict[str, Any]:
    """The value of a metric that takes keywords: arrays, in dtypes that devices have, settings, and the weight, if any.

    Raises:
        TypeError: no dict, or something that is neither an array nor a setting.
        ValueError: a weight that does not fit, or a metric that cannot be weighted.
    """
    if not isinstance(value, Mapping):
        raise TypeError(
            f"metrics.update(): {name!r} is {accumulator}, whose value is a dict of the keywords of its "
            f"from_model_output(); got {type(value).__name__}.\n"
            f"  For example: metrics.update({{{name!r}: dict(predictions=predictions, labels=labels)}})"
        )
    given = {}
    for keyword, one in in_order(accumulator.metric, value).items():
        one = one.get_value() if isinstance(one, nnx.Variable) else one
        if isinstance(one, np.ndarray) and one.dtype.kind in "biuf":
            one = _in_device_dtype(f"{name} ({keyword})", one)
        elif not isinstance(one, jax.Array):
            try:
                hash(one)
            except TypeError as error:
                raise TypeError(
                    f"metrics.update(): {keyword}= of {name!r} is {one!r:.80}, neither an array nor a setting (a "
                    "number, a string, a tuple).\n  Strings cannot be accumulated on a device; of a list of numbers "
                    "make an array: jnp.asarray(...)."
                ) from error
        given[keyword] = one
    return given if weight is None else weighted(name, accumulator.metric, given, weight, batch_size(given))


def _in_device_dtype(name: str, array: np.ndarray) -> np.ndarray:
    dtype = jax.dtypes.canonicalize_dtype(array.dtype)
    if dtype.kind in "iu" and array.size and not np.array_equal(array.astype(dtype), array):
        raise ValueError(
            f"metrics.update(): {name!r} holds integers beyond {dtype}, the widest that the devices have.\n"
            f"  Bring them into its range: numpy.clip(x, {jnp.iinfo(dtype).min}, {jnp.iinfo(dtype).max})"
        )
    return array.astype(dtype)


def keyword_feed(
    name: str, metrics: tuple[int, ...], value: Mapping[str, Any], spec: Any, situation: Situation, arrays: list[Value]
) -> Feed:
    """The feed of a value that is a dict of keywords: the arrays of the batch are partitioned alike, others are not."""
    batch = batch_size(value)
    by_keyword = spec if isinstance(spec, Mapping) else {}
    found: dict[str, tuple[Value, P | None]] = {}
    batched: dict[str, P | None] = {}
    arrays_of = {keyword: one for keyword, one in value.items() if isinstance(one, jax.Array | np.ndarray)}
    for keyword, one in sorted(arrays_of.items(), key=lambda item: isinstance(item[1], np.ndarray)):
        asked = by_keyword.get(keyword) if isinstance(spec, Mapping) else spec
        of_batch = one.ndim > 0 and one.shape[0] == batch and by_keyword.get(keyword) != P()
        if not of_batch:
            asked = P()
        elif isinstance(asked, P):
            asked = P(*asked[: one.ndim])
        asked = None if situation.view.explicit else asked  # there types say it, also of a setting
        if of_batch and asked is None and isinstance(one, np.ndarray):  # as those that are on the devices
            asked = next((P(*lies[:1]) for lies in batched.values() if lies is not None), None)
        found[keyword] = placed(f"{name} ({keyword})", one, one.shape, asked, situation)
        if of_batch:
            batched[keyword] = found[keyword][1]
    for keyword, lies in batched.items():
        if lies is not None and (further := [entry for entry in lies[1:] if entry is not None]):
            raise ValueError(
                f"metrics.update(): {keyword}= of {name!r} is partitioned over {further[0]!r} within an example, and "
                "its metric needs examples as a whole.\n"
                f"  Gather them: {keyword} = jax.device_put({keyword}, NamedSharding(mesh, P({lies[0]!r})))\n"
                f"  Under jit: jax.lax.with_sharding_constraint({keyword}, NamedSharding(mesh, P({lies[0]!r})))"
            )
    lies_first = next((lies[0] for lies in batched.values() if lies), None)
    leading = {P(*lies[:1]) for lies in batched.values() if lies is not None and spec_axes(lies)}
    if len(leading) > 1:
        raise ValueError(
            f"metrics.update(): the arrays of {name!r} are partitioned along their examples in different ways: "
            f"{', '.join(f'{k}: {lies}' for k, lies in batched.items())}.\n"
            f"  Partition them alike: jax.device_put(({', '.join(batched)}), NamedSharding(mesh, P({lies_first!r})))"
        )
    unknown = any(lies is None for lies in batched.values())
    common = None if unknown else next(iter(leading), P())
    sources = []
    found = {keyword: found[keyword] for keyword in arrays_of}
    for keyword, (array, _) in found.items():
        sources.append(Source(len(arrays), common if keyword in batched else P(), pair=False))
        arrays.append(array)
    settings = tuple((keyword, one) for keyword, one in value.items() if keyword not in found)
    if WEIGHT in value:
        settings += ((EXAMPLES, tuple(keyword for keyword in found if keyword in batched and keyword != WEIGHT)),)
    return Feed(metrics, tuple(sources), (None,) * len(sources), tuple(found), settings)
