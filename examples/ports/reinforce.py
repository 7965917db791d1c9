"""Reinforcement learning in one ``jit``: rollouts and updates in a ``scan``, 16 seeds in a ``vmap``, over 8 devices.

An episode has a return only where it ends. Trainers like PureJaxRL's log the mean over all steps of the last episode's
return: it counts until the next one ends, and as 0 before the first. Or that over ends alone: NaN in an update without
any, and so on average. Here ``weight=`` says where episodes end, and ``scan`` returns all windows as one snapshot.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from comparison import Numbers, compare
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distributed_metrics import DistributedMetrics, Snapshot, collective_bytes

CELLS, LIMIT = 8, 60  # a corridor, and after how many steps an episode ends at the latest
SEEDS, WINDOWS, UPDATES, STEPS, ENVS = 16, 20, 3, 16, 4
SPEC = {"return": ("mean", "max", "count"), "length": "mean", "entropy": "mean", "loss": "mean"}
Arrays = dict[str, jax.Array]
Runner = tuple[jax.Array, Arrays]  # a policy, and environments
Carry = tuple[Runner, DistributedMetrics]


def start() -> Runner:
    """A policy, with logits of left and right for each cell, and environments at their start."""
    policy, returns, lengths = jnp.zeros((CELLS, 2)), jnp.zeros(ENVS), jnp.zeros(ENVS, int)
    env = {"cell": lengths, "return": returns, "length": lengths, "last_return": returns, "last_length": lengths}
    return policy, env


def update(runner: Runner, keys: jax.Array) -> tuple[Runner, Arrays]:
    """A rollout, and a step of REINFORCE. All that was seen has the shape (steps, environments)."""
    policy, env = runner

    def env_step(env: Arrays, keys: jax.Array) -> tuple[Arrays, Arrays]:
        action = jax.random.categorical(keys[0], policy[env["cell"]])
        right = (action == 1) ^ jax.random.bernoulli(keys[1], 0.1, (ENVS,))  # one in ten slips
        cell = jnp.clip(env["cell"] + jnp.where(right, 1, -1), 0, CELLS - 1)
        reward = jnp.where(cell == CELLS - 1, 1.0, -0.02)
        now = {"return": env["return"] + reward, "length": env["length"] + 1}
        done = (cell == CELLS - 1) | (now["length"] == LIMIT)
        # by hand: the last episode that ended, as the LogWrapper of PureJaxRL and gymnax carries it
        last = {"last_" + name: jnp.where(done, x, env["last_" + name]) for name, x in now.items()}
        after = {name: jnp.where(done, 0, x) for name, x in {"cell": cell, **now}.items()}
        return after | last, {**now, **last, "cell": env["cell"], "action": action, "reward": reward, "done": done}

    def discounted(later: jax.Array, now: Arrays) -> tuple[jax.Array, jax.Array]:
        return (now["reward"] + 0.97 * jnp.where(now["done"], 0, later),) * 2

    def loss_fn(policy: jax.Array) -> tuple[jax.Array, Arrays]:
        logits = policy[seen["cell"]]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, seen["action"]) * (gains - gains.mean())
        return losses.mean(), {"loss": losses, "entropy": jax.scipy.special.entr(jax.nn.softmax(logits)).sum(axis=-1)}

    env, seen = lax.scan(env_step, env, keys)
    _, gains = lax.scan(discounted, jnp.zeros(ENVS), seen, reverse=True)
    gradient, aux = jax.grad(loss_fn, has_aux=True)(policy)
    return (policy - 8 * gradient, env), {**seen, **aux}


def log_by_hand(seen: Arrays) -> Arrays:
    """What the loop logs of an update by hand."""
    log = {"return": seen["last_return"].mean(), "length": seen["last_length"].mean(), "episodes": seen["done"].sum()}
    log |= {"over ends": (seen["return"] * seen["done"]).sum() / log["episodes"], "largest": seen["last_return"].max()}
    return log | {"entropy": seen["entropy"].mean(), "loss": seen["loss"].mean()}


def train(keys: jax.Array) -> tuple[Snapshot, tuple[Arrays, Arrays]]:
    """The whole training of one seed: our windows, and what was logged by hand and seen in each update."""

    def step(carry: Carry, keys: jax.Array) -> tuple[Carry, tuple[Arrays, Arrays]]:
        (runner, seen), metrics = update(carry[0], keys), carry[1]
        metrics.update({"return": seen["return"], "length": seen["length"]}, weight=seen["done"])
        metrics.update(entropy=seen["entropy"], loss=seen["loss"])
        return (runner, metrics), (log_by_hand(seen), seen)

    def window(carry: Carry, keys: jax.Array) -> tuple[Carry, tuple[Snapshot, tuple[Arrays, Arrays]]]:
        carry, logs = lax.scan(step, carry, keys)
        return carry, (carry[1].flush(), logs)

    return lax.scan(window, (start(), DistributedMetrics(SPEC, axis_name=())), keys)[1]  # a row of its own


def main() -> None:
    """Train all seeds, and compare.

    Raises:
        SystemExit: a number is not that of NumPy, or the metrics send something.
    """
    by_seed = NamedSharding(Mesh(jax.devices(), ("seeds",)), PartitionSpec("seeds"))
    keys = jax.device_put(jax.random.split(jax.random.key(0), (SEEDS, WINDOWS, UPDATES, STEPS, 2)), by_seed)
    train_all = jax.jit(jax.vmap(train)).lower(keys).compile()
    windows, (logs, seen) = jax.device_get(train_all(keys))
    run = sum(window for of_seed in windows.unstack() for window in of_seed.unstack())
    returns, done, by_hand = seen["return"].astype(np.float64), seen["done"], logs["return"]
    window = jax.tree.map(lambda x: x[:, 1], windows)["return"]
    means = [returns[i, 1][done[i, 1]].mean() for i in range(SEEDS)]
    numbers = {
        "return": Numbers(by_hand.mean(), run["return"]["mean"], returns[done].mean()),
        "return, over ends": Numbers(logs["over ends"].mean(), run["return"]["mean"], returns[done].mean()),
        "return, seed 2, window 1": Numbers(by_hand[2, 1].mean(), window["mean"][2], means[2]),
        "  the largest": Numbers(logs["largest"][2, 1].max(), window["max"][2], returns[2, 1][done[2, 1]].max()),
        "  spread over seeds": Numbers(by_hand[:, 1].mean(-1).std(), window["mean"].std(), np.std(means)),
        "length": Numbers(logs["length"].mean(), run["length"], seen["length"][done].mean()),
        "episodes": Numbers(logs["episodes"].sum(), run["return"]["count"], done.sum()),
        "entropy": Numbers(logs["entropy"].mean(), run["entropy"], seen["entropy"].mean(dtype=np.float64)),
        "loss": Numbers(logs["loss"].mean(), run["loss"], seen["loss"].mean(dtype=np.float64)),
    }
    silently = jax.jit(jax.vmap(lambda keys: lax.scan(update, start(), keys)[0]), in_shardings=by_seed)
    compare(collective_bytes(silently, keys.reshape(SEEDS, -1, STEPS, 2)), collective_bytes(train_all), numbers)


if __name__ == "__main__":
    main()
