"""Inside a training step

Adam on dense layers, batches of 512; 20 means of values of each example, against the same step without them, one that
keeps the same sums by hand (see "One update of K means"), and one that returns 20 reduced numbers instead, which is
what people do today. Medians of blocking calls that take turns.
"""

from common import in_turns, table, virtual_devices

virtual_devices(8)

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distributed_metrics import DistributedMetrics, count_collectives
from distributed_metrics.audit import compiled_text

NAMES = [f"metric{i}" for i in range(20)]
MODELS = {"0.3 million": (64, 512, 512), "10 million": (256, 2176, 2176, 2176)}
REPEATS = {"0.3 million": 300, "10 million": 100}


def main() -> None:
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}\n")
    rows = [row for name, widths in MODELS.items() for row in train_step(name, widths, REPEATS[name])]
    table(["parameters", "step", "µs", "ratio", "kernels (fusions) of a step", "collectives"], rows)


def train_step(name: str, widths: tuple[int, ...], repeats: int) -> list[tuple]:
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere, sharded = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    keys = jax.random.split(jax.random.key(0), len(widths))
    shapes = list(zip(widths, (*widths[1:], 10), strict=True))
    weights = [jax.random.normal(key, shape) / shape[0] ** 0.5 for key, shape in zip(keys, shapes, strict=True)]
    state = jax.device_put([weights, *([jnp.zeros_like(w) for w in weights] for _ in range(2))], everywhere)
    batch = jax.device_put(jax.random.normal(keys[0], (512, widths[0])), sharded)

    def losses(weights, batch):
        x = batch
        for one in weights[:-1]:
            x = jax.nn.relu(x @ one)
        logits = x @ weights[-1]
        loss = jax.nn.logsumexp(logits, -1) - logits[:, 0]
        return loss.mean(), {name: loss * i for i, name in enumerate(NAMES)}

    def adam(state, batch):
        weights, first, second = state
        (_, seen), gradients = jax.value_and_grad(losses, has_aux=True)(weights, batch)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradients)
        second = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, second, gradients)
        weights = jax.tree.map(lambda w, m, v: w - 1e-4 * m / (jnp.sqrt(v) + 1e-8), weights, first, second)
        return [weights, first, second], seen

    def add(rows, *values):
        sums = jnp.sum(jnp.stack(values), axis=1)
        return rows + jnp.stack([sums, jnp.full_like(sums, values[0].size)], axis=-1)[None]

    add = jax.shard_map(add, mesh=mesh, in_specs=(P("data"),) * 21, out_specs=P("data"))

    @jax.jit
    def without(other, state, batch):
        return other, adam(state, batch)[0]

    @jax.jit
    def by_hand(rows, state, batch):
        state, seen = adam(state, batch)
        return add(rows, *(seen[name] for name in NAMES)), state

    @jax.jit
    def with_metrics(metrics, state, batch):
        state, seen = adam(state, batch)
        metrics.update(seen)
        return metrics, state

    @jax.jit
    def returning(other, state, batch):
        state, seen = adam(state, batch)
        return {name: value.mean() for name, value in seen.items()}, state

    programs = {
        "without": (without, None),
        "with 20 metrics": (with_metrics, DistributedMetrics(dict.fromkeys(NAMES, "mean"), mesh=mesh)),
        "by hand": (by_hand, jax.device_put(np.zeros((mesh.size, 20, 2), np.float32), sharded)),
        "returning 20 numbers": (returning, None),
    }
    kept = {kind: (other, state) for kind, (_, other) in programs.items()}

    def calling(kind, program):
        def call():
            other, before = kept[kind]
            kept[kind] = program(None if kind.startswith("returning") else other, before, batch)
            return kept[kind]

        return call

    times = in_turns({kind: calling(kind, program) for kind, (program, _) in programs.items()}, repeats)
    window, numbers = kept["with 20 metrics"][0].compute(), kept["returning 20 numbers"][0]
    sums = np.asarray(kept["by hand"][0], np.float64).sum(0)
    assert window.count[NAMES[0]] == (repeats + 20) * 512
    np.testing.assert_allclose(window[NAMES[3]], sums[3, 0] / sums[3, 1], rtol=1e-4)
    assert np.isfinite(float(numbers[NAMES[3]]))
    rows = []
    for kind, (program, other) in programs.items():
        text = compiled_text(program, other, state, batch)
        kernels = text[text.rindex("ENTRY") :].count(" fusion(")
        sent = count_collectives(program, other, state, batch)
        rows.append((name, kind, times[kind], f"×{times[kind] / times['without']:.3f}", kernels, sent or "none"))
    return rows


if __name__ == "__main__":
    main()
